"""`generate` and `stream`: what users rely on whatever the batch, the chunks and the buckets."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import xquant_jax as xq
from tests.checkpoints import write_checkpoint
from tests.conftest import counted_compilations
from tests.xquant_jax.generation.conftest import EXACT, STARTS, score
from xquant_jax.generation.buckets import bucket_length
from xquant_jax.model.loading import DEMO

PROMPTS = list(STARTS[:2])


def test_a_batch_of_unequal_prompts_equals_each_alone(model: xq.Model) -> None:
    together = xq.generate(model, PROMPTS, max_new_tokens=20).results
    for prompt, result in zip(PROMPTS, together, strict=True):
        alone = xq.generate(model, prompt, max_new_tokens=20).results[0]
        assert alone.tokens == result.tokens
        np.testing.assert_allclose(alone.logprobs, result.logprobs, atol=1e-3)


def test_sampling_depends_on_seed_and_prompt_only(model: xq.Model) -> None:
    sampling = xq.Sampling(temperature=1.0, top_p=0.95)
    batch = xq.generate(model, PROMPTS, sampling=sampling, seed=[5, 6], max_new_tokens=20).results
    alone = xq.generate(model, PROMPTS[1], sampling=sampling, seed=6, max_new_tokens=20).results[0]
    again = xq.generate(model, PROMPTS[1], sampling=sampling, seed=6, max_new_tokens=20).results[0]
    other = xq.generate(model, PROMPTS[1], sampling=sampling, seed=8, max_new_tokens=20).results[0]
    assert alone.tokens == again.tokens == batch[1].tokens
    assert other.tokens != alone.tokens


def test_log_probabilities_equal_a_forward_without_cache(model: xq.Model) -> None:
    result = xq.generate(model, PROMPTS[0], cache=EXACT, max_new_tokens=30).results[0]
    prompt = model.tokenizer.encode(PROMPTS[0])
    expected = score(model, prompt + result.tokens)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(result.logprobs, expected[np.arange(30), result.tokens], atol=1e-4)


def test_chunked_prefill_gives_the_same_answer(model: xq.Model) -> None:
    """Exactly stored, it cannot matter that a prompt of 205 tokens is cut; 7 does not divide a block."""
    prompt = [1, *np.random.default_rng(0).integers(259, 500, 204).tolist()]
    result = xq.generate(model, [prompt], cache=EXACT, max_new_tokens=12, prefill_chunk=7, stop_ids=[]).results[0]
    expected = score(model, prompt + result.tokens)[len(prompt) - 1 : -1]
    assert result.tokens == expected.argmax(axis=-1).tolist()
    np.testing.assert_allclose(result.logprobs, expected.max(axis=-1), atol=1e-4)


def test_a_second_call_of_the_same_bucket_compiles_nothing(model: xq.Model) -> None:
    sampling = xq.Sampling(temperature=0.7, repetition_penalty=1.1)
    xq.generate(model, ["def f():", "class A:"], sampling=sampling, max_new_tokens=6)
    with counted_compilations() as compiled:
        changed = xq.Sampling(temperature=1.3, top_k=9, top_p=0.9, min_p=0.01)
        xq.generate(model, ["def g():", "class B:"], max_new_tokens=6)
        xq.generate(model, ["def g():", "class B:"], sampling=changed, seed=3, max_new_tokens=6)
        list(xq.stream(model, ["def h():", "class C:"], sampling=changed, max_new_tokens=6))
        xq.generate(model, ["def i():", "class D:"], sampling=changed, stop=["self"], max_new_tokens=6)
        xq.generate(model, ["def i():", "class D:"], sampling=changed, stop_ids=[5, 6], max_new_tokens=9)
    assert compiled == []
    with counted_compilations() as compiled:
        jax.jit(lambda x: x + 1)(1.0)
    assert compiled  # the counter counts


@pytest.mark.parametrize("cache", ["xquant-cl:2", "xquant:4,rebuild_dtype=int8"])
def test_factors_are_made_once(cache: str, model: xq.Model, tmp_path: Path) -> None:
    if cache != "xquant-cl:2":
        model = xq.load(write_checkpoint(tmp_path, multi_head=True))
    assert model.method_params(xq.CacheConfig.parse(cache)) is model.method_params(xq.CacheConfig.parse(cache))


def test_arrays_of_jax_are_token_ids(model: xq.Model) -> None:
    rows = [[1, 403, 407], [5, 6, 7]]
    told = [xq.generate(model, prompts, max_new_tokens=3).results for prompts in (rows, jnp.asarray(rows))]
    assert [r.tokens for r in told[0]] == [r.tokens for r in told[1]]
    alone = xq.generate(model, jnp.asarray(rows[0]), max_new_tokens=3).results[0]
    assert (alone.prompt, alone.tokens) == (rows[0], told[0][0].tokens)


def test_layers_of_other_bits_share_their_factors(demo: xq.Model) -> None:
    segments = demo.method_params(xq.CacheConfig.parse("xquant:4;1=8;3=2"))
    assert len(segments) > 3
    for segment in segments:
        for side in ("key", "value"):
            for name, array in segments[-1][side].items():
                assert segment[side][name] is array


def test_what_a_tokenizer_file_says_of_training_batches_does_not_apply(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    written = tokenizers.Tokenizer.from_file(str(path))
    written.enable_truncation(8)
    written.enable_padding(length=8)
    written.save(str(path))
    plain, told = (xq.load(folder) for folder in (DEMO, tmp_path / "model"))
    for text in PROMPTS:
        assert told.tokenizer is not None
        assert plain.tokenizer is not None
        assert told.tokenizer.encode(text) == plain.tokenizer.encode(text)


def test_tokens_that_the_model_lacks_are_an_error(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    written = tokenizers.Tokenizer.from_file(str(path))
    written.add_tokens(["<new>"])
    written.save(str(path))
    with pytest.raises(xq.PromptError, match="token id 4096; the model's ids are 0 to 4095"):
        xq.generate(xq.load(tmp_path / "model"), ["x <new>"], max_new_tokens=2)


@pytest.mark.parametrize("chunk", [64, 512, 100])
def test_buckets_hold_the_prompt_and_waste_little(chunk: int, own_buckets: None) -> None:
    for longest in (1, 15, 16, 17, 63, 64, 65, 511, 513, 2000, 40_000):
        length, size = bucket_length(longest, chunk)
        assert length % size == 0
        assert longest <= length <= max(16, 2 * longest) if longest <= chunk else length < 1.13 * longest + chunk
    assert len({bucket_length(n, chunk)[0] for n in range(1, 100_000, 7)}) < 100


def test_streaming_gives_the_same_tokens_and_text(model: xq.Model) -> None:
    whole = xq.generate(model, PROMPTS, max_new_tokens=25, stop=["state"]).results
    events = list(xq.stream(model, PROMPTS, max_new_tokens=25, stop=["state"]))
    for i, result in enumerate(whole):
        mine = [event for event in events if event.index == i]
        assert "".join(event.text for event in mine) == result.text
        assert mine[-1].finish_reason == result.finish_reason
        assert [event.token for event in mine] == result.tokens


def test_a_stop_string_ends_its_own_row_only(model: xq.Model) -> None:
    free = xq.generate(model, PROMPTS[:2], max_new_tokens=40).results
    word = free[0].text.split()[1]
    assert word not in free[1].text
    ended, other = xq.generate(model, PROMPTS[:2], max_new_tokens=40, stop=["never seen", word]).results
    assert ended.text == free[0].text[: free[0].text.index(word)]
    assert ended.finish_reason == "stop"
    assert ended.tokens == free[0].tokens[: len(ended.tokens)]
    assert (other.tokens, other.text, other.finish_reason) == (free[1].tokens, free[1].text, "length")


def test_several_stop_ids(model: xq.Model) -> None:
    free = xq.generate(model, PROMPTS[0], max_new_tokens=40).results[0]
    ids = [free.tokens[9], free.tokens[5]]
    result = xq.generate(model, PROMPTS[0], max_new_tokens=40, stop_ids=ids).results[0]
    first = min(free.tokens.index(i) for i in ids)
    assert result.tokens == free.tokens[: first + 1]
    assert result.finish_reason == "stop"
    assert free.text.startswith(result.text)
    assert len(result.logprobs) == len(result.tokens)


@pytest.mark.optimized
def test_two_bit_cache_stays_coherent_over_flushes(demo: xq.Model) -> None:
    """300 tokens cross two flushes; a broken history would make other tokens likely than a forward pass without."""
    result = xq.generate(demo, PROMPTS[0], cache="xquant-cl:2", max_new_tokens=300, stop_ids=[]).results[0]
    exact = score(demo, [*demo.tokenizer.encode(PROMPTS[0]), *result.tokens])[-301:-1]
    assert np.isfinite(result.logprobs).all()
    assert np.abs(result.logprobs - exact[np.arange(300), result.tokens])[128:].mean() < 0.1


def test_whole_numbers_of_numpy_are_taken_as_numbers(model: xq.Model) -> None:
    tokens = np.asarray([5, 6, 7])
    plain = xq.generate(model, [5, 6, 7], seed=3, max_new_tokens=3, stop_ids=[9], sampling=xq.Sampling(temperature=1.0))
    sampling = xq.Sampling(temperature=np.float32(1.0), top_k=np.int64(4096))  # pyright: ignore[reportArgumentType]
    options = {"seed": np.int64(3), "max_new_tokens": np.int64(3), "stop_ids": np.asarray([9]), "sampling": sampling}
    result = xq.generate(model, [tokens], **options, prefill_chunk=np.int64(512), cache_tokens=np.int64(143))
    assert json.loads(json.dumps(result.to_json()))["results"][0]["prompt"] == tokens.tolist()
    assert result.results[0].tokens == plain.results[0].tokens
    events = list(xq.stream(model, [tokens], **options))
    assert [event.token for event in events] == plain.results[0].tokens


def test_result_as_json_holds_what_is_promised(model: xq.Model) -> None:
    result = xq.generate(model, PROMPTS[0], max_new_tokens=5)
    written = json.loads(json.dumps(result.to_json()))
    assert set(written["results"][0]) == {
        "prompt",
        "text",
        "tokens",
        "logprobs",
        "finish_reason",
        "seed",
        "cached_tokens",
    }
    sizes = written["cache_bytes"]
    assert set(sizes) == {"codes", "scales", "window", "scratch", "total"}
    assert sizes["total"] == sum(n for part, n in sizes.items() if part != "total")
    assert written["prefill_s"] > 0
    assert written["decode_s"] > 0


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("", {}, xq.PromptError, "prompt 0 is empty"),
        (["Hello", ""], {}, xq.PromptError, "prompt 1 is empty"),
        ([[]], {}, xq.PromptError, "prompt 0 is empty"),
        ([], {}, xq.PromptError, "there is no prompt"),
        ([[1, 4096]], {}, xq.PromptError, "token id 4096; the model's ids are 0 to 4095"),
        ([[1, -1]], {}, xq.PromptError, "token id -1"),
        ("Hi", {"max_new_tokens": 0}, xq.ConfigError, "max_new_tokens=0"),
        ("Hi", {"cache_tokens": 20, "max_new_tokens": 30}, xq.CacheFullError, "holds 20 tokens"),
        ("Hi", {"cache": "xquant:5"}, xq.ConfigError, "bits=5"),
        ("Hi", {"cache": "xquant:4,group=5"}, xq.ConfigError, "group=5 does not divide"),
        ("Hi", {"sampling": xq.Sampling(temperature=-1)}, xq.ConfigError, "temperature=-1"),
        ("Hi", {"stop": [""]}, xq.ConfigError, r"stop=\[''\] is not possible"),
        ("Hi", {"stop": "a"}, xq.ConfigError, "stop='a' is not possible; give a list"),
        ("Hi", {"n": 0}, xq.ConfigError, "n=0 is not possible"),
        ("Hi", {"min_tokens": -1}, xq.ConfigError, "min_tokens=-1 is not possible"),
        ("Hi", {"min_tokens": 200}, xq.ConfigError, "min_tokens=200 is more than max_new_tokens=128"),
        (xq.Chat([{"role": "user", "content": "Hi"}]), {}, xq.PromptError, "this model has no chat template"),
        ("Hi", {"seed": [1, 2]}, xq.ConfigError, "2 seeds given for 1 prompts"),
        ("Hi", {"prefill_chunk": 0}, xq.ConfigError, "prefill_chunk=0"),
        ("Hi", {"seed": 2**63}, xq.ConfigError, "seed=9223372036854775808 is not possible"),
        ("Hi", {"stop_ids": [4096]}, xq.PromptError, "stop_ids holds token id 4096"),
        ([np.asarray([1.5])], {}, xq.PromptError, "1.5.*, which is not a whole number"),
        (b"Hi", {}, xq.PromptError, "a prompt is bytes"),
        ("Hi \udcff", {}, xq.PromptError, "prompt 0 is not valid Unicode"),
    ],
)
def test_bad_input_is_a_clear_error(model: xq.Model, prompts, options, error, message) -> None:
    with pytest.raises(error, match=message):
        xq.generate(model, prompts, **options)
    with pytest.raises(error, match=message):
        xq.stream(model, prompts, **options)
