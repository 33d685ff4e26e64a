"""Features meet: what requests share, drafts, reused slots, cancelled requests, stop strings, every cache method.

Every pair of two features' values stands in one of the cells, every method in one; with `XQUANT_EXHAUSTIVE=1` every
method with every way to draft and to share. In each a few requests go through one engine, and every answer is the one
that the request gets alone, plainly, in a cache of its own. All models have a layer that attends to all tokens and one
with a sliding window.
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import random_tokens, tiny_config
from tests.xquant_jax.generation.conftest import EXACT, tiny_model
from xquant_jax.cache.config import CacheConfig
from xquant_jax.calibration.calibrate import calibrate
from xquant_jax.generation.answer import Completion
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.prefix import prefill
from xquant_jax.generation.request import CheckedRequest, Options, Repeats, Request, checked
from xquant_jax.generation.runner import Runner
from xquant_jax.generation.sharing import Sharing
from xquant_jax.model.calibration_file import FILE, Calibration
from xquant_jax.numerics.packing import BLOCK

EXHAUSTIVE = os.environ.get("XQUANT_EXHAUSTIVE") == "1"

METHODS = {
    EXACT: "given*2 found none*2",
    "bf16": "none found*2 given",
    "int8": "none given*2 found",
    "fp8": "none found given*2",
    "kivi:4": "none given found*2",
    "kvquant:4": "none found*2 given",
    "xquant:4": "found*2 none given",
    "xquant:4,basis=joint": "none given*2 found",
    "xquant:8": "none found given*2",
    "xquant-cl:4": "none given found*2",
}
"""Where all cells run, what the requests of each method's begin with, without drafts, with drafts from the text, and
from the window; *2: answers to the same prompt share its blocks."""

FEATURES = {
    "method": tuple(METHODS),
    "speculate": (None, "lookup:3,min=1", "window:3,blocks=1"),
    "prefix": ("none", "given", "found"),
    "samples": (1, 2),
    "ragged": (True, False),
    "stop": (True, False),
    "cancel": (True, False),
    "reused": (True, False),
}

CHUNK, SLOTS, NEW, LONGEST, COMMON = 128, 3, 36, 300, 133


@dataclasses.dataclass(frozen=True)
class Cell:
    """Which value each feature has.

    prefix: whether what the prompts begin with is given, or found by the engine
    samples: answers to a prompt that share its blocks
    ragged: whether prompts differ in length
    stop: whether some answers end with a string
    cancel: whether one of two answers to a prompt is cancelled on its way
    reused: whether there are more requests than slots
    """

    method: str
    speculate: str | None
    prefix: str
    samples: int
    ragged: bool
    stop: bool
    cancel: bool
    reused: bool

    @property
    def in_place(self) -> bool:
        """Whether prompts are fed straight into their slots, as `generate` does where it can."""
        return self.speculate is not None and self.prefix != "found" and self.samples == 1

    @property
    def pairs(self) -> set[tuple]:
        """Any two of its values; with its method only where all cells run."""
        values = [(name, v) for name, v in dataclasses.asdict(self).items() if EXHAUSTIVE or name != "method"]
        return set(itertools.combinations(values, 2))

    def __str__(self) -> str:
        flags = [name for name, value in dataclasses.asdict(self).items() if value is True]
        return "-".join([self.method, self.speculate or "plain", self.prefix, f"n={self.samples}", *flags])


def wanted() -> set[tuple]:
    """All pairs of two features' values; with methods only where all cells run."""
    features = [(name, values) for name, values in FEATURES.items() if EXHAUSTIVE or name != "method"]
    return {
        ((a, one), (b, two))
        for (a, ones), (b, twos) in itertools.combinations(features, 2)
        for one, two in itertools.product(ones, twos)
    }


