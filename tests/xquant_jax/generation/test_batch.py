"""Offline batches: every answer is what the model alone says, and `generate` gives, whatever shares the slots."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import counted_compilations
from tests.xquant_jax.generation.conftest import EXACT, STARTS, score
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.generation.answer import Answer, Completion
from xquant_jax.generation.batch import prepare
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.request import Options, Request
from xquant_jax.generation.runner import Runner


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
        logprobs = score(model, [*prompt_of(model, request), *got.tokens])[-len(got.tokens) - 1 : -1]
        assert got.tokens == logprobs.argmax(axis=-1).tolist()
        np.testing.assert_allclose(got.logprobs, logprobs.max(axis=-1), atol=1e-4)
        stops = model.stop_ids if request.stop_ids is None else request.stop_ids
        assert not set(got.tokens[:-1]) & set(stops)
        assert got.finish_reason == ("stop" if got.tokens[-1] in stops else "length")
        assert len(got.tokens) == request.max_new_tokens or got.finish_reason == "stop"


def prompt_of(model: xq.Model, request: Request) -> list[int]:
    return model.tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)


@pytest.mark.parametrize(("slots", "number"), [(2, 11), (50, 2)])
def test_every_token_is_the_likeliest_whatever_the_number_of_slots(model: xq.Model, slots: int, number: int) -> None:
    asked = requests(number)
    assert_likeliest(model, asked, list(prepare(model, Options(EXACT, slots=slots)).answers(asked)))


def test_quantized_slots_are_refilled_across_flushes(model: xq.Model) -> None:
    """Sequences of up to 310 tokens in two slots: blocks that a finished one left behind are not read."""
    long = [int(t) for t in np.random.default_rng(1).integers(259, 500, 290)]
    asked = [Request(long[:n], new, stop_ids=[]) for n, new in ((290, 20), (70, 30), (250, 10), (110, 25), (120, 12))]

    def answers(requests: list[Request]) -> list[Completion]:
        """Of an engine whose slots nobody had before."""
        engine = Engine(model, Options("xquant:4", 64), slots=2, tokens=310)
        ids, done = [engine.submit(request) for request in requests], {}
        while engine.busy:
            done |= {p.id: p.completion for p in engine.step() if p.completion is not None}
        return [done[id] for id in ids]

    for got, request in zip(answers(asked), asked, strict=True):
        (alone,) = answers([request])
        assert got.tokens == alone.tokens
        np.testing.assert_allclose(got.logprobs, alone.logprobs, atol=0.1)  # codes on the edge may round otherwise


def test_chunked_prompts_and_short_ones_side_by_side(model: xq.Model) -> None:
    long = [int(t) for t in np.random.default_rng(2).integers(259, 500, 150)]
    asked = [Request(p, 9, stop_ids=[]) for p in (STARTS[0], long, STARTS[1], long[:70], long[:64], [5])]
    answers = list(prepare(model, Options(EXACT, 32, slots=2)).answers(asked))
    assert_likeliest(model, asked, answers)


def test_a_sample_depends_on_its_seed_and_not_on_its_slot(model: xq.Model) -> None:
    """Four requests in two slots; `generate` answers the prompts two at a time, up to the longest limit."""
    asked = requests(4, sampling=xq.Sampling(1.1, temperature=0.9, top_p=0.9), stop=["self", "("])
    answers = {a.index: a.completion for a in prepare(model, Options(EXACT, slots=2)).answers(asked)}
    alike = {"sampling": asked[0].sampling, "stop": asked[0].stop, "max_new_tokens": 60, "cache": EXACT}
    expected: list[Completion] = []
    for pair in (asked[:2], asked[2:]):
        expected += xq.generate(model, [r.prompt for r in pair], seed=[r.seed or 0 for r in pair], **alike).results
    for index, (whole, request) in enumerate(zip(expected, asked, strict=True)):
        got, limit = answers[index], request.max_new_tokens
        assert got is not None
        assert (got.prompt, got.tokens) == (whole.prompt, whole.tokens[:limit])
        np.testing.assert_allclose(got.logprobs, whole.logprobs[:limit], atol=1e-4)
        ended = len(whole.tokens) <= limit
        assert got.finish_reason == (whole.finish_reason if ended else "length")
        assert got.text == whole.text if ended else whole.text.startswith(got.text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert {a.finish_reason for a in answers.values() if a} == {"stop", "length"}


def test_refilling_slots_compiles_nothing(model: xq.Model) -> None:
    """13 prompts of many lengths and options through two slots: after the first answer no program is new."""
    asked = requests(13)
    asked[5] = dataclasses.replace(asked[5], sampling=xq.Sampling(1.2, 0.7, top_k=9), stop=["x"], logprobs=3)
    answers = prepare(model, Options(EXACT, slots=2)).answers(asked)
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
    asked = [Request(STARTS[0], 90, stop_ids=[]), *(Request(STARTS[1], 8) for _ in range(10))]
    finished = [answer.index for answer in prepare(model, Options(EXACT, slots=2)).answers(asked)]
    assert finished[-1] == 0


def test_memory_decides_the_slots_and_is_kept(model: xq.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences first and few at once; then a cache of smaller slots, and more of them."""
    sizes, memory = [], 50_000_000

    def noted(cache_config: CacheConfig, config: xq.ModelConfig, **sizes_asked: int) -> xq.Cache:
        cache = allocate(cache_config, config, **sizes_asked)
        if not isinstance(cache.lengths, jax.core.Tracer):
            sizes.append((cache.lengths.shape[0], cache.capacity, cache_bytes(cache).total))
        return cache

    monkeypatch.setattr("xquant_jax.generation.runner.allocate", noted)
    long = [int(t) for t in np.random.default_rng(3).integers(259, 500, 600)]
    asked = [Request(long[-n:], 4, stop_ids=[]) for n in (600, 60, 560, 90, 540, 100, 30, 70)]
    answers = list(prepare(model, Options(EXACT, 256, memory=memory)).answers(asked))
    (few, large, one), (many, small, other) = sizes
    assert_likeliest(model, asked, answers)
    assert few < many
    assert large > 600 > small
    assert max(one, other) < memory


