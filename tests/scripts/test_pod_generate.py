"""`scripts/pod_generate.py` as several real processes on this machine, which talk over loopback."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import xquant_jax as xq
from scripts import pod_generate
from tests.checkpoints import write_checkpoint
from tests.conftest import random_tokens, tiny_config

ROOT = Path(__file__).parents[2]
SECONDS = 300  # until a test gives up on its processes; they take a few, on a busy machine a minute
CACHE = "bf16,dtype=float32"
OPTIONS = ("--cache", CACHE, "--slots", "2", "--mesh", "data=2,tensor=2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Nine prompts of one bucket, two lines that are none, and a blank one."""
    lines = [json.dumps({"tokens": random_tokens(tiny_config(), 3 + i, seed=i).tolist()}) for i in range(9)]
    lines[3:3] = ["{not JSON", "", '{"tokens": []}']
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def start(count: int, model: Path, prompts: Path, results: Path, *options: str) -> list[subprocess.Popen[str]]:
    """The processes of one job, two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "scripts/pod_generate.py", *map(str, (model, prompts, results)), *options]
    command += ["--coordinator", f"localhost:{port}", "--processes", str(count), "--heartbeat-timeout", "10"]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, "--process", str(i)], cwd=ROOT, env=environment, **pipes) for i in range(count)]


def ends(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What they wrote to stderr, once all have ended."""
    try:
        return [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def records(results: Path) -> dict[int, dict[str, Any]]:
    """By line of the prompts; every line once. What a kill cut short is left out."""
    found = [json.loads(line) for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
    by_line = {record["line"]: record for record in found}
    assert len(by_line) == len(found)
    return by_line


def check(results: Path, new: int) -> None:
    found = records(results)
    assert sorted(found) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert {line for line, record in found.items() if "error" in record} == {4, 6}
    assert all(len(record["tokens"]) == new for record in found.values() if "tokens" in record)


@pytest.mark.slow
def test_two_processes_answer_as_generate_does(model: Path, prompts: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    processes = start(2, model, prompts, results, *OPTIONS, "--max-new-tokens", "9")
    errors = ends(processes)
    assert [process.returncode for process in processes] == [1, 1], errors  # lines failed
    assert "line 4: not JSON" in errors[0]
    check(results, 9)
    asked = {n: json.loads(line) for n, line in enumerate(prompts.read_text().splitlines(), 1) if line.startswith('{"')}
    answered = {n: record["tokens"] for n, record in records(results).items() if "tokens" in record}
    wanted = [asked[n]["tokens"] for n in answered]
    alone = xq.generate(xq.load(model), wanted, cache=CACHE, max_new_tokens=9).results
    assert [*answered.values()] == [result.tokens for result in alone]


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_stopped(model: Path, prompts: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    options = (*OPTIONS, "--max-new-tokens", "80")
    processes = start(2, model, prompts, results, *options)
    deadline = time.monotonic() + SECONDS
    while not (results.exists() and results.read_bytes().count(b"\n") >= 4):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.05)
    processes[1].kill()
    ends(processes)
    assert all(process.returncode != 0 for process in processes)
    before = records(results)
    assert 4 <= len(before) < 11

    processes = start(2, model, prompts, results, *options)
    errors = ends(processes)
    assert [process.returncode for process in processes] == [1, 1], errors
    check(results, 80)
    after = records(results)
    assert all(after[line] == record for line, record in before.items())


@pytest.mark.slow
def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    (commands,) = re.findall(r"```sh\n(for i in .*?)```", (ROOT / "docs" / "pods.md").read_text(), re.S)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def main():"}\n{"prompt": "class Stack:"}\n')
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("XLA_FLAGS", None)
    subprocess.run(["bash", "-c", commands], cwd=tmp_path, env=environment, check=True, timeout=SECONDS)
    assert all(len(r["tokens"]) == 16 for r in records(tmp_path / "results.jsonl").values())


def test_a_host_that_never_joins_is_an_error(model: Path, prompts: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    lonely, *others = start(2, model, prompts, results, "--join-timeout", "5")
    for other in others:
        other.kill()
    (error,) = ends([lonely])
    ends(others)
    assert lonely.returncode == 2
    assert "error: not all processes joined within --join-timeout 5 s" in error
    assert not results.exists()


@pytest.mark.slow
def test_results_of_another_run_are_refused_by_all(model: Path, prompts: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text('{"line": 1, "tokens": [1]}\n')
    (tmp_path / "results.jsonl.run").write_text('{"weights": "of another model"}')
    processes = start(2, model, prompts, results, "--max-new-tokens", "2")
    errors = ends(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert all("is from another run: weights was 'of another model'" in error for error in errors)


@pytest.mark.slow
def test_options_that_differ_between_hosts_are_an_error_on_all(model: Path, prompts: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", "2"]
    command = [sys.executable, "scripts/pod_generate.py", str(model), str(prompts), str(tmp_path / "results.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [*command, *shared, "--process", str(i), "--max-new-tokens", str(3 + i)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = ends(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert all("processes [1] were started with other options than process 0" in error for error in errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--coordinator localhost --processes 2 --process 0", "--coordinator localhost must be HOST:PORT"),
        ("--coordinator localhost:1 --processes 2", "belong together"),
        ("--processes 0", "--processes 0 is not possible"),
        ("--processes 1 --join-timeout 0", "--join-timeout 0 is not possible"),
    ],
)
def test_a_process_that_is_named_wrongly_is_an_error(
    options: str, message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pod_generate.py", "demo", "prompts.jsonl", "results.jsonl", *options.split()])
    assert pod_generate.main() == 2
    assert message in capsys.readouterr().err


def test_a_mesh_of_other_devices_is_an_error(
    model: Path, prompts: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pod_generate.py", *map(str, (model, prompts, tmp_path / "results.jsonl"))]
    monkeypatch.setattr(sys, "argv", [*command, "--processes", "1", "--mesh", "tensor=3"])
    assert pod_generate.main() == 2
    assert "takes 3 devices, and there are" in capsys.readouterr().err
