"""The commands as a user types them, in this process."""

import itertools
import json
from pathlib import Path

import pytest

from tests.conftest import GOLDEN
from xquant_jax.cli import main, progress
from xquant_jax.model.loading import DEMO

MODEL = "llama-llama3"  # a golden checkpoint without tokenizer
START = "    def __init__(self, name):\n"


def test_convert_then_generate_continues_as_transformers_does(shared: Path, tmp_path: Path, capsys) -> None:
    out, answer = tmp_path / "stories", tmp_path / "answer.json"
    assert main(["convert", str(shared / "models" / "stories260K"), str(out)]) == 0
    command = [
        "generate",
        str(out),
        "--prompt",
        "Once upon a time",
        "--max-new-tokens",
        "60",
        "--cache",
        "bf16",
    ]
    assert main([*command, "--json", str(answer)]) == 0
    golden = json.loads((GOLDEN / "stories260K.json").read_text())
    written = json.loads(answer.read_text())
    assert written["results"][0]["tokens"] == golden["tokens"]
    assert written["results"][0]["prompt"] + written["results"][0]["text"] == golden["text"]
    printed = capsys.readouterr().out
    assert "cache bytes" in printed
    assert f"{written['cache_bytes']['total']:,}" in printed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_converted_model_and_its_source_answer_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As a whole and in pieces, as they come."""
    out, answer = tmp_path / "demo", tmp_path / "answer.json"
    assert main(["convert", str(DEMO), str(out)]) == 0
    options = ["--prompt", START, "--max-new-tokens", "12", "--stop", "if"]
    assert main(["generate", "demo", *options, "--json", str(answer)]) == 0
    (written,) = json.loads(answer.read_text())["results"]
    assert "cache bytes" in capsys.readouterr().out
    assert main(["generate", str(out), *options, "--stream"]) == 0
    assert capsys.readouterr().out == f"{START}{written['text']}\n"
    assert len(written["tokens"]) > 2


def test_several_prompts_with_every_option(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "prompt.txt").write_text("class A:")
    options = "--temperature 0.8 --top-k 40 --top-p 0.9 --min-p 0.02 --repetition-penalty 1.1 --seed 3 --stop-id 2"
    sizes = "--max-new-tokens 8 --prefill-chunk 0 --cache-tokens 100 --dtype bfloat16 --cache int8"
    command = ["generate", "demo", "--prompt", "x = [day]", "--prompt-file"]
    assert main([*command, str(tmp_path / "prompt.txt"), *options.split(), *sizes.split()]) == 0
    printed = capsys.readouterr().out
    assert "x = [day]" in printed
    assert "class A:" in printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate nowhere --prompt x", "nowhere"),
        (f"generate {GOLDEN / MODEL} --prompt x", "no tokenizer.json"),
        (f"generate {GOLDEN / MODEL}", "there is no prompt"),
        (f"generate {GOLDEN / MODEL} --prompt x --stream --json a", "--stream prints one prompt"),
        (f"generate {GOLDEN / MODEL} --prompt x --json nowhere/a.json", "there is no directory nowhere"),
        (f"generate {GOLDEN / MODEL} --prompt-file nowhere.txt", "nowhere.txt"),
        ("convert nowhere out", "nowhere"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(command: str, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_generating_leaves_no_json(tmp_path: Path) -> None:
    command = ["generate", "demo", "--prompt", START, "--json", str(tmp_path / "a.json")]
    assert main([*command, "--cache-tokens", "3"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_work_without_a_terminal_is_told_when_it_begins_after_a_while_and_at_its_end(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock runs on 6 seconds from report to report."""
    clock = itertools.count(100.0, 6.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.reported() as report:
        for done in range(6):
            report(done, 5, "[one]")
        report(0, 1, "two")
    assert capsys.readouterr().err.splitlines() == ["0/5 [one]", "2/5 [one]", "4/5 [one]", "5/5 [one]", "0/1 two"]
