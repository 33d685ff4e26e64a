"""An engine that everything happens to in any order: requests come, are cancelled, share and find blocks, are drafted.

`XQUANT_STATE_MACHINE=500` runs so many histories instead of a few.
"""

import dataclasses
import os
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import xquant_jax as xq
from tests.conftest import tiny_config
from tests.xquant_jax.generation.conftest import EXACT, tiny_model
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.request import CheckedRequest, Options
from xquant_jax.generation.sharing import Sharing

CHUNK, SLOTS, LONGEST, NEW, STORED = 128, 3, 300, 30, 4

TOKENS = np.random.default_rng(5).integers(1, 61, (3, LONGEST)).tolist()

PROMPTS = (
    TOKENS[0][:130],
    TOKENS[0][:256],
    TOKENS[0],
    TOKENS[0][:256] + TOKENS[1][:10],
    TOKENS[0][:128] + TOKENS[1][:140],
    TOKENS[1][:20] * 13,
    TOKENS[2][:40],
)
"""Some begin with one or two blocks of others, one says the same again and again, one has no whole block."""

REQUESTS = st.builds(
    CheckedRequest,
    prompt=st.just("a prompt"),
    tokens=st.sampled_from(PROMPTS),
    max_new_tokens=st.sampled_from([1, 9, NEW]),
    sampling=st.sampled_from([xq.Sampling().checked(), xq.Sampling(temperature=0.7).checked()]),
    speculate=st.booleans(),
)


class History(RuleBasedStateMachine):
    """What may happen to an engine. `open`: the requests that are on their way, by id; `told`: tokens of all so far.

    make: an engine with three slots that nothing has happened to
    alone: the tokens that a request gets by itself
    """

    make: Callable[[], Engine]
    alone: Callable[[CheckedRequest], list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.make()
        self.open: dict[int, CheckedRequest] = {}
        self.told: dict[int, list[int]] = {}

    @rule(request=REQUESTS, times=st.sampled_from([1, 1, 2]))
    def submit(self, request: CheckedRequest, times: int) -> None:
        for repeat in range(times):
            one = dataclasses.replace(request, repeat=repeat)
            id = self.engine.submit(one)
            assert id == len(self.told)
            self.open[id], self.told[id] = one, []

    @precondition(lambda self: self.open)
    @rule(limit=st.integers(1, 20), hurry=st.booleans())
    def step(self, limit: int, hurry: bool) -> None:
        news = self.engine.step(limit, hurry=hurry)
        assert len({progress.id for progress in news}) == len(news)
        for progress in news:
            expected = self.alone(self.open[progress.id])
            tokens = self.told[progress.id]
            tokens += progress.tokens
            assert tokens == expected[: len(tokens)]
            if progress.completion is not None:
                assert progress.completion.tokens == tokens == expected
                del self.open[progress.id]

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.integers(0, len(self.told)))
        assert self.engine.cancel(id) == (self.open.pop(id, None) is not None)

    @precondition(lambda self: self.open)
    @rule()
    def drain(self) -> None:
        steps = 0
        while self.open:
            self.step(64, hurry=False)
            steps += 1
            assert steps < 1000
        assert not self.engine.busy

    @invariant()
    def no_slot_leaks(self) -> None:
        assert self.engine.free_slots == SLOTS - len(self.open)
        assert self.engine.busy == bool(self.open)

    @invariant()
    def every_place_of_the_store_is_free_or_one_block_s(self) -> None:
        found = self.engine._runner.found
        assert found is not None
        assert sorted([*found._numbers.values(), *found._free]) == list(range(STORED))

    def teardown(self) -> None:
        if self.open:
            self.drain()


@pytest.mark.slow
def test_answers_are_those_of_each_request_alone_whatever_happens(demo: xq.Model) -> None:
    model = tiny_model(demo, tiny_config(sliding_windows=(None, 90)))
    longest = CheckedRequest("", [1] * LONGEST)
    found: dict[str, list[int]] = {}
    plain = Engine(model, Options(EXACT, CHUNK), slots=1, tokens=LONGEST + NEW)
    plain._runner.reserve(longest)

    def make() -> Engine:
        sharing = Sharing(samples=2, prompts=2, tokens=LONGEST, found=STORED)
        options = Options(EXACT, CHUNK, speculate="lookup:2")
        engine = Engine(model, options, slots=SLOTS, tokens=127 + NEW, sharing=sharing)
        engine._runner.reserve(longest)
        return engine

    def alone(request: CheckedRequest) -> list[int]:
        whole = dataclasses.replace(request, max_new_tokens=NEW, speculate=True)
        if (key := str(whole)) not in found:
            plain.submit(whole)
            (progress,) = plain.step()
            assert progress.completion is not None
            found[key] = progress.tokens
        return found[key][: request.max_new_tokens]

    machine = type("Machine", (History,), {"make": staticmethod(make), "alone": staticmethod(alone)})
    examples = int(os.environ.get("XQUANT_STATE_MACHINE", "8"))
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        derandomize=examples == 8,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        database=None,
    )
    run_state_machine_as_test(machine, settings=settings)
