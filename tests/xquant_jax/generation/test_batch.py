"""Offline batches on a trained model: every answer is the one that `generate` gives, whatever shares the slots."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import counted_compilations
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.cli import main
from xquant_jax.generation.batch import prepare
from xquant_jax.generation.request import Answer, Request

EXACT = "bf16,dtype=float32"
STORIES = ("Once upon a time", "The big dog", "Lily and her mom went to the park. They saw a big", "Tom", "One day Sue")


@pytest.fixture(scope="module")
def model(shared: Path) -> xq.Model:
    return xq.load(shared / "models" / "stories260K")


def requests(number: int, longest: int = 60) -> list[Request]:
    """Prompts and answers of many lengths."""
    rng = np.random.default_rng(0)
    return [
        Request(STORIES[i % 5] + " and then" * int(rng.integers(6)), int(rng.integers(1, longest)), seed=i)
        for i in range(number)
    ]


def assert_as_generated(
    model: xq.Model, asked: Sequence[Request], answers: list[Answer], *, atol: float = 1e-4, **options
) -> None:
    """`generate` answers all prompts up to the longest limit; an answer is what it begins with."""
    limits = [request.max_new_tokens or 0 for request in asked]
    prompts, seeds = [request.prompt for request in asked], [request.seed or 0 for request in asked]
    expected = xq.generate(model, prompts, max_new_tokens=max(limits), seed=seeds, **options).results
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
def test_answers_are_those_of_generate_whatever_the_number_of_slots(model: xq.Model, slots: int) -> None:
    asked = requests(11)
    assert_as_generated(model, asked, list(prepare(model, cache=EXACT, slots=slots).answers(asked)), cache=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["xquant:4", "xquant-cl:4", "kvquant:4"])
def test_quantized_slots_are_refilled_across_flushes(model: xq.Model, spec: str, shared: Path, tmp_path: Path) -> None:
    """Sequences of up to 400 tokens in two slots: blocks that a finished one left behind are not read."""
    if spec == "kvquant:4":
        text, found = tmp_path / "text", tmp_path / "calibration.safetensors"
        text.write_text(" ".join(STORIES) * 40)
        stories = str(shared / "models" / "stories260K")
        command = ["calibrate", stories, "--text", str(text), "--cache", spec, "--seq-len", "128", "--out", str(found)]
        assert main([*command, "--limit-windows", "2"]) == 0
        model = xq.load(stories, calibration=found)
    long = [int(t) for t in np.random.default_rng(1).integers(259, 500, 150)]
    asked = [Request(long, 200), Request(STORIES[0], 150), Request(long[:140], 2), Request(STORIES[1], 260)]
    asked = [Request(r.prompt, r.max_new_tokens, seed=0) for r in asked]
    options = {"cache": spec, "stop_ids": []}
    answers = list(prepare(model, slots=2, **options).answers(asked))
    assert_as_generated(model, asked, answers, atol=0.1, **options)  # codes on the edge may round otherwise


def test_chunked_prompts_and_short_ones_side_by_side(model: xq.Model) -> None:
    long = [int(t) for t in np.random.default_rng(2).integers(259, 500, 150)]
    asked = [Request(p, 9, seed=0) for p in (STORIES[0], long, STORIES[1], long[:70], long[:64], [5])]
    options = {"cache": EXACT, "prefill_chunk": 32, "stop_ids": []}
    assert_as_generated(model, asked, list(prepare(model, slots=2, **options).answers(asked)), **options)


def test_a_sample_depends_on_its_seed_and_not_on_its_slot(model: xq.Model) -> None:
    options = {"cache": EXACT, "sampling": xq.Sampling(1.1, temperature=0.9, top_p=0.9), "stop": ["little", "was"]}
    asked = requests(9)
    answers = list(prepare(model, slots=4, **options).answers(asked))
    assert_as_generated(model, asked, answers, **options)
    assert {a.completion.finish_reason for a in answers if a.completion} == {"stop", "length"}


def test_refilling_slots_compiles_nothing(model: xq.Model) -> None:
    """13 prompts of many lengths through three slots: after the first answer no program is new."""
    answers = prepare(model, cache="xquant:4", slots=3).answers(requests(13))
    next(answers)
    with counted_compilations() as compiled:
        assert len(list(answers)) == 12
    assert compiled == []


def test_a_freed_slot_is_taken_at_once(model: xq.Model) -> None:
    """Two slots, one long answer: every short one is finished before it."""
    asked = [Request(STORIES[0], 200), *(Request(STORIES[1], 8) for _ in range(10))]
    finished = [answer.index for answer in prepare(model, cache=EXACT, slots=2, stop_ids=[]).answers(asked)]
    assert finished[-1] == 0


def test_memory_decides_the_slots_and_is_kept(model: xq.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences first and few at once; then a cache of smaller slots, and more of them."""
    sizes = []

    def noted(cache_config: CacheConfig, config: xq.ModelConfig, **sizes_asked: int) -> xq.Cache:
        cache = allocate(cache_config, config, **sizes_asked)
        if not isinstance(cache.lengths, jax.core.Tracer):
            sizes.append((cache.lengths.shape[0], cache.capacity, cache_bytes(cache).total))
        return cache

    monkeypatch.setattr("xquant_jax.generation.batch.allocate", noted)
    long = [int(t) for t in np.random.default_rng(3).integers(259, 500, 1200)]
    asked = [Request(long[:n], 4, seed=0) for n in (1200, 60, 1150, 90, 1100, 200, 30, 70, 50, 40)]
    options = {"cache": EXACT, "stop_ids": [], "prefill_chunk": 256}
    answers = list(prepare(model, memory=9_000_000, **options).answers(asked))
    assert_as_generated(model, asked, answers, **options)
    (few, large, one), (many, small, other) = sizes
    assert few < many
    assert large > 1200 > small
    assert max(one, other) < 9_000_000


def test_bad_requests_are_answered_with_an_error_and_the_rest_goes_on(model: xq.Model) -> None:
    asked = [Request(""), Request([1, 512]), Request(STORIES[0]), Request("Hi", 0), Request("Hi", seed=2**31)]
    answers = {answer.index: answer for answer in prepare(model, slots=2, max_new_tokens=4).answers(asked)}
    assert answers[2].completion is not None
    errors = [
        "the prompt is empty",
        "token id 512; the model's ids are 0 to 511",
        "max_new_tokens=0",
        "seed=2147483648",
    ]
    for index, message in zip((0, 1, 3, 4), errors, strict=True):
        assert answers[index].completion is None
        assert message in (answers[index].error or "")


def test_a_sequence_larger_than_the_memory_is_an_error_that_says_what_it_takes(model: xq.Model) -> None:
    asked = [Request(STORIES[0], 4000), Request(STORIES[1], 4)]
    answers = {answer.index: answer for answer in prepare(model, memory=1_000_000).answers(asked)}
    assert "tokens take a cache of" in (answers[0].error or "")
    assert "memory=1000000 is all there is" in (answers[0].error or "")
    assert answers[1].completion is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots=0 is not possible"),
        ({"memory": -5}, "memory=-5 is not possible"),
        ({"slots": 2, "memory": 5}, "both given"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"cache": "xquant:5"}, "bits=5"),
        ({"sampling": xq.Sampling(temperature=-1)}, "temperature=-1"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"stop": "x"}, "stop must be a list"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_an_error_before_anything_runs(model, options, message) -> None:
    with pytest.raises(xq.ConfigError, match=message):
        prepare(model, **options)
