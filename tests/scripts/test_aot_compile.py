"""`scripts/aot_compile.py` with the real TPU compiler: two layers of each model, at the slices that the docs name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LLAMA_8B, LLAMA_70B = "llama-3.1-8b", "llama-3.1-70b"
DEVICES = {"v5e:2x2": 4, "v5e:4x4": 16, "v5p:2x2x4": 16}


def compiled(out: Path, topology: str, model: str, *options: str, code: int = 0) -> Any:
    """The report of two layers, or the error."""
    pytest.importorskip("libtpu", reason="no libtpu here, the compiler for TPUs")
    command = [sys.executable, "scripts/aot_compile.py", "--config", f"scripts/configs/{model}.json", "--layers", "2"]
    command += ["--topology", topology, "--json", str(out), *options]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(out.parent)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stderr
    return json.loads(out.read_text()) if code == 0 else done.stderr


def exchanged(report: Any, program: str, when: str) -> int:
    return sum(c["bytes"] for c in report["collectives"] if (c["program"], c["when"]) == (program, when))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "model", "cache", "mesh"),
    [
        ("v5e:2x2", LLAMA_8B, "xquant:4", "tensor=4"),
        ("v5e:4x4", LLAMA_8B, "xquant:4,basis=joint", "sequence=4,tensor=4"),
        ("v5p:2x2x4", LLAMA_70B, "bf16", "sequence=2,tensor=8"),
    ],
)
def test_a_slice_that_is_not_there(tmp_path: Path, topology: str, model: str, cache: str, mesh: str) -> None:
    """Sizes are computed another way: from the model's and the method's own numbers."""
    context, batch = 16_384, 8
    options = ("--cache", cache, "--mesh", mesh, "--context", str(context), "--batch", str(batch))
    report = compiled(tmp_path / "report.json", topology, model, *options)
    sizes = report["per_device"]
    assert report["fits"]
    assert sizes["total"] == sizes["weights"] + sizes["cache"] + sizes["temporaries"] < sizes["capacity"]
    key_width, layers = 1024, 2
    per_value = 2 if cache == "bf16" else (4 + 0.25) / 8
    history = layers * batch * context * 2 * key_width * per_value
    window = layers * batch * 128 * 2 * key_width * 2
    assert sizes["cache"] == pytest.approx((history + window) / DEVICES[topology], rel=1e-4)
    whole = sizes["cache"] * {LLAMA_8B: 32, LLAMA_70B: 80}[model] / layers  # of all layers; temporaries are of one
    assert sizes["temporaries_by_program"]["decode"] < 0.1 * whole
    # a decode step exchanges activations and logits (most of it, beside two layers), never the history
    assert 0 < exchanged(report, "decode", "step") < 0.3 * sizes["cache"]
    assert exchanged(report, "prefill", "step") > exchanged(report, "decode", "step")


@pytest.mark.slow
def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    options = ("--cache", "bf16", "--mesh", "tensor=4", "--context", "1048576", "--batch", "32")
    report = compiled(tmp_path / "report.json", "v5e:2x2", LLAMA_8B, *options)
    assert not report["fits"]
    assert report["per_device"]["total"] > report["per_device"]["capacity"]


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ("v5e:2x2", ("--mesh", "tensor=8", "--context", "1024"), "takes 8 devices, and there are 4"),
        ("v5e:2x2", ("--mesh", "data=4", "--context", "1024", "--batch", "6"), "6 prompts cannot be split over data=4"),
        ("v5e:2x2", ("--mesh", "tensor=4", "--context", "lots"), "--context lots is neither"),
        ("v9:2x2", ("--context", "1024"), "--topology v9:2x2"),
    ],
)
def test_bad_input_is_a_clear_error(tmp_path: Path, topology: str, options: tuple[str, ...], message: str) -> None:
    assert message in compiled(tmp_path / "report.json", topology, LLAMA_8B, *options, code=2)
