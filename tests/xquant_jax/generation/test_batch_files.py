"""`xquant batch`: what its files hold, and that a restart neither loses nor doubles a result."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import xquant_jax as xq
from tests.checkpoints import write_checkpoint
from xquant_jax.cli import main
from xquant_jax.cli.options import parse_bytes
from xquant_jax.generation.batch_files import Results
from xquant_jax.model.loading import DEMO
from xquant_jax.model.weights import weights_checksum

SETTINGS = {"cache": "xquant:4", "seed": 0}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with the tokenizer of the demo."""
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), layers=2, vocab_size=4096)
    shutil.copy(DEMO / "tokenizer.json", directory)
    return str(directory)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    starts = ("Once upon a time", "The big dog", "Tom", "One day Lily", "A girl")
    lines = [{"id": f"p{i}", "prompt": starts[i % 5], "max_new_tokens": 5 + 9 * i} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_every_prompt_gets_the_answer_of_generate(small: str, tmp_path: Path, capsys) -> None:
    asked, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    asked.write_text(
        '{"prompt": "Once upon a time", "id": 7}\n\n{"tokens": [1, 403, 407], "max_new_tokens": 3}\n'
        '{"prompt": "Tom", "seed": 5}',
        encoding="utf-8",
    )
    options = ["--cache", "bf16", "--slots", "2", "--max-new-tokens", "6", "--seed", "3", "--stop-id", "2"]
    options += ["--temperature", "0.8", "--top-k", "40"]
    assert main(["batch", small, str(asked), str(results), *options]) == 0
    written = {record["line"]: record for record in read(results)}
    model, sampling = xq.load(small), xq.Sampling(temperature=0.8, top_k=40)
    prompts: list[Any] = ["Once upon a time", [1, 403, 407], "Tom"]
    alike = {"cache": "bf16", "max_new_tokens": 6, "sampling": sampling, "stop_ids": [2]}
    expected = [xq.generate(model, [p], seed=s, **alike).results[0] for p, s in zip(prompts, (3, 3, 5), strict=True)]
    assert written.keys() == {1, 3, 4}
    assert written[1]["id"] == 7
    assert set(written[3]) == {"line", "text", "tokens", "logprobs", "finish_reason", "seed", "cached_tokens"}
    assert [written[n]["tokens"] for n in (1, 3, 4)] == [
        expected[0].tokens,
        expected[1].tokens[:3],
        expected[2].tokens,
    ]
    assert written[1]["text"] == expected[0].text
    assert "3 answers, 15 tokens" in capsys.readouterr().err


def test_killed_at_any_moment_it_goes_on_where_it_stopped(
    small: str, prompts: Path, tmp_path: Path, capsys, own_buckets: None
) -> None:
    """Killed as soon as there are results, then started again; the results equal those of a run that was let be."""
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    command = ["batch", small, str(prompts), "RESULTS", "--cache", "bf16", "--slots", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "xquant_jax", *(str(killed) if word == "RESULTS" else word for word in command)],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (killed.exists() and killed.read_bytes().count(b"\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = killed.read_bytes()
    finished = before.count(b"\n")
    assert 2 <= finished < 12
    for path in (killed, whole):
        assert main([str(path) if word == "RESULTS" else word for word in command]) == 0
    assert killed.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert f"{finished} of 12 lines have their results already" in capsys.readouterr().err
    by_line = [{r["line"]: (r["id"], r["tokens"], r["text"]) for r in read(path)} for path in (killed, whole)]
    assert by_line[0] == by_line[1]
    assert len(read(killed)) == len(by_line[0]) == 12
    unchanged = killed.read_bytes()
    assert main([str(killed) if word == "RESULTS" else word for word in command]) == 0
    assert killed.read_bytes() == unchanged


def test_malformed_lines_are_reported_with_their_number_and_the_rest_is_done(
    small: str, tmp_path: Path, capsys
) -> None:
    asked, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    errors = {
        1: (b'{"prompt": "cut of', "not JSON"),
        2: (b'["a list"]', "must be an object"),
        4: (b'{"id": "a"}', "one of prompt, tokens and messages"),
        5: (b'{"prompt": "x", "tokens": [1]}', "one of prompt, tokens and messages"),
        6: (b'{"prompt": 5}', "it must be a string"),
        7: (b'{"tokens": [1, "2"]}', "list of whole numbers"),
        8: (b'{"prompt": "x", "max_tokens": 5, "max_new_tokens": 6}', "max_new_tokens is given twice, as 5 and as 6"),
        9: (b'{"prompt": "x", "seed": true}', "seed=True is not a whole number"),
        10: (b'{"prompt": "\xff"}', "not UTF-8 text"),
        11: (b'{"prompt": "x", "id": "good"}', "id 'good' is that of line 3 too"),
        12: (b'{"prompt": ""}', "the prompt is empty"),
        13: (b'{"tokens": [6000]}', "token id 6000"),
        14: (b'{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens=0"),
        15: (b"[" * 100_000, "not JSON"),
        16: (b'{"prompt": "a \\ud800 b"}', "not valid Unicode"),
        17: (b'{"prompt": "x", "id": NaN}', "another of its columns holds a number that JSON does not have"),
        18: (b'{"prompt": "x", "id": "\\ud800"}', "another of its columns is not valid Unicode"),
        20: (b'{"prompt": "x", "temperature": "hot"}', "temperature='hot' is not a number"),
        21: (b'{"prompt": "x", "temperature": -1}', "temperature=-1.0 is not possible"),
        22: (b'{"prompt": "x", "top_k": 5}', "top_k has no effect at temperature 0"),
        23: (b'{"prompt": "x", "stop": 5}', "stop must be a string or a list of strings"),
        24: (b'{"prompt": "x", "stop_ids": [1.5]}', "stop_ids must be a list of whole numbers"),
        25: (b'{"prompt": "x", "stop_ids": [6000]}', "stop_ids holds token id 6000"),
        26: (b'{"prompt": "x", "logprobs": 21}', "logprobs=21 is not possible; choose from 0 to 20"),
        19: (b'{"prompt": "x", "max_new_tokens": 99999999999999999999}', "shorten them to 16,777,216"),
    }
    good = b'{"prompt": "Tom", "id": "good", "max_new_tokens": 3}'
    asked.write_bytes(b"\n".join(errors[n][0] if n in errors else good for n in range(1, 27)))
    for _ in range(2):  # the second run finds nothing to do and says the same
        assert main(["batch", small, str(asked), str(results), "--cache", "bf16"]) == 1
        reported = capsys.readouterr().err
        written = {record["line"]: record for record in read(results)}
        assert written.keys() == set(range(1, 27))
        assert len(read(results)) == 26
        assert len(written[3]["tokens"]) == 3
        for number, (_, message) in errors.items():
            assert message in written[number]["error"]
        assert "line 1: not JSON" in reported
        assert "25 of 26 lines could not be answered" in reported


def test_a_line_may_differ_from_the_options_in_everything_a_request_may_ask(small: str, tmp_path: Path) -> None:
    asked, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    said = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 4}
    lines = [{"tokens": [5, 6, 7]}, {"tokens": [5, 6, 7], **said, "logprobs": 2, "stop_ids": [], "stop": ["never"]}]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--cache", "bf16", "--max-new-tokens", "6", "--stop-id", "2"]
    assert main(["batch", small, str(asked), str(results), *options]) == 0
    written = {record["line"]: record for record in read(results)}
    model, seed = xq.load(small), said.pop("seed")
    plain = xq.generate(model, [[5, 6, 7]], cache="bf16", max_new_tokens=6, stop_ids=[2]).results[0]
    other = xq.generate(
        model, [[5, 6, 7]], cache="bf16", max_new_tokens=6, stop_ids=[], seed=seed, sampling=xq.Sampling(**said)
    ).results[0]
    assert (written[1]["tokens"], written[2]["tokens"]) == (plain.tokens, other.tokens)
    assert "top_logprobs" not in written[1]
    assert [len(top) for top in written[2]["top_logprobs"]] == [2] * 6


@pytest.fixture
def cut_results(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "results.jsonl"
    with Results.open(path, SETTINGS) as results:
        results.write({"line": 2, "text": "one"})
        results.write({"line": 1, "text": "zwölf\r\n"})
    return path, path.read_bytes()


def test_a_line_that_a_kill_cut_short_is_dropped_wherever_it_is_cut(cut_results: tuple[Path, bytes]) -> None:
    path, whole = cut_results
    first = whole.index(b"\n") + 1
    for end in range(1, len(whole) + 1):
        path.write_bytes(whole[:end])
        with Results.open(path, SETTINGS) as results:
            expected = {2, 1} if end == len(whole) else {2} if end >= first else set()
            assert results.done.keys() == expected
            for line in {1, 2} - expected:
                results.write({"line": line, "text": "again"})
        assert sorted(record["line"] for record in read(path)) == [1, 2]


@pytest.mark.parametrize("settings", [{"cache": "kivi:4", "seed": 0}, {"cache": "xquant:4"}, SETTINGS | {"more": 1}])
def test_results_of_another_run_are_refused_and_left_alone(cut_results: tuple[Path, bytes], settings) -> None:
    path, whole = cut_results
    with pytest.raises(xq.ConfigError, match=r"is from another run: \w+ was .* and is .* now; name another file"):
        Results.open(path, settings)
    assert path.read_bytes() == whole


def test_results_without_settings_and_lines_of_others_are_refused(cut_results: tuple[Path, bytes]) -> None:
    path, whole = cut_results
    path.write_bytes(b'{"text": "no line number"}\n' + whole)
    with pytest.raises(xq.ConfigError, match="line 1 was not written by a batch"):
        Results.open(path, SETTINGS)
    path.with_name("results.jsonl.run").unlink()
    with pytest.raises(xq.ConfigError, match=r"there is no results.jsonl.run that says what it holds"):
        Results.open(path, SETTINGS)


def test_two_processes_cannot_write_the_same_results(cut_results: tuple[Path, bytes]) -> None:
    path, _ = cut_results
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(xq.ConfigError, match="another process writes"):
            Results.open(path, SETTINGS)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--cache", "int8"], "cache"),
        (["--temperature", "0.5"], "sampling"),
        (["--max-new-tokens", "5"], "max_new_tokens"),
        (["--dtype", "bfloat16"], "weights"),
    ],
)
def test_a_restart_with_other_options_is_an_error(
    small: str, prompts: Path, tmp_path: Path, capsys, change: list[str], name: str
) -> None:
    prompts.write_text('{"prompt": "Tom", "max_new_tokens": 2}\n')
    command = ["batch", small, str(prompts), str(tmp_path / "results.jsonl")]
    assert main([*command, "--cache", "bf16"]) == 0
    assert main([*command, "--cache", "bf16", *change]) == 2
    assert f"is from another run: {name} was" in capsys.readouterr().err


def test_a_restart_with_other_prompts_is_an_error(small: str, prompts: Path, tmp_path: Path, capsys) -> None:
    prompts.write_text('{"prompt": "Tom", "max_new_tokens": 2}\n')
    command = ["batch", small, str(prompts), str(tmp_path / "results.jsonl"), "--cache", "bf16"]
    assert main(command) == 0
    prompts.write_text('{"prompt": "Tim", "max_new_tokens": 2}\n')
    assert main(command) == 2
    assert "is from another run: prompts was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("batch demo nowhere.jsonl results.jsonl", "nowhere.jsonl"),
        ("batch demo prompts.jsonl nowhere/results.jsonl", "there is no directory nowhere"),
        ("batch nowhere prompts.jsonl results.jsonl", "nowhere"),
        ("batch demo prompts.jsonl results.jsonl --slots 0", "slots=0"),
        ("batch demo prompts.jsonl results.jsonl --slots 2 --memory 1GB", "both given"),
        ("batch demo prompts.jsonl results.jsonl --memory lots", "--memory lots is not a number of bytes"),
        ("batch demo prompts.jsonl results.jsonl --cache xquant:5", "bits=5"),
        ("batch demo prompts.jsonl results.jsonl --temperature -1", "temperature=-1"),
    ],
)
def test_errors_come_before_anything_is_written(command: str, message: str, prompts: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(prompts.parent)
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in prompts.parent.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(("text", "size"), [("1500", 1500), ("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("8kib", 8192)])
def test_bytes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_the_checksum_of_weights_sees_one_bit_and_two_numbers_in_the_wrong_order() -> None:
    params = {"a": jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4), "b": jnp.zeros(5), "c": jnp.ones(5)}
    others = [
        {**params, "b": params["b"].at[2].set(1e-45)},
        {**params, "a": params["a"][:, ::-1]},
        {**params, "a": params["a"][::-1]},
        {**params, "b": params["c"], "c": params["b"]},
    ]
    assert len({weights_checksum(tree) for tree in [params, *others]}) == 5
    assert weights_checksum(params) == weights_checksum(dict(params))
