"""The engine under `generate`, `stream` and `batch`: online, every request by its own options, never mixed up."""

import threading
from collections.abc import Iterable

import jax
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import counted_compilations
from tests.xquant_jax.generation.conftest import EXACT, STARTS
from xquant_jax.generation import engine as engine_module
from xquant_jax.generation.answer import Completion
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.generate import generate_requests
from xquant_jax.generation.request import Options, Request

MIXED = [
    Request(STARTS[0], 12),
    Request(STARTS[1], 20, seed=1, sampling=xq.Sampling(temperature=0.9)),
    Request(STARTS[2], 9, seed=2, sampling=xq.Sampling(1.3, temperature=0.8, top_k=20, top_p=0.9)),
    Request(STARTS[3], 15, sampling=xq.Sampling(repetition_penalty=1.5), stop=["set"]),
    Request(STARTS[4], 7, seed=3, sampling=xq.Sampling(temperature=1.1, min_p=0.05), stop_ids=[5], logprobs=4),
    Request(STARTS[0], 18, stop_ids=list(range(2000, 2007)), logprobs=2),
]


def run(engine: Engine, requests: Iterable[Request] = ()) -> dict[int, Completion]:
    """Submits these and steps until nothing is on its way."""
    for request in requests:
        engine.submit(request)
    done = {}
    while engine.busy:
        done |= {p.id: p.completion for p in engine.step() if p.completion is not None}
    return done


def assert_same(one: Completion, other: Completion, atol: float = 1e-4) -> None:
    assert (one.prompt, one.text, one.tokens, one.finish_reason) == (
        other.prompt,
        other.text,
        other.tokens,
        other.finish_reason,
    )
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)


@pytest.fixture(scope="module")
def alone(model: xq.Model) -> list[Completion]:
    """Every request of MIXED answered by itself, exactly cached."""
    engine = Engine(model, Options(EXACT), slots=2, tokens=128)
    return [run(engine, [request])[i] for i, request in enumerate(MIXED)]


@pytest.mark.parametrize("in_place", [True, False])
def test_requests_of_different_options_in_one_batch_are_answered_as_if_alone(
    model: xq.Model, alone: list[Completion], in_place: bool
) -> None:
    together = run(Engine(model, Options(EXACT), slots=2, tokens=128, in_place=in_place), MIXED)
    for i, expected in enumerate(alone):
        assert_same(together[i], expected)
        assert (together[i].top_logprobs is None) == (MIXED[i].logprobs == 0)


def test_requests_of_different_options_share_a_quantized_cache(model: xq.Model) -> None:
    engine = Engine(model, Options(), slots=2, tokens=255, in_place=True)
    requests = [Request([7 + i, *range(300, 420)], 30, r.seed, r.sampling) for i, r in enumerate(MIXED[:2])]
    expected = [run(engine, [request])[i] for i, request in enumerate(requests)]
    together = generate_requests(model, requests, Options()).results
    for one, other in zip(together, expected, strict=True):
        assert_same(one, other, atol=0.02)


def test_other_options_compile_nothing(model: xq.Model) -> None:
    engine = Engine(model, Options(EXACT), slots=2, tokens=128)
    run(engine, [Request(start, 3) for start in STARTS[:2]])
    with counted_compilations() as compiled:
        run(engine, [Request(STARTS[0], 3), *(r for r in MIXED if len(r.prompt) <= len(STARTS[1]))])
    assert compiled == []


def test_the_likeliest_tokens_are_told_for_those_who_ask(model: xq.Model, alone: list[Completion]) -> None:
    answer = alone[5]
    assert answer.top_logprobs is not None
    for token, logprob, top in zip(answer.tokens, answer.logprobs, answer.top_logprobs, strict=True):
        assert [len(pair) for pair in top] == [2, 2]
        assert top[0] == (token, pytest.approx(logprob, abs=1e-5))  # greedy
        assert top[0][1] >= top[1][1]
    assert answer.to_json()["top_logprobs"] == answer.top_logprobs


