"""Prefixes: every answer is the one to the whole prompt, and one that would not be is refused.

Four prompts of 257 to 384 tokens behind two stored blocks share their programs, with the prefix and without.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import xquant_jax as xq
from tests.xquant_jax.generation.conftest import EXACT, score
from tests.xquant_jax.generation.test_chat import PLAIN, with_template
from xquant_jax.generation.prefix import prefill

STORING: dict[str, Any] = {"cache": EXACT, "prefill_chunk": 128}
ALIKE: dict[str, Any] = {**STORING, "max_new_tokens": 8, "stop_ids": []}
TEXT = [1, *np.random.default_rng(3).integers(259, 500, 399).tolist()]
BEGINNING = TEXT[:300]
PROMPTS = [BEGINNING, TEXT[:301], [*BEGINNING, *TEXT[5:40]], TEXT[:384]]


@pytest.fixture(scope="module")
def prefix(model: xq.Model) -> xq.Prefix:
    return prefill(model, BEGINNING, **STORING)


def assert_same(got: xq.Generation, expected: xq.Generation) -> None:
    assert [r.tokens for r in got.results] == [r.tokens for r in expected.results]
    for one, other in zip(got.results, expected.results, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def assert_likeliest(model: xq.Model, prompts: list[list[int]], got: xq.Generation) -> None:
    """Of greedy answers, exactly cached: every token is that of a forward pass without any cache."""
    for prompt, result in zip(prompts, got.results, strict=True):
        tokens = prompt + result.tokens
        logprobs = score(model, [*tokens, *[0] * (512 - len(tokens))])[len(prompt) - 1 : len(tokens) - 1]
        assert result.tokens == logprobs.argmax(axis=-1).tolist()
        np.testing.assert_allclose(result.logprobs, logprobs.max(axis=-1), atol=1e-4)


def test_answers_are_those_to_the_whole_prompts(model: xq.Model, prefix: xq.Prefix) -> None:
    """300 tokens are no multiple of anything: 256 are stored, the rest is fed again, for one prompt the whole rest."""
    assert prefix.stored == 256
    assert prefix.tokens == BEGINNING
    got = xq.generate(model, PROMPTS, prefix=prefix, **ALIKE)
    assert_same(got, xq.generate(model, PROMPTS, **ALIKE))
    assert_likeliest(model, PROMPTS, got)
    streamed = list(xq.stream(model, PROMPTS, prefix=prefix, **ALIKE))
    for i, result in enumerate(got.results):
        assert [token.token for token in streamed if token.index == i] == result.tokens


def test_a_prompt_that_is_all_stored_goes_on_from_an_earlier_chunk(model: xq.Model) -> None:
    prompts = [TEXT[:256]] * 4
    own = prefill(model, prompts[0], **STORING)
    assert own.stored == 256
    assert_likeliest(model, prompts, xq.generate(model, prompts, prefix=own, **ALIKE))


@pytest.mark.slow
def test_a_prefix_shorter_than_a_chunk_stores_nothing_and_changes_nothing(model: xq.Model) -> None:
    own = prefill(model, TEXT[:100], **STORING)
    assert own.stored == 0
    prompts = [TEXT[:101], TEXT[:128], TEXT[:100], TEXT[:120]]
    assert_likeliest(model, prompts, xq.generate(model, prompts, prefix=own, **ALIKE))


def test_penalties_see_the_prefix(model: xq.Model, prefix: xq.Prefix) -> None:
    """The likeliest token of the first prompt stands in what is stored: made unlikely, another comes."""
    plain = xq.generate(model, PROMPTS, prefix=prefix, **ALIKE)
    likeliest = plain.results[0].tokens[0]
    beginning = [1, likeliest, *BEGINNING[2:]]
    prompts = [[*beginning, *prompt[300:]] for prompt in PROMPTS]
    assert likeliest not in prompts[0][256:]
    own = prefill(model, beginning, **STORING)
    sampling = xq.Sampling(repetition_penalty=5.0)
    got = xq.generate(model, prompts, prefix=own, sampling=sampling, **ALIKE)
    assert_same(got, xq.generate(model, prompts, sampling=sampling, **ALIKE))
    assert xq.generate(model, prompts, prefix=own, **ALIKE).results[0].tokens[0] == likeliest
    assert got.results[0].tokens[0] != likeliest


def test_several_answers_share_prefix_and_prompt(model: xq.Model, prefix: xq.Prefix) -> None:
    """Those to one prompt are those to the prompt given twice, each with blocks of its own."""
    sampling = xq.Sampling(temperature=1.0)
    prompts = [PROMPTS[1], PROMPTS[3]]
    alike = {**ALIKE, "sampling": sampling, "seed": 5, "prefix": prefix}
    got = xq.generate(model, prompts, n=2, **alike)
    assert_same(got, xq.generate(model, [prompts[0], prompts[0], prompts[1], prompts[1]], **alike))
    assert len({tuple(r.tokens) for r in got.results}) == 4


def test_drafts_are_looked_up_in_the_prefix(model: xq.Model) -> None:
    """A line that comes again and again is mostly stored."""
    assert model.tokenizer is not None
    text = model.tokenizer.encode("    self.items = items\n" * 80)
    prompts = [text[:length] for length in (300, 320, 350, 384)]
    own = prefill(model, text[:300], **STORING)
    got = xq.generate(model, prompts, prefix=own, speculate="lookup:4", **ALIKE)
    assert_same(got, xq.generate(model, prompts, prefix=own, **ALIKE))
    assert got.speculation is not None
    assert got.speculation.accepted > 0


def test_sliding_windows_reach_into_the_prefix(model: xq.Model) -> None:
    config = dataclasses.replace(model.config, sliding_windows=(200, 200, None, 70, 200))
    windowed = dataclasses.replace(model, transformer=xq.Transformer(config))
    own = prefill(windowed, BEGINNING, **STORING)
    assert_likeliest(windowed, PROMPTS, xq.generate(windowed, PROMPTS, prefix=own, **ALIKE))
    with pytest.raises(xq.ConfigError, match=r"made with sliding_windows=\(200"):
        xq.generate(model, PROMPTS, prefix=own, **ALIKE)


def test_conversations_begin_with_a_system_message_that_was_fed(model: xq.Model) -> None:
    talking = with_template(model, PLAIN)
    system = {"role": "system", "content": "def main(): pass\n" * 60}
    chats = [[system, {"role": "user", "content": word}] for word in ("a", "def f(x):", "import os", "x = [")]
    own = prefill(talking, f"system:{system['content']}\nuser:", add_special_tokens=False, **STORING)
    assert own.stored == 256
    assert len(own.tokens) < 364
    got = xq.chat(talking, chats, prefix=own, **ALIKE)
    assert_same(got, xq.chat(talking, chats, **ALIKE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "int8"}, r"the prefix was made with cache=bf16,dtype=float32, and here it is int8; make it anew"),
        ({"prefill_chunk": 256}, r"made with prefill_chunk=128, and here it is 256"),
        ({"prefill_chunk": None}, r"a prefix needs prefill_chunk"),
    ],
)
def test_other_options_are_refused(model: xq.Model, prefix: xq.Prefix, changes: dict, message: str) -> None:
    with pytest.raises(xq.ConfigError, match=message):
        xq.generate(model, PROMPTS, prefix=prefix, **{**ALIKE, **changes})


def test_other_models_are_refused(model: xq.Model, prefix: xq.Prefix) -> None:
    norm = {"scale": model.params["final_norm"]["scale"].at[0].add(1.0)}
    other = dataclasses.replace(model, params={**model.params, "final_norm": norm})
    with pytest.raises(xq.ConfigError, match=f"made with weights={model.checksum}, and here it is {other.checksum}"):
        xq.generate(other, PROMPTS, prefix=prefix, **ALIKE)
    with pytest.raises(xq.ConfigError, match="made with dtype=float32, and here it is bfloat16"):
        xq.generate(dataclasses.replace(model, dtype="bfloat16"), PROMPTS, prefix=prefix, **ALIKE)


def test_a_mesh_is_refused(model: xq.Model, prefix: xq.Prefix) -> None:
    mesh = xq.make_mesh(data=2, devices=jax.devices()[:2])
    with pytest.raises(xq.ConfigError, match="leave out the prefix or the mesh"):
        xq.generate(model, PROMPTS, prefix=prefix, mesh=mesh, **ALIKE)
    with pytest.raises(xq.ConfigError, match="leave out the prefix or the mesh"):
        prefill(model.on(mesh), BEGINNING, **STORING)


@pytest.mark.parametrize("prompt", [TEXT[:299], [*TEXT[:299], 7, 8], [7], TEXT[1:]])
def test_a_prompt_that_does_not_begin_with_it_is_refused(model: xq.Model, prefix: xq.Prefix, prompt: list) -> None:
    same = 299 if len(prompt) > 298 and prompt[0] == 1 else 0
    with pytest.raises(xq.PromptError, match=rf"prompt 1 does not begin with the prefix: its token {same} differs"):
        xq.generate(model, [PROMPTS[1], prompt], prefix=prefix, **ALIKE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": []}, xq.PromptError, "the prefix is empty"),
        ({"prompt": [10**6]}, xq.PromptError, "the prefix holds token id 1000000"),
        ({"prefill_chunk": None}, xq.ConfigError, "a prefix needs prefill_chunk"),
        ({"prefill_chunk": 0}, xq.ConfigError, "prefill_chunk=0 is not possible"),
        ({"cache": "none"}, xq.ConfigError, "cache method 'none' is not known"),
    ],
)
def test_what_cannot_be_a_prefix_is_an_error(model: xq.Model, changes: dict, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        prefill(model, **{"prompt": BEGINNING, **STORING, **changes})
