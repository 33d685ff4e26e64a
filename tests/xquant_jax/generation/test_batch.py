"""Offline batches: every answer is what the model alone says, and `generate` gives, whatever shares the slots."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import counted_compilations
from tests.xquant_jax.generation.conftest import EXACT, STARTS
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.generation.batch import prepare
from xquant_jax.generation.request import Answer, Options, Request


def requests(number: int, longest: int = 60, **asked: Any) -> list[Request]:
    """Prompts and answers of many lengths."""
    rng = np.random.default_rng(0)
    return [
        Request(STARTS[i % 5] + " and then" * int(rng.integers(6)), int(rng.integers(1, longest)), seed=i, **asked)
        for i in range(number)
    ]


def assert_likeliest(model: xq.Model, asked: Sequence[Request], answers: Sequence[Answer]) -> None:
    """Of greedy requests, exactly cached: every token is the likeliest of a forward pass without any cache."""
    assert sorted(answer.index for answer in answers) == list(range(len(asked)))
    for answer in answers:
        got, request = answer.completion, asked[answer.index]
        assert got is not None
        whole = [*prompt_of(model, request), *got.tokens]
        padded = np.zeros((1, -len(whole) % 256 + len(whole)), np.int32)
        padded[0, : len(whole)] = whole
        logprobs = score(model, padded)[len(whole) - len(got.tokens) - 1 : len(whole) - 1]
        assert got.tokens == logprobs.argmax(axis=-1).tolist()
        np.testing.assert_allclose(got.logprobs, logprobs.max(axis=-1), atol=1e-4)
        stops = model.stop_ids if request.stop_ids is None else request.stop_ids
        assert not set(got.tokens[:-1]) & set(stops)
        assert got.finish_reason == ("stop" if got.tokens[-1] in stops else "length")
        assert len(got.tokens) == request.max_new_tokens or got.finish_reason == "stop"


def prompt_of(model: xq.Model, request: Request) -> list[int]:
    return model.tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)


def score(model: xq.Model, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities [T, V] after every token."""
    return np.asarray(_score(model.transformer, model.params, tokens)[0])


@partial(jax.jit, static_argnames="transformer")
def _score(transformer: xq.Transformer, params: Any, tokens: Any) -> Any:
    return jax.nn.log_softmax(transformer.apply({"params": params}, tokens, method="score"))


def assert_as_generated(
    model: xq.Model, asked: Sequence[Request], answers: list[Answer], *, atol: float = 1e-4, **options: Any
) -> None:
    """`generate` answers all prompts up to the longest limit; an answer is what it begins with."""
    limits, (one, *_) = [request.max_new_tokens for request in asked], asked
    alike = {"sampling": one.sampling, "stop": one.stop, "stop_ids": one.stop_ids}
    prompts, seeds = [request.prompt for request in asked], [request.seed or 0 for request in asked]
    expected = xq.generate(model, prompts, max_new_tokens=max(limits), seed=seeds, **alike, **options).results
    assert sorted(answer.index for answer in answers) == list(range(len(asked)))
    for answer in answers:
        got, whole, limit = answer.completion, expected[answer.index], limits[answer.index]
        assert got is not None
        assert got.prompt == whole.prompt
        assert got.tokens == whole.tokens[:limit]
        np.testing.assert_allclose(got.logprobs, whole.logprobs[:limit], atol=atol)
        ended = len(whole.tokens) <= limit
        assert got.finish_reason == (whole.finish_reason if ended else "length")
        assert got.text == whole.text if ended else whole.text.startswith(got.text.rstrip("\N{REPLACEMENT CHARACTER}"))


@pytest.mark.parametrize("slots", [3, 50])
def test_every_token_is_the_likeliest_whatever_the_number_of_slots(model: xq.Model, slots: int) -> None:
    asked = requests(11)
    assert_likeliest(model, asked, list(prepare(model, Options(EXACT, slots=slots)).answers(asked)))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["xquant-cl:4", "kvquant:4"])
def test_quantized_slots_are_refilled_across_flushes(model: xq.Model, demo: xq.Model, spec: str) -> None:
    """Sequences of up to 310 tokens in two slots: blocks that a finished one left behind are not read."""
    model = demo if spec == "kvquant:4" else model  # its calibration is of all layers
    long = [int(t) for t in np.random.default_rng(1).integers(259, 500, 290)]
    asked = [Request(long[:n], new, stop_ids=[]) for n, new in ((290, 20), (70, 30), (250, 10), (110, 25), (120, 12))]
    answers = list(prepare(model, Options(spec, 64, slots=2)).answers(asked))
    # codes on the edge may round otherwise
    assert_as_generated(model, asked, answers, atol=0.1, cache=spec, prefill_chunk=64)


def test_chunked_prompts_and_short_ones_side_by_side(model: xq.Model) -> None:
    long = [int(t) for t in np.random.default_rng(2).integers(259, 500, 150)]
    asked = [Request(p, 9, stop_ids=[]) for p in (STARTS[0], long, STARTS[1], long[:70], long[:64], [5])]
    answers = list(prepare(model, Options(EXACT, 32, slots=2)).answers(asked))
    assert_likeliest(model, asked, answers)


def test_a_sample_depends_on_its_seed_and_not_on_its_slot(model: xq.Model) -> None:
    asked = requests(9, sampling=xq.Sampling(1.1, temperature=0.9, top_p=0.9), stop=["self", "("])
    answers = list(prepare(model, Options(EXACT, slots=4)).answers(asked))
    assert_as_generated(model, asked, answers, cache=EXACT)
    assert {a.completion.finish_reason for a in answers if a.completion} == {"stop", "length"}