def all_pairs() -> list[Cell]:
    """One cell for every method and more for the last until all pairs are there, or one for each way to draft of all.
    What is open makes as many pairs as it can that no cell before has, then rare ones."""
    flags = list(itertools.product((True, False), repeat=4))
    anything = [*itertools.product(FEATURES["speculate"], FEATURES["prefix"], FEATURES["samples"])]
    cells, times = [], Counter()

    def add(method: str, ways: Sequence[tuple]) -> None:
        possible = (Cell(method, *way, *own) for way, own in itertools.product(ways, flags))
        cells.append(max(possible, key=partial(gain, times)))
        times.update(cells[-1].pairs)

    for method, prefixes in METHODS.items():
        if EXHAUSTIVE:
            for speculate, prefix in zip(FEATURES["speculate"], prefixes.split(), strict=True):
                kind, _, samples = prefix.partition("*")
                add(method, [(speculate, kind, int(samples or 1))])
        else:
            add(method, anything)
    while wanted() - times.keys():
        add([*METHODS][-1], anything)
    return cells


def gain(times: Counter[tuple], cell: Cell) -> tuple[int, int]:
    """How many pairs a cell has that were in none yet, and how rare the others are. `times`: cells of every pair."""
    return len(cell.pairs - times.keys()), -sum(times[pair] for pair in cell.pairs)


CELLS = all_pairs()


def test_every_pair_of_values_stands_in_a_cell() -> None:
    assert wanted() <= set().union(*(cell.pairs for cell in CELLS))
    assert {cell.method for cell in CELLS} == set(METHODS)


@pytest.fixture(scope="module")
def models(demo: xq.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, xq.Model]:
    """The model of every method: multi-head for the cache that then stores X itself."""
    grouped, multi_head = (
        tiny_model(demo, tiny_config(num_kv_heads=heads, sliding_windows=(None, 90))) for heads in (2, 4)
    )
    grouped = calibrated(grouped, tmp_path_factory.mktemp("model") / FILE)
    return {method: multi_head if method == "xquant:8" else grouped for method in METHODS}


def calibrated(model: xq.Model, path: Path) -> xq.Model:
    """The model with what kvquant needs to know of it, found on random tokens."""
    ((method, _),) = CacheConfig.parse("kvquant:4").segments(model.config)
    (need,) = method.needs(model.config)
    (found,) = calibrate(model, random_tokens(model.config, 2, 256), [need])
    Calibration(model.fingerprint, {}, {}).add(need, found, "random tokens").write(path)
    return dataclasses.replace(model, calibration=path)


def asked(cell: Cell, model: xq.Model) -> list[CheckedRequest]:
    """The requests of a cell: all begin with the same tokens, the second and third have the same prompt, and where
    lengths differ the last but one goes on like one before it for two blocks."""
    tokens = np.random.default_rng(3).integers(1, model.config.vocab_size, 4 * LONGEST).reshape(4, LONGEST)
    tokens[:, :COMMON] = np.tile(tokens[0, :19], 7)
    tokens[3, :270] = tokens[2, :270]
    lengths = (135, 246, LONGEST, 290) if cell.ragged else (246, 246, 246, 246)
    one, two, three, four = ([int(t) for t in row[:length]] for row, length in zip(tokens, lengths, strict=True))
    requests = [
        Request(one, NEW, 1, stop_ids=[]),
        Request(two, NEW, 2, xq.Sampling(temperature=0.8, top_k=20), stop_ids=[], n=2),
        Request(three, NEW, 3, stop_ids=[], logprobs=3),
        Request(four, 20, 4, xq.Sampling(1.2, temperature=0.9)),
        Request(one, NEW, 5, xq.Sampling(temperature=1.0), stop_ids=[]),
    ][: 5 if cell.reused else 2]
    repeats = Repeats()
    return [one for request in requests for one in repeats.of(checked(model, request))]


@pytest.fixture(scope="module")
def alone() -> Callable[[Cell, xq.Model, CheckedRequest], Completion]:
    """What a request is answered by itself, in a fresh cache."""
    found: dict[tuple, Completion] = {}

    def answer(cell: Cell, model: xq.Model, request: CheckedRequest) -> Completion:
        key = cell.method, str(request)
        if key not in found:
            engine = Engine(model, Options(cell.method, CHUNK), slots=SLOTS, tokens=LONGEST + NEW)
            engine.compile([as_long_as_any(request)])
            engine.submit(request)
            (found[key],) = finished(engine).values()
        return found[key]

    return answer


