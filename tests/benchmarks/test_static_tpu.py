"""`benchmarks.static.tpu`: the schedule that libtpu makes of the kernels, against the targets of the project."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.chips import TPUS

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Of a process of its own: libtpu writes its schedules down only if it is told to before it is loaded."""
    out = tmp_path_factory.mktemp("cost") / "rows.json"
    options = ["--chips", "v5e", "v6e", "--models", "Llama-3.1-8B", "--bits", "4", "--bases", "per_head"]
    options += ["--kernels", "decode_attention"]
    command = [sys.executable, "-m", "benchmarks.static.tpu", *options, "--json", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {row["chip"]: row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.parametrize(("chip", "most"), [("v5e", 3700), ("v6e", 2450)])
def test_a_thousand_tokens_cost_no_more_than_the_target(rows, chip: str, most: int) -> None:
    assert rows[chip]["bundles_per_1024"] <= most


def test_the_binding_unit_is_named_with_its_bound(rows) -> None:
    for row in rows.values():
        assert row["bound_unit"] == "vector"
        products = 1024 * (8 * 128 * 128 + 32 * 128 + 32 * 128) / TPUS[row["chip"]].macs
        assert row["bound_per_1024"] > products  # which the matrix unit needs
        assert row["ratio"] == pytest.approx(row["bound_per_1024"] / row["bundles_per_1024"], abs=0.01)


def test_a_layer_is_its_steps_and_what_comes_once(rows) -> None:
    for row in rows.values():
        assert 0 < row["step"] < row["once"]
        layer = 1e-6 * row["layer_us"] * TPUS[row["chip"]].clock
        computed = 32 * row["bundles_per_1024"] + row["once"]
        assert computed < layer < 1.15 * computed  # the first tile is read
