"""`benchmarks.static.tpu`: the schedule that libtpu makes of the kernels, against the targets of the project."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """Of a process of its own: libtpu writes its schedules down only if it is told to before it is loaded."""
    out = tmp_path_factory.mktemp("cost") / "rows.json"
    options = ["--chips", "v5e", "v6e", "--models", "Llama-3.1-8B", "--bits", "4", "--kernels", "decode_attention"]
    command = [sys.executable, "-m", "benchmarks.static.tpu", *options, "--json", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {(row["chip"], row["basis"]): row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.parametrize(
    ("chip", "basis", "most"), [("v5e", "per_head", 4500), ("v6e", "per_head", 2900), ("v5e", "joint", 19_300)]
)
def test_a_thousand_tokens_cost_no_more_than_the_target(rows, chip: str, basis: str, most: int) -> None:
    assert rows[chip, basis]["bundles_per_1024"] <= most


def test_the_binding_unit_is_named_with_its_bound(rows) -> None:
    joint, per_head = rows["v5e", "joint"], rows["v5e", "per_head"]
    assert joint["bound_unit"] == "matrix"
    assert joint["bound_per_1024"] == round(1024 * (1024 * 1024 + 32 * 128 + 32 * 1024) / (4 * 128 * 128))
    assert per_head["bound_unit"] == "vector"
    assert per_head["ratio"] == pytest.approx(per_head["bound_per_1024"] / per_head["bundles_per_1024"], abs=0.01)