def as_long_as_any(request: CheckedRequest) -> CheckedRequest:
    """One for which programs are compiled that feed all."""
    return dataclasses.replace(request, tokens=[1] * LONGEST)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_answer_is_that_of_its_request_alone(
    cell: Cell,
    models: dict[str, xq.Model],
    alone: Callable[[Cell, xq.Model, CheckedRequest], Completion],
) -> None:
    model = models[cell.method]
    requests = asked(cell, model)
    if cell.stop:
        requests = [dataclasses.replace(r, stop=(alone(cell, model, r).text[12:14],)) for r in requests]
    prefix = None
    if cell.prefix == "given":
        prefix = prefill(model, requests[0].tokens[:COMMON], cache=cell.method, prefill_chunk=CHUNK)
    sharing = Sharing(prefix, min(len(request.tokens) for request in requests), found=6 * (cell.prefix == "found"))
    if cell.samples > 1:
        sharing = dataclasses.replace(sharing, samples=cell.samples, prompts=2, tokens=LONGEST)
    options = Options(cell.method, CHUNK, speculate=cell.speculate)
    engine = Engine(model, options, slots=SLOTS, tokens=LONGEST + NEW, in_place=cell.in_place, sharing=sharing)
    engine.compile([as_long_as_any(requests[0])])
    ids = [engine.submit(request) for request in requests]
    if cell.cancel:
        news = {}
        while ids[1] not in news:
            news = {progress.id: progress for progress in engine.step(limit=5)}
        assert news[ids[1]].completion is None
        assert engine.cancel(ids.pop(1))
        requests.pop(1)
    done = finished(engine)
    assert sorted(done) == ids
    assert any(one.cached_tokens for one in done.values()) == (cell.prefix != "none")
    if cell.speculate and not cell.stop:  # an answer that stops early may have had no draft that was right
        assert any(one.speculation is not None and one.speculation.accepted for one in done.values())
    assert any(one.finish_reason == "stop" for one in done.values()) or not cell.stop
    for id, request in zip(ids, requests, strict=True):
        compare(done[id], alone(cell, model, request), 1e-5 if cell.method == EXACT else 4e-3)


def finished(engine: Engine) -> dict[int, Completion]:
    """All answers to what an engine has been asked."""
    done = {}
    while engine.busy:
        for progress in engine.step(limit=9):
            if progress.completion is not None:
                assert progress.id not in done
                done[progress.id] = progress.completion
    return done


def compare(one: Completion, other: Completion, tolerance: float) -> None:
    """The same tokens, and log-probabilities within a share of their range."""
    assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=tolerance * max(1, np.ptp(other.logprobs)))


@pytest.mark.slow
@pytest.mark.parametrize("place", [33_000, 66_000])
def test_drafts_change_no_answer_where_positions_are_high(models: dict[str, xq.Model], place: int) -> None:
    """Behind a history of so many random tokens, more than 16 bits count."""
    model = models["xquant:4"]
    prompt = random_tokens(model.config, 25).tolist() * 4
    answers = []
    for speculate in FEATURES["speculate"]:
        engine = Engine(model, Options("xquant:4", CHUNK, speculate=speculate), slots=1, tokens=66_300)
        engine.submit(Request(prompt, NEW, stop_ids=[]))
        engine.step(limit=1)
        put_history_before(engine._runner, place)
        answers += finished(engine).values()
        counts = answers[-1].speculation
        assert speculate is None or counts.accepted > 0
    for answer in answers[1:]:
        compare(answer, answers[0], 4e-3)


def put_history_before(runner: Runner, tokens: int) -> None:
    """Puts so many random tokens, in whole blocks, before the one sequence, which has none in blocks yet."""
    rng, blocks = np.random.default_rng(0), tokens // BLOCK

    def drawn(a: jax.Array) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, jnp.iinfo(a.dtype).max, a.shape, a.dtype))
        return jnp.asarray(rng.uniform(0, 0.1, a.shape), a.dtype)

    cache = runner.cache
    segments = tuple(dataclasses.replace(s, history=jax.tree.map(drawn, s.history)) for s in cache.segments)
    lengths, history_blocks = cache.lengths + BLOCK * blocks, cache.history_blocks + blocks
    runner.cache = dataclasses.replace(cache, segments=segments, lengths=lengths, history_blocks=history_blocks)
    text = jnp.roll(runner.slots.text, BLOCK * blocks, axis=1)
    runner.slots = dataclasses.replace(runner.slots, text=text)