def test_refilling_slots_compiles_nothing(model: xq.Model) -> None:
    """13 prompts of many lengths and options through three slots: after the first answer no program is new."""
    asked = requests(13)
    asked[5] = dataclasses.replace(asked[5], sampling=xq.Sampling(1.2, 0.7, top_k=9), stop=["x"], logprobs=3)
    answers = prepare(model, Options(slots=3)).answers(asked)
    next(answers)
    with counted_compilations() as compiled:
        assert len(list(answers)) == 12
    assert compiled == []


def test_an_iterator_is_read_as_slots_are_freed(model: xq.Model) -> None:
    """The first answer comes before more than the slots' requests are read; a longer one gets a larger cache."""
    asked = [*(Request(STARTS[i % 3], 4 + 3 * i) for i in range(8)), Request(STARTS[0], 130)]
    read = []

    def source() -> Iterator[Request]:
        for i, request in enumerate(asked):
            read.append(i)
            yield request

    answers = prepare(model, Options(EXACT, slots=2)).answers(source())
    first = next(answers)
    assert len(read) < 5
    assert_likeliest(model, asked, [first, *answers])
    assert len(read) == len(asked)


def test_a_freed_slot_is_taken_at_once(model: xq.Model) -> None:
    """Two slots, one long answer: every short one is finished before it."""
    asked = [Request(STARTS[0], 200, stop_ids=[]), *(Request(STARTS[1], 8) for _ in range(10))]
    finished = [answer.index for answer in prepare(model, Options(EXACT, slots=2)).answers(asked)]
    assert finished[-1] == 0


MEMORY = 75_000_000


def test_memory_decides_the_slots_and_is_kept(model: xq.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences first and few at once; then a cache of smaller slots, and more of them."""
    sizes = []

    def noted(cache_config: CacheConfig, config: xq.ModelConfig, **sizes_asked: int) -> xq.Cache:
        cache = allocate(cache_config, config, **sizes_asked)
        if not isinstance(cache.lengths, jax.core.Tracer):
            sizes.append((cache.lengths.shape[0], cache.capacity, cache_bytes(cache).total))
        return cache

    monkeypatch.setattr("xquant_jax.generation.engine.allocate", noted)
    long = [int(t) for t in np.random.default_rng(3).integers(259, 500, 1200)]
    asked = [Request(long[:n], 4, stop_ids=[]) for n in (1200, 60, 1150, 90, 1100, 200, 30, 70, 50, 40)]
    answers = list(prepare(model, Options(EXACT, 256, memory=MEMORY)).answers(asked))
    (few, large, one), (many, small, other) = sizes
    assert_likeliest(model, asked, answers)
    assert few < many
    assert large > 1200 > small
    assert max(one, other) < MEMORY


def as_it_came(**fields: Any) -> Request:
    """A request with values of any type, as a program without type checks makes it."""
    request = Request("x")
    for name, value in fields.items():
        object.__setattr__(request, name, value)
    return request


def test_bad_requests_are_answered_with_an_error_and_the_rest_goes_on(model: xq.Model) -> None:
    good = Request(STARTS[0], np.int64(4), seed=np.int32(1))
    bad: list[tuple[Any, dict[str, Any], str]] = [
        ("", {}, "the prompt is empty"),
        ([1, 4096], {}, "token id 4096; the model's ids are 0 to 4095"),
        (None, {}, "the prompt is None; give a text, or a list of token ids"),
        (b"x", {}, "the prompt is bytes"),
        ("Hi", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("Hi", {"max_new_tokens": "9"}, "max_new_tokens='9' is not a whole number"),
        ("Hi", {"seed": 2**63}, "seed=9223372036854775808"),
        ("Hi", {"sampling": 0.5}, "sampling=0.5 is not possible"),
        ("Hi", {"stop": "x"}, "stop='x' is not possible"),
        ("Hi", {"stop": 5}, "stop=5 is not possible"),
        ("Hi", {"stop_ids": 5}, "stop_ids is 5"),
        ("Hi", {"logprobs": 21}, "logprobs=21 is not possible; choose from 0 to 20"),
    ]
    asked = [*(as_it_came(prompt=prompt, **options) for prompt, options, _ in bad), good]
    for options in (Options(slots=2), Options(memory=5_000_000)):
        answers = {answer.index: answer for answer in prepare(model, options).answers(asked)}
        assert len(answers) == len(asked)
        assert answers[len(bad)].completion is not None
        for index, (_, _, message) in enumerate(bad):
            assert answers[index].completion is None
            assert message in (answers[index].error or "")


def test_a_sequence_larger_than_the_memory_is_an_error_that_says_what_it_takes(model: xq.Model) -> None:
    asked = [Request(STARTS[0], 9000), Request(STARTS[1], 4)]
    with pytest.warns(xq.XQuantWarning, match="more than the 2,048 tokens that the model was made for"):
        answers = {answer.index: answer for answer in prepare(model, Options(memory=5_000_000)).answers(asked)}
    assert "tokens take a cache of" in (answers[0].error or "")
    assert "memory=5000000 is all there is" in (answers[0].error or "")
    assert answers[1].completion is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots=0 is not possible"),
        ({"memory": -5}, "memory=-5 is not possible"),
        ({"slots": 2, "memory": 5}, "both given"),
        ({"cache_tokens": 2, "memory": 5}, "both given"),
        ({"cache": "xquant:5"}, "bits=5"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_an_error_before_anything_runs(model, options, message) -> None:
    with pytest.raises(xq.ConfigError, match=message):
        prepare(model, Options(**options))
