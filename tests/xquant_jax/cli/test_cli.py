"""The commands as a user types them, in this process."""

import json
from pathlib import Path

import pytest

from tests.conftest import GOLDEN
from xquant_jax.cli import main

MODEL = "llama-llama3"  # a golden checkpoint without tokenizer


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


def test_stream_prints_prompt_and_answer(shared: Path, capsys) -> None:
    command = ["generate", str(shared / "models" / "stories260K"), "--prompt", "Once upon a time", "--stream"]
    assert main([*command, "--max-new-tokens", "20", "--stop", "Lily"]) == 0
    assert capsys.readouterr().out == "Once upon a time, there was a little girl named \n"


def test_several_prompts_with_every_option(shared: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompt.txt").write_text("The big dog")
    options = "--temperature 0.8 --top-k 40 --top-p 0.9 --min-p 0.02 --repetition-penalty 1.1 --seed 3 --stop-id 2"
    sizes = "--max-new-tokens 8 --prefill-chunk 0 --cache-tokens 100 --dtype bfloat16 --cache int8"
    command = ["generate", str(shared / "models" / "stories260K"), "--prompt", "One [day]", "--prompt-file"]
    assert main([*command, str(tmp_path / "prompt.txt"), *options.split(), *sizes.split()]) == 0
    printed = capsys.readouterr().out
    assert "One [day]" in printed
    assert "The big dog" in printed


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


def test_an_error_while_generating_leaves_no_json(shared: Path, tmp_path: Path) -> None:
    command = [
        "generate",
        str(shared / "models" / "stories260K"),
        "--prompt",
        "x",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert main([*command, "--cache-tokens", "3"]) == 2
    assert list(tmp_path.iterdir()) == []
