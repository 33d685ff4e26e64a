"""Lines of prompts as people have them: what they ask for, and which columns are left or kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import xquant_jax as xq
from tests.xquant_jax.generation.conftest import EXACT
from xquant_jax.cli import main, options
from xquant_jax.generation.answer import Answer, Completion
from xquant_jax.generation.batch_lines import Line, parse_prompts, unknown_columns
from xquant_jax.generation.prompts import Chat
from xquant_jax.generation.request import Request

DEFAULT = Request("", 9, seed=3, sampling=xq.Sampling(1.1, temperature=0.7, top_p=0.9))


def parsed(*entries: dict[str, Any], default: Request = DEFAULT) -> list[Line]:
    return parse_prompts("".join(json.dumps(entry) + "\n" for entry in entries).encode(), default)


def asked(**fields: Any) -> Request:
    (line,) = parsed({"prompt": "x", **fields})
    assert line.request is not None, line.error
    return line.request


def error(**fields: Any) -> str:
    (line,) = parsed({"prompt": "x", **fields})
    assert line.request is None
    return str(line.error)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": None}, {}),
        ({"max_tokens": None, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"stop": "\n"}, {"stop": ["\n"]}),
        ({"stop": ["a", "b"], "stop_token_ids": [7]}, {"stop": ["a", "b"], "stop_ids": [7]}),
        ({"ignore_eos": True}, {"stop_ids": []}),
        ({"ignore_eos": False, "stop_ids": [5]}, {"stop_ids": [5]}),
        ({"n": 3, "seed": 0, "min_tokens": 2}, {"n": 3, "seed": 0, "min_tokens": 2}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": 2}, {"logprobs": 2}),
        ({"logprobs": False}, {}),
        ({"add_special_tokens": False}, {"add_special_tokens": False}),
        ({"speculate": False}, {"speculate": False}),
        ({"speculate": None}, {}),
        ({"model": "any", "stream": False, "user": "me", "logit_bias": {}, "best_of": 1, "tool_choice": None}, {}),
    ],
)
def test_fields_by_the_names_that_people_have_for_them(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert asked(**fields) == dataclasses.replace(DEFAULT, prompt="x", **expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, DEFAULT.sampling),
        ({"top_p": 0.5}, xq.Sampling(1.1, temperature=0.7, top_p=0.5)),
        ({"temperature": 0}, xq.Sampling(1.1, temperature=0)),
        ({"temperature": 0, "top_p": 0.95, "top_k": 5}, xq.Sampling(1.1, temperature=0)),
        ({"top_k": -1, "presence_penalty": 0.5}, xq.Sampling(1.1, 0.7, -1, 0.9, presence_penalty=0.5)),
    ],
)
def test_sampling_of_a_line_stands_over_that_of_the_run(fields: dict[str, Any], expected: xq.Sampling) -> None:
    assert asked(**fields).sampling == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias={'5': 1} is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"extra_body": {"top_k": 5}}, "extra_body={'top_k': 5} is not supported"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_new_tokens is given twice, as 5 and as 6"),
        ({"n": 1.5}, "n=1.5 is not a whole number"),
        ({"ignore_eos": "yes"}, "ignore_eos='yes' is not true or false"),
        ({"speculate": "lookup:4"}, "speculate='lookup:4' is not true or false"),
        ({"ignore_eos": True, "stop_ids": [5]}, "ignore_eos and stop_ids are both given"),
        ({"messages": []}, "one of prompt, tokens and messages"),
        ({"tools": []}, "tools is for messages"),
    ],
)
def test_what_cannot_be_honoured_is_the_error_of_its_line(fields: dict[str, Any], message: str) -> None:
    assert message in error(**fields)


def test_lines_of_openais_batches() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 7, "tools": [{"type": "f"}]}
    body |= {"chat_template_kwargs": {"enable_thinking": False}, "speculate": False}
    chat, text, wrong, broken = parsed(
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 2]}},
        {"custom_id": "c", "url": "/v1/embeddings", "body": {"input": "x"}},
        {"custom_id": "d", "body": "x"},
    )
    assert chat.request == dataclasses.replace(
        DEFAULT,
        prompt=Chat(body["messages"], [{"type": "f"}], {"enable_thinking": False}),
        max_new_tokens=7,
        speculate=False,
    )
    assert text.request is not None
    assert (text.request.prompt, text.identity) == ([1, 2], {"custom_id": "b"})
    assert "url '/v1/embeddings' is not supported" in str(wrong.error)
    assert "body is a JSON str" in str(broken.error)
    assert broken.record() == {"line": 4, "custom_id": "d", "error": broken.error}


def test_a_column_that_is_called_body_is_one_where_there_is_a_prompt() -> None:
    (line,) = parsed({"prompt": "x", "body": "of a letter"})
    assert (line.columns, line.error) == ({"body": "of a letter"}, None)


def test_numbers_that_json_lacks_matter_only_where_they_are_written() -> None:
    text = b'{"prompt": "x", "score": NaN}\n{"prompt": "x", "temperature": NaN}'
    left, hot = parse_prompts(text, DEFAULT)
    assert left.error is None
    assert hot.request is not None  # and refused where it is checked
    (kept, _) = parse_prompts(text, DEFAULT, keep=True)
    assert "holds a number that JSON does not have" in str(kept.error)


def test_columns_that_mean_nothing_are_kept_where_that_is_asked() -> None:
    lines = parsed({"prompt": "x", "question": "why?", "label": 3}, {"prompt": "y", "label": None})
    assert unknown_columns(lines, keep=True) == ["label", "question"]
    answer = Answer(0, (Completion("x", "t", [1], [-1.0], "length", 3),))
    plain = {"line": 1, "text": "t", "tokens": [1], "logprobs": [-1.0], "finish_reason": "length", "seed": 3}
    plain |= {"cached_tokens": 0}
    assert lines[0].record(answer) == plain
    assert lines[0].record(answer, keep=True) == {**plain, "question": "why?", "label": 3}
    with pytest.raises(xq.ConfigError, match="columns text cannot be kept"):
        unknown_columns(parsed({"prompt": "x", "text": "old"}), keep=True)


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    (line,) = parse_prompts(b'\xef\xbb\xbf{"prompt": "x"}\n', DEFAULT)
    assert line.request == dataclasses.replace(DEFAULT, prompt="x")


def test_blank_lines_count_but_ask_for_nothing() -> None:
    text = b'\r\n{"prompt": "a"}\r\n\n  \n{"prompt": "b"}\n'
    assert [line.number for line in parse_prompts(text, DEFAULT)] == [2, 5]


def test_the_command_warns_once_of_columns_and_carries_them(
    model: xq.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(options, "load", lambda *_, **__: model)
    asked, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    asked.write_text('{"prompt": "import", "topic": 1}\n{"prompt": "class", "topic": "b\\t:x:"}\n')
    command = ["batch", "demo", str(asked), str(results), "--cache", EXACT, "--max-new-tokens", "2"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert said.count("warning: columns of the prompts that mean nothing here are left: topic") == 1
    assert main([*command, "--keep"]) == 2  # of another run
    results.unlink()
    assert main([*command, "--keep"]) == 0
    assert "warning" not in capsys.readouterr().err
    written = {r["line"]: r["topic"] for r in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    assert written == {1: 1, 2: "b\t:x:"}