def test_requests_may_come_at_any_time(model: xq.Model, alone: list[Completion]) -> None:
    """One slot short, submitted one by one between steps of three tokens; progress joins to the answer."""
    engine = Engine(model, Options(EXACT), slots=2, tokens=128)
    waiting, told, done = list(MIXED), {}, {}
    while waiting or engine.busy:
        if waiting:
            engine.submit(waiting.pop(0))
        for progress in engine.step(limit=3):
            assert len(progress.tokens) <= 3
            tokens, text = told.get(progress.id, ([], ""))
            told[progress.id] = tokens + progress.tokens, text + progress.text
            if progress.completion is not None:
                done[progress.id] = progress.completion
    for i, expected in enumerate(alone):
        assert_same(done[i], expected)
        assert told[i] == (expected.tokens, expected.text)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_cancelled_request_frees_its_slot_and_changes_no_other_answer(
    model: xq.Model, alone: list[Completion], in_place: bool
) -> None:
    engine = Engine(model, Options(EXACT), slots=2, tokens=128, in_place=in_place)
    kept, ended, queued, never = (engine.submit(MIXED[i]) for i in (0, 1, 3, 2))
    engine.step(limit=2)
    assert engine.cancel(ended)
    assert engine.cancel(never)
    assert not engine.cancel(ended)
    assert not engine.cancel(99)
    news = engine.step(limit=2)
    assert {progress.id for progress in news} == {kept, queued}  # the slot is taken at once
    done = run(engine)
    assert done.keys() == {kept, queued}
    assert_same(done[kept], alone[0])
    assert_same(done[queued], alone[3])


@pytest.mark.parametrize("in_place", [True, False])
def test_an_interrupted_step_goes_on_where_it_was(
    model: xq.Model, alone: list[Completion], in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives while the host waits for the device: every time once."""
    wait, interrupted = jax.device_get, []

    def interrupt(arrays: object) -> object:
        if len(interrupted) % 2 == 0:
            interrupted.append(True)
            raise KeyboardInterrupt
        interrupted.append(False)
        return wait(arrays)

    engine = Engine(model, Options(EXACT), slots=2, tokens=128, in_place=in_place)
    for request in MIXED:
        engine.submit(request)
    monkeypatch.setattr(engine_module.jax, "device_get", interrupt)
    done = {}
    while engine.busy:
        try:
            done |= {p.id: p.completion for p in engine.step(limit=4) if p.completion is not None}
        except KeyboardInterrupt:
            continue
    assert interrupted.count(True) > 3
    for i, expected in enumerate(alone):
        assert_same(done[i], expected)


def test_engines_in_two_threads_do_not_mix(model: xq.Model, alone: list[Completion]) -> None:
    engines = [Engine(model, Options(cache), slots=2, tokens=128) for cache in (EXACT, "xquant:4")]
    quantized = run(Engine(model, Options("xquant:4"), slots=2, tokens=128), MIXED)
    done: list[dict[int, Completion]] = [{}, {}]

    def work(number: int) -> None:
        done[number] = run(engines[number], MIXED)

    threads = [threading.Thread(target=work, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert_same(done[0][i], expected)
        assert_same(done[1][i], quantized[i])


def test_a_request_that_cannot_be_honoured_raises_and_leaves_the_others_alone(
    model: xq.Model, alone: list[Completion]
) -> None:
    engine = Engine(model, Options(EXACT), slots=2, tokens=128)
    good = engine.submit(MIXED[0])
    with pytest.raises(xq.CacheFullError, match="holds 255 tokens per sequence, but prompt and new tokens need"):
        engine.submit(Request(STARTS[0], 300))
    with pytest.raises(xq.PromptError, match="the prompt is empty"):
        engine.submit(Request([]))
    assert_same(run(engine)[good], alone[0])
