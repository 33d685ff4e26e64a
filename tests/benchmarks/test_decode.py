"""`benchmarks.decode`: what it checks, times and writes down, with tiny shapes on the interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.decode.rows import Row
from benchmarks.decode.run import KINDS, jobs

pytest.importorskip("jax_triton", reason="jax-triton is not installed; it is on Linux only")
ROOT = Path(__file__).parents[2]


def benchmark(*options: str | Path) -> None:
    command = [sys.executable, "-m", "benchmarks.decode.run", "--smoke", "--minutes", "30", *options]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


@pytest.mark.slow
def test_the_benchmark_runs_on_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    benchmark("--json", out, "--plot", plot)
    result = json.loads(out.read_text())
    assert not result["skipped"]
    assert not result["wrong"]
    assert all(check["error"] < 0.03 for check in result["checks"])
    kernels = {row["cache"] for row in result["layers"] if row["implementation"] == "triton"}
    assert kernels == {"xquant:4", "xquant:2,basis=joint"}
    assert [row["implementation"] for row in result["sums"]] == ["triton"]
    assert [step["cache"] for step in result["steps"]] == ["xquant:4"]
    assert plot.stat().st_size > 1000


@pytest.mark.slow
def test_tuning_says_which_tiles_are_the_fastest(tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    benchmark("--tune", "--json", out)
    attention, running_sum = json.loads(out.read_text())
    assert (attention["cache"], running_sum["cache"]) == ("xquant:4", "xquant-cl:2")
    for found in (attention, running_sum):
        assert found["seconds"] <= found["seconds_by_rule"]


def test_bytes_and_operations_of_a_row_are_those_of_the_formulas() -> None:
    """Of Llama-3.1-8B: 1,024 wide keys and values at 4 bits, with a scale and a zero of 16 bits for 128 numbers."""
    row, tokens = Row("Llama-3.1-8B", "xquant:4", batch=8, context=65_536, implementation="triton"), 8 * 65_536
    assert row.bytes == tokens * 2 * 1024 * (4 + 32 / 128) / 8
    rebuild, scores, values = 128 * 1024, 32 * 128, 32 * 128
    assert row.flops == tokens * 2 * (rebuild + scores + values)


def test_every_kernel_is_checked_before_it_is_timed() -> None:
    checked = set()
    for kind, row in jobs(smoke=False, only=("checks", "layers", "sums"), caches=["*"]):
        if kind == "checks":
            checked.add((row.model, row.cache, getattr(row, "variant", "")))
        elif row.implementation == "triton":
            assert (row.model, row.cache, getattr(row, "variant", "")) in checked


def test_kinds_and_caches_can_be_chosen() -> None:
    chosen = list(jobs(smoke=False, only=("layers",), caches=["xquant:4*", "int8"]))
    assert {kind for kind, _ in chosen} == {"layers"}
    assert {row.cache.split(",")[0] for _, row in chosen} == {"xquant:4", "int8"}
    kinds = {kind for kind, _ in jobs(smoke=True, only=KINDS, caches=["*"])}
    assert kinds == set(KINDS)
