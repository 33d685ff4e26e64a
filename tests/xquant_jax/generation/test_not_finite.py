"""Logits that are not finite end their own answer, with an error; nothing of them reaches another one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import xquant_jax as xq
from tests.checkpoints import write_checkpoint
from xquant_jax.cli import main, options
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.request import Options, Request

BAD = 13
MESSAGE = "logits of token 1 of the answer are not finite in float32"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> xq.Model:
    """A model that overflows wherever token BAD stands."""
    model = xq.load(write_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=64))
    embed = model.params["embed"]["embedding"].at[BAD].set(jnp.inf)
    return dataclasses.replace(model, params={**model.params, "embed": {"embedding": embed}}, stop_ids=())


LONG = [1 + i % 11 for i in range(150)]  # a block and a window


@pytest.mark.parametrize(
    ("cache", "in_place", "slots"),
    [("xquant:4", True, 2), ("xquant-cl:4,predict=paper", False, 1)],
)
def test_the_next_in_the_slot_and_the_neighbours_are_answered_as_if_it_had_not_been(
    damaged: xq.Model, cache: str, in_place: bool, slots: int
) -> None:
    good = [Request([*LONG, 3], 6), Request([*LONG, 5, 6], 6), Request([*LONG, 4], 9)]
    bad = [Request([*LONG, BAD, 4], 6), Request([*LONG, BAD], 6)]

    def run(requests: list[Request]) -> list[Any]:
        engine = Engine(damaged, Options(cache), slots=slots, tokens=255, in_place=in_place)
        ids, done = [engine.submit(request) for request in requests], {}
        while engine.busy:
            done |= {p.id: p.completion for p in engine.step() if p.completion is not None}
        return [done[id] for id in ids]

    expected = [completion.tokens for request in good for completion in run([request])]
    mixed = run([bad[0], good[0], good[1], bad[1], good[2]])
    assert [mixed[i].tokens for i in (1, 2, 4)] == expected
    for i in (0, 3):
        assert (mixed[i].finish_reason, mixed[i].tokens, mixed[i].text) == ("error", [], "")
        assert MESSAGE in mixed[i].error


def test_generate_and_stream_say_so(damaged: xq.Model) -> None:
    with pytest.warns(xq.XQuantWarning, match=f"result 1 ended early: .*{MESSAGE}"):
        results = xq.generate(damaged, [[5, 6], [BAD]], max_new_tokens=3).results
    assert (results[0].finish_reason, results[0].error) == ("length", None)
    last = [token for token in xq.stream(damaged, [[5, 6], [BAD]], max_new_tokens=3) if token.index == 1]
    assert [(token.token, token.finish_reason) for token in last] == [(None, "error")]
    assert MESSAGE in str(last[0].error)


def test_a_token_that_the_model_says_itself_ends_the_answer_behind_it(damaged: xq.Model) -> None:
    first = xq.generate(damaged, [5, 6], max_new_tokens=1, stop_ids=[]).results[0].tokens[0]
    embed = damaged.params["embed"]["embedding"].at[first].set(jnp.nan)
    model = dataclasses.replace(damaged, params={**damaged.params, "embed": {"embedding": embed}})
    with pytest.warns(xq.XQuantWarning, match="token 2 of the answer"):
        (result,) = xq.generate(model, [5, 6], max_new_tokens=5).results
    assert (result.tokens, len(result.logprobs), result.finish_reason) == ([first], 1, "error")


def test_every_line_of_a_batch_gets_its_result_and_the_next_start_finds_them(
    damaged: xq.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(options, "load", lambda *_, **__: damaged)
    asked, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    lines = [{"tokens": [5]}, {"tokens": [BAD]}, {"tokens": [6], "n": 2}, {"tokens": [BAD, 3], "n": 2}]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["batch", "damaged", str(asked), str(results), "--slots", "1", "--max-new-tokens", "3"]
    for _ in range(2):
        assert main(command) == 1
        written = {r["line"]: r for r in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
        assert "error" not in written[1]
        assert MESSAGE in written[2]["error"]
        assert [len(sample["tokens"]) for sample in written[3]["samples"]] == [3, 3]
        assert MESSAGE in written[4]["error"]
        assert "2 of 4 lines could not be answered" in capsys.readouterr().err
    assert len(results.read_bytes().splitlines()) == 4


def test_the_command_exits_with_1(
    damaged: xq.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tokens = dataclasses.replace(damaged, tokenizer=letters())
    monkeypatch.setattr(options, "load", lambda *_, **__: tokens)
    assert main(["generate", "damaged", "--prompt", "m", "--prompt", "a", "--max-new-tokens", "2"]) == 1
    assert capsys.readouterr().err.count(MESSAGE) == 1
    assert main(["generate", "damaged", "--prompt", "m", "--max-new-tokens", "2", "--stream"]) == 1
    assert capsys.readouterr().err.count(MESSAGE) == 1


def letters() -> Any:
    """A tokenizer of small letters: `m` is BAD."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    from xquant_jax.model.tokenizer import Tokenizer

    backend = Backend(models.WordLevel({chr(96 + i): i for i in range(1, 27)} | {"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return Tokenizer(backend)