def test_answers_to_a_prompt_are_fed_together(model: xq.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four to each of three prompts in four slots: no prompt is fed more than twice, and no slot waits for the last."""
    fed, feed = [], Runner.feed

    def watched(runner: Runner, arrivals: Any, *others: Any) -> Any:
        fed.extend(len(arrival.slots) for arrival in arrivals)
        return feed(runner, arrivals, *others)

    monkeypatch.setattr(Runner, "feed", watched)
    tokens = [int(t) for t in np.random.default_rng(5).integers(259, 500, 140)]
    sampling = xq.Sampling(temperature=1.0)
    asked = [Request([i, *tokens], 6 + 9 * i, i, sampling, n=4) for i in range(3)]
    answers = {answer.index: answer for answer in prepare(model, Options(EXACT, 128, slots=4)).answers(asked)}
    assert sum(fed) == 12
    assert min(fed) >= 2
    assert [len({one.text for one in answers[i].completions}) for i in range(3)] == [4, 4, 4]


def test_what_is_kept_for_later_prompts_fits_into_the_memory_that_is_left(model: xq.Model) -> None:
    """Prompts that begin alike: with room for it a later one is not fed what an earlier one was, without it is."""
    tokens = [int(t) for t in np.random.default_rng(6).integers(259, 500, 200)]
    asked = [Request([*tokens, i], 60, stop_ids=[]) for i in range(3)]
    (refused, *_) = prepare(model, Options(EXACT, 128, memory=1)).answers(asked)
    least = int(re.findall(r"a cache of (\d+) bytes", str(refused.error))[0])
    cached = []
    for memory in (least, 10 * least):
        answers = prepare(model, Options(EXACT, 128, memory=memory)).answers(asked)
        cached.append(sorted(answer.completions[0].cached_tokens for answer in answers))
    assert cached == [[0, 0, 0], [0, 128, 128]]


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
