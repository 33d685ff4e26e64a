"""What a sampled answer depends on: its seed, its prompt, and which of several answers to the prompt it is."""

import itertools
import json
from pathlib import Path

import pytest

import xquant_jax as xq
from tests.xquant_jax.generation.conftest import EXACT, STARTS
from xquant_jax.cli import main, options
from xquant_jax.generation.batch import prepare
from xquant_jax.generation.request import Options, Request

HOT = xq.Sampling(temperature=1.0)


def tokens_of(generation: xq.Generation) -> list[list[int]]:
    return [result.tokens for result in generation.results]


def test_prompts_of_one_seed_have_draws_of_their_own(model: xq.Model) -> None:
    """32 prompts whose next token has nearly the same distribution: were the draws the same, so were the tokens."""
    alike = {"cache": EXACT, "sampling": HOT, "seed": 3, "max_new_tokens": 1}
    prompts = [[7 + i, *model.tokenizer.encode("import ")] for i in range(32)]
    fours = [prompts[i : i + 4] for i in range(0, 32, 4)]
    first, again = ([t for four in fours for t in tokens_of(xq.generate(model, four, **alike))] for _ in range(2))
    assert first == again
    assert len(set(map(tuple, first))) > 8


def test_answers_to_one_prompt_differ_and_do_not_depend_on_other_prompts(model: xq.Model) -> None:
    alike = {"cache": EXACT, "sampling": HOT, "seed": 5, "max_new_tokens": 12}
    four = tokens_of(xq.generate(model, [STARTS[0]] * 4, **alike))
    assert len({tuple(tokens) for tokens in four}) == 4
    assert tokens_of(xq.generate(model, STARTS[0], n=4, **alike)) == four
    mixed = xq.generate(model, [STARTS[1], STARTS[0], STARTS[2], STARTS[0]], **alike)
    assert tokens_of(mixed)[1::2] == four[:2]
    streamed: dict[int, list] = {}
    for token in xq.stream(model, STARTS[0], n=4, **alike):
        streamed.setdefault(token.index, []).append(token.token)
    assert [streamed[i] for i in range(4)] == four


def test_n_answers_of_several_prompts_follow_each_other(model: xq.Model) -> None:
    results = xq.generate(model, list(STARTS[:2]), cache=EXACT, n=2, sampling=HOT, max_new_tokens=3).results
    assert [result.prompt for result in results] == [STARTS[0]] * 2 + [STARTS[1]] * 2


def test_without_a_seed_one_is_drawn_and_told(model: xq.Model) -> None:
    """Two draws of 31 bits are the same once in two thousand million."""
    one, other = (xq.generate(model, STARTS[0], sampling=HOT, max_new_tokens=12) for _ in range(2))
    assert one.results[0].seed != other.results[0].seed
    again = xq.generate(model, STARTS[0], sampling=HOT, seed=one.results[0].seed, max_new_tokens=12)
    assert tokens_of(again) == tokens_of(one)
    told = json.loads(json.dumps(one.to_json()))
    assert told["results"][0]["seed"] == one.results[0].seed


def test_a_batch_gives_the_answers_of_generate_whatever_was_answered_before(model: xq.Model) -> None:
    """Repeats are counted in the order of the file, also those that a start before has answered."""
    asked = [Request(STARTS[i], 6, seed=2, sampling=HOT, n=n) for i, n in ((0, 1), (1, 1), (0, 2))]
    batch = prepare(model, Options(EXACT, slots=2))
    whole = {answer.index: [c.tokens for c in answer.completions] for answer in batch.answers(asked)}
    prompts = [STARTS[i] for i in (0, 1, 0, 0)]
    expected = tokens_of(xq.generate(model, prompts, cache=EXACT, sampling=HOT, seed=2, max_new_tokens=6))
    assert [*itertools.chain(*(whole[i] for i in range(3)))] == expected
    rest = {answer.index: [c.tokens for c in answer.completions] for answer in batch.answers(asked, answered={0, 1})}
    assert rest == {2: whole[2]}


def test_a_restart_of_a_batch_goes_on_with_the_seed_it_has_drawn(
    model: xq.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(options, "load", lambda *_, **__: model)
    asked, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    asked.write_text('{"prompt": "import"}\n{"prompt": "import"}\n{"prompt": "import", "n": 2}\n')
    command = ["batch", "demo", str(asked), str(results), "--cache", EXACT, "--slots", "2", "--max-new-tokens", "8"]
    assert main([*command, "--temperature", "1"]) == 0
    said = capsys.readouterr().err
    whole = results.read_bytes()
    seed = json.loads(results.with_name("results.jsonl.run").read_text())["seed"]
    assert f"temperature 1.0, seed {seed}" in said
    lines = whole.splitlines(keepends=True)
    results.write_bytes(lines[0])
    assert main([*command, "--temperature", "1"]) == 0
    by_line = [{r["line"]: r for r in map(json.loads, text.splitlines())} for text in (whole, results.read_bytes())]
    for line in (1, 2, 3):
        samples = [[s["tokens"] for s in found[line].get("samples", [found[line]])] for found in by_line]
        assert samples[0] == samples[1]
    answers = [tuple(s["tokens"]) for r in by_line[0].values() for s in r.get("samples", [r])]
    assert len(set(answers)) == 4
    assert main([*command, "--temperature", "1", "--seed", str(seed + 1)]) == 2
