"""What docs/plan.md, docs/batch.md, docs/prefixes.md, docs/prompts.md and docs/speculation.md show is what runs."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from xquant_jax.cli import main
from xquant_jax.model.loading import DEMO

ROOT = Path(__file__).parents[1]
PLAN, BATCH, PREFIXES = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("plan.md", "batch.md", "prefixes.md")
)


SHOWN = re.findall(r"```sh\nxquant (plan [^`]*)\n```\n\n```\n([^`]*)```", PLAN)


@pytest.mark.parametrize(("command", "shown"), SHOWN)
def test_plans_are_those_that_the_command_prints(command: str, shown: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command.replace("\\\n", ""))) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(printed).strip("\n") == shown.strip("\n")


def test_the_example_of_a_batch_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (prompts,) = re.findall(r"```json\n(.*?)```", BATCH, re.S)
    (command,) = re.findall(r"```sh\nxquant (batch .*)\n", BATCH)
    Path("prompts.jsonl").write_text(prompts, encoding="utf-8")
    assert main(shlex.split(command)) == 0
    results = {r["line"]: r for r in map(json.loads, Path("results.jsonl").read_text("utf-8").splitlines())}
    assert [results[n].get("id") for n in (1, 2, 3)] == ["a", None, None]
    assert len(results[2]["tokens"]) == 24
    assert not any("error" in record for record in results.values())


def test_the_commands_and_the_python_of_prefixes_run(tmp_path: Path, monkeypatch, capsys) -> None:
    """All give the same answer; a line of the batch that does not begin with the document has an error of its own."""
    monkeypatch.chdir(tmp_path)
    prefill, *others = re.findall(r"^xquant (prefill .*|generate .*|batch .*)$", PREFIXES, re.MULTILINE)
    generate, batch = ([*shlex.split(command), "--max-new-tokens", "12"] for command in others)
    (shown,) = re.findall(r"```\n(document\.prefix: .*)\n```", PREFIXES)
    (code,) = re.findall(r"```python\n(.*?)```", PREFIXES, re.S)
    document = "".join((ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(keepends=True)[:60])
    Path("document.txt").write_text(document, encoding="utf-8")
    Path("document_and_more.txt").write_text(document + "def more(", encoding="utf-8")
    lines = [{"prompt": document + "class More:"}, {"prompt": document + "def more("}, {"prompt": "def more("}]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(shlex.split(prefill)) == 0
    assert capsys.readouterr().out.split("; ")[0] == shown.split("; ")[0]
    assert main([*generate, "--json", "answer.json"]) == 0
    assert main(batch) == 1
    capsys.readouterr()
    exec(compile(code, "prefixes.md", "exec"), {})
    (answer,) = json.loads(Path("answer.json").read_text("utf-8"))["results"]
    assert capsys.readouterr().out == answer["text"] + "\n"
    results = {r["line"]: r for r in map(json.loads, Path("results.jsonl").read_text("utf-8").splitlines())}
    assert results[2]["tokens"] == answer["tokens"]
    assert len(results[1]["tokens"]) == 12
    assert "the prompt does not begin with the prefix: its token" in results[3]["error"]


def test_a_loop_of_ones_own_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.S)
    exec(compile(code, "architecture.md", "exec"), {})
    assert capsys.readouterr().out.startswith("import os")


def test_the_python_of_a_batch_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", BATCH, re.S)
    exec(compile(code, "batch.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 3


def test_the_python_of_a_chat_runs(tmp_path: Path, capsys) -> None:
    """With a small model, which never learned to chat."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8"), re.S)
    directory = write_checkpoint(tmp_path, layers=2, vocab_size=4096)
    shutil.copy(DEMO / "tokenizer.json", directory)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}# {{ m.content }}\n{% endfor %}")
    exec(compile(code, "prompts.md", "exec"), {"directory": directory})
    assert len(capsys.readouterr().out) > 100


def test_the_python_of_speculation_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "speculation.md").read_text(encoding="utf-8"), re.S)
    exec(compile(code, "speculation.md", "exec"), {})
