"""Drafts change how many steps an answer takes, and nothing else of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xquant_jax as xq
from tests.checkpoints import write_checkpoint
from tests.conftest import random_tokens
from tests.xquant_jax.generation.conftest import EXACT, STARTS
from tests.xquant_jax.generation.test_chat import PLAIN, talk, with_template
from xquant_jax.cli import main, options
from xquant_jax.generation import batch, decode
from xquant_jax.generation.answer import Completion, Drafted
from xquant_jax.generation.generate import generate_requests, stream_requests
from xquant_jax.generation.request import Options, Request

LOOKUP, WINDOW = "lookup:3,min=1", "window:5"
CROSSES = Request("    def push(self, item):\n" * 11, 40, sampling=xq.Sampling(frequency_penalty=0.02), stop_ids=[])
MIXED = [  # of limits that cut drafts, ends of every kind, and whatever sampling there is
    Request(STARTS[0], 17, logprobs=3),
    Request(STARTS[1], 30, 1, xq.Sampling(1.2, 0.6, top_p=0.9), min_tokens=20, stop_ids=[*range(3), *range(259, 300)]),
    Request("x = [1, 2, 3, 4, 5, 6, " * 5, 70, 2, xq.Sampling(temperature=0.2, min_p=0.05), stop=["#  #  #  #  #"]),
    CROSSES,
    dataclasses.replace(CROSSES, speculate=False),
]
ATOL = 1e-4
"""Of log-probabilities: what rounding makes in float32."""


def assert_same(found: Completion, expected: Completion, atol: float = ATOL) -> None:
    assert (found.tokens, found.text, found.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=atol)


def counts(completion: Completion) -> Drafted:
    assert completion.speculation is not None
    return completion.speculation


@pytest.fixture(scope="module")
def plain(model: xq.Model) -> list[Completion]:
    """What MIXED gets without drafts."""
    generation = generate_requests(model, MIXED, Options(EXACT))
    assert generation.speculation is None
    assert [r.finish_reason for r in generation.results] == ["length", "stop", "stop", "length", "length"]
    return generation.results


@pytest.mark.parametrize("speculate", [LOOKUP, WINDOW])
def test_answers_are_those_without_drafts(model: xq.Model, plain: list[Completion], speculate: str) -> None:
    """Of unlike requests side by side, and to every token."""
    run = Options(EXACT, speculate=speculate)
    generation = generate_requests(model, MIXED, run)
    for found, expected, request in zip(generation.results, plain, MIXED, strict=True):
        assert_same(found, expected)
        assert [[token for token, _ in top] for top in found.top_logprobs or ()] == [
            [token for token, _ in top] for top in expected.top_logprobs or ()
        ]
        own = counts(found)
        assert 0 <= own.accepted <= own.drafted <= own.steps * 5
        made = 1 + own.steps + own.accepted
        assert made == len(found.tokens) if not request.stop else made >= len(found.tokens)
    assert counts(generation.results[3]).accepted > 10
    assert counts(generation.results[4]) == Drafted(39, 0, 0)
    assert generation.speculation == sum(map(counts, generation.results[1:]), counts(generation.results[0]))

    streamed = list(stream_requests(model, MIXED, run))
    for index, expected in enumerate(generation.results):
        own = [token for token in streamed if token.index == index]
        assert [token.token for token in own] == expected.tokens
        assert [token.logprob for token in own] == expected.logprobs
        assert "".join(token.text for token in own) == expected.text
        assert [token.finish_reason for token in own] == [*[None] * (len(own) - 1), expected.finish_reason]


def test_slots_that_are_refilled(model: xq.Model, plain: list[Completion]) -> None:
    """Where an answer ends while others go on, and the next prompt comes from a cache of its own."""
    answers = batch.prepare(model, Options(EXACT, slots=2, speculate=LOOKUP)).answers(MIXED)
    found = {answer.index: answer.completion for answer in answers}
    for index, (expected, request) in enumerate(zip(plain, MIXED, strict=True)):
        completion = found[index]
        assert completion is not None
        assert_same(completion, expected)
        assert (counts(completion).drafted > 0) == request.speculate


def test_a_conversation(model: xq.Model) -> None:
    """Its cache is kept from turn to turn, over a block; a turn that is closed amid accepted tokens ends there."""
    talking = with_template(model, PLAIN)
    request = Request("", 64, 3, xq.Sampling(1.2, 0.5, frequency_penalty=0.1), stop_ids=[])
    said = []
    for speculate in (None, LOOKUP):
        run = Options(EXACT, speculate=speculate)
        conversation = xq.Conversation(talking, request, run, context=255, system="x = 1\n" * 12)
        answers = talk(conversation, "def f(a):")
        closed = conversation.say("class A:")
        for _ in range(7):
            next(closed)
        closed.close()
        said.append((*answers, *talk(conversation, "import os"), conversation.messages, conversation.tokens))
    assert said[0] == said[1]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> xq.Model:
    """Random weights and no tokenizer; levels of kvquant that stand in for calibrated ones."""
    levels = jnp.tile(jnp.linspace(0, 1, 8) ** 1.2, (3, 1))
    monkeypatch.setattr(xq.Model, "calibrated", lambda *_: {"key": levels, "value": levels})
    return xq.load(write_checkpoint(tmp_path))


def answers_of_both(model: xq.Model, run: Options) -> list[tuple[Completion, Completion]]:
    """Of prompts of up to four blocks, with drafts and without in one run; all but one answer cross a block."""
    requests = [
        Request(random_tokens(model.config, length, seed=length).tolist(), 24, stop_ids=[], speculate=speculate)
        for length in (5, 120, 380, 511)
        for speculate in (True, False)
    ]
    results = generate_requests(model, requests, run).results
    return list(zip(results[::2], results[1::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "speculate"),
    [
        ("kvquant:3", "window:2,blocks=1"),
        ("xquant-cl:2,first=1@4,predict=latent", "window:15,blocks=1"),
    ],
)
def test_quantized_caches(small: xq.Model, cache: str, speculate: str) -> None:
    """What is rounded to bfloat16, or to codes, is the same, as these weights are smooth: float32's rounding seldom
    falls on an edge."""
    for found, expected in answers_of_both(small, Options(cache, 128, speculate=speculate)):
        assert_same(found, expected, atol=1e-5)
        assert counts(found).accepted > 0
        assert counts(expected) == Drafted(23, 0, 0)


def test_drafts_that_are_wrong_leave_nothing_behind(small: xq.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(text: jax.Array, last: jax.Array, speculation: Any) -> tuple[jax.Array, jax.Array]:
        newest = jnp.take_along_axis(text, last[:, None], axis=1)
        drafts = (newest * 7 + last[:, None] + jnp.arange(speculation.tokens)[None]) % 64
        return drafts, jnp.full(len(text), speculation.tokens)

    monkeypatch.setattr(decode, "from_text", wrong)  # before a program of these options is compiled
    for found, expected in answers_of_both(small, Options("xquant:4", 128, speculate="lookup:7,max=9")):
        assert_same(found, expected, atol=1e-5)
        assert counts(found).accepted < 5
        assert counts(found).drafted > 60


def test_what_is_told(model: xq.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of every answer, and of all; a batch may go on without drafts."""
    monkeypatch.setattr(options, "load", lambda *_, **__: model)
    asked, results, one = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl", tmp_path / "one.json"
    prompt = "    def push(self, item):\n" * 11
    lines = [{"prompt": prompt, "n": 2}, {"prompt": prompt, "speculate": False}]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    wishes = ["--cache", EXACT, "--ignore-eos", "--max-new-tokens", "40", "--frequency-penalty", "0.02", "--seed", "0"]
    command, drafting = ["batch", "demo", str(asked), str(results), *wishes, "--slots", "2"], ["--speculate", LOOKUP]
    assert main([*command, *drafting]) == 0
    told = capsys.readouterr().err
    both, without = sorted(map(json.loads, results.read_text("utf-8").splitlines()), key=lambda line: line["line"])
    assert [own["tokens"] for own in both["samples"]] == [without["tokens"]] * 2
    first, second = (Drafted(**own["speculation"]) for own in both["samples"])
    assert first == second
    assert without["speculation"] == {"steps": 39, "drafted": 0, "accepted": 0}
    together = first + second + Drafted(39, 0, 0)
    assert together.told() in told
    assert main(command) == 0
    assert together.told() in capsys.readouterr().err
    assert "speculate" not in json.loads(results.with_name("results.jsonl.run").read_text("utf-8"))

    assert main(["generate", "demo", "--prompt", prompt, *wishes, *drafting, "--json", str(one)]) == 0
    assert first.told() in capsys.readouterr().out
    written = json.loads(one.read_text("utf-8"))
    assert Drafted(**written["speculation"]) == Drafted(**written["results"][0]["speculation"]) == first
    assert first.tokens_per_step == 39 / first.steps


def test_no_steps_are_no_error() -> None:
    assert Drafted(0, 0, 0).told() == "drafts: 0 of 0 tokens accepted (0%), 0.00 tokens a step"


def test_what_cannot_be_honoured_is_a_clear_error(model: xq.Model) -> None:
    for wrong in ("lookup", "window:16"):
        with pytest.raises(xq.ConfigError, match="is not possible"):
            xq.generate(model, "Hi", speculate=wrong)
        with pytest.raises(xq.ConfigError, match="is not possible"):
            xq.stream(model, "Hi", speculate=wrong)
        with pytest.raises(xq.ConfigError, match="is not possible"):
            batch.prepare(model, Options(speculate=wrong))
