"""`scripts/aot_compile.py` with the real TPU compiler: few and narrow layers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import aot_compile
from tests.conftest import forget_programs
from xquant_jax.cache.config import CacheConfig
from xquant_jax.planning.costs import Costs

pytest.importorskip("libtpu", reason="no libtpu here, the compiler for TPUs")
pytestmark = [
    pytest.mark.optimized,
    pytest.mark.filterwarnings("ignore:decode_attention runs without a kernel"),
]

ROOT = Path(__file__).parents[2]
LLAMA_8B = "llama-3.1-8b"
LAYERS, CONTEXT, BATCH = 2, 16_384, 8


def config_of(model: str) -> Path:
    return ROOT / "scripts" / "configs" / f"{model}.json"


def compiled(out: Path, topology: str, config: Path, *options: str, layers: int = LAYERS) -> Any:
    """The report of a few layers."""
    command = ["--topology", topology, "--config", str(config), "--layers", str(layers), "--json", str(out)]
    assert aot_compile.main([*command, *options]) == 0
    forget_programs()
    return json.loads(out.read_text())


def planned(config: Path, cache: str, layers: int = LAYERS) -> Costs:
    return Costs(aot_compile.shortened(aot_compile.read_config(config), layers), CacheConfig.parse(cache))


def exchanged(report: Any, program: str, when: str) -> int:
    return sum(c["bytes"] for c in report["collectives"] if (c["program"], c["when"]) == (program, when))


def narrow(folder: Path, layers: int = LAYERS, kv_heads: int = 4) -> Path:
    """The config of Llama-3.1-8B with fewer, narrower layers, and heads as wide."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": layers, "vocab_size": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "head_dim": 128}
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config_of(LLAMA_8B).read_text()) | sizes | heads))
    return config


@pytest.mark.slow
def test_a_slice_that_is_not_there(tmp_path: Path) -> None:
    """Sizes are computed another way: from the model's and the method's own numbers."""
    config, devices, cache = narrow(tmp_path), 4, "xquant:4"
    options = ("--cache", cache, "--mesh", "sequence=2,tensor=2", "--context", str(CONTEXT), "--batch", str(BATCH))
    report = compiled(tmp_path / "report.json", "v5e:2x2", config, *options, "--prefill-chunk", "256")
    sizes, decode = report["per_device"], report["compiled"]["decode"]
    assert report["fits"]
    assert report["implementation"] == "pallas_tpu"
    assert sizes["total"] == sizes["weights"] + sizes["cache"] + sizes["temporaries"] < sizes["capacity"]
    stored = 2 * 4 * 128  # latents of keys and values
    history = LAYERS * BATCH * CONTEXT * stored * (4 + 0.25) / 8
    window = LAYERS * BATCH * 128 * stored * 2
    sink = LAYERS * BATCH * 4 * stored * 2 * 2  # every device along the sequence has them
    assert sizes["cache"] == pytest.approx((history + window + sink) / devices, rel=1e-4)
    in_plan = planned(config, cache).cache(BATCH, CONTEXT).total / devices
    assert in_plan == pytest.approx(decode["updated_in_place"], rel=0.002)
    assert decode["temporaries"] < 0.1 * sizes["cache"] * 32 / LAYERS  # temporaries are those of one layer of 32
    # a decode step exchanges activations and logits, never the history
    assert 0 < exchanged(report, "decode", "step") < 0.3 * sizes["cache"]
    assert exchanged(report, "prefill", "step") > exchanged(report, "decode", "step")


@pytest.mark.slow
def test_plan_and_the_compiler_agree(tmp_path: Path) -> None:
    """What `xquant plan` says of one device, against what the compiler gives to each of four with `data=4`."""
    cache, layers = "xquant-cl:2", 4
    config = narrow(tmp_path, layers, kv_heads=2)
    options = ("--cache", cache, "--mesh", "data=4", "--context", str(CONTEXT), "--batch", str(BATCH))
    report = compiled(tmp_path / "out.json", "v5e:2x2", config, *options, "--prefill-chunk", "1", layers=layers)
    costs, decode = planned(config, cache, layers), report["compiled"]["decode"]
    stored, weights = costs.cache(BATCH, CONTEXT).total / 4, costs.weights + costs.method_params
    assert stored == pytest.approx(report["per_device"]["cache"], rel=0.001)
    assert stored == pytest.approx(decode["updated_in_place"], rel=0.002)
    assert weights == pytest.approx(report["per_device"]["weights"], rel=0.001)
    assert weights == pytest.approx(decode["arguments"] - decode["updated_in_place"], rel=0.05)


@pytest.mark.slow
def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    options = ("--cache", "bf16", "--mesh", "tensor=4", "--context", "1048576", "--batch", "32")
    report = compiled(tmp_path / "report.json", "v5e:2x2", config_of(LLAMA_8B), *options, "--prefill-chunk", "1")
    assert not report["fits"]
    assert report["per_device"]["total"] > report["per_device"]["capacity"]


@pytest.mark.slow
def test_plain_xla_can_be_asked_for_from_a_shell(tmp_path: Path) -> None:
    """In an environment that says nothing of TPUs."""
    out = tmp_path / "report.json"
    command = [sys.executable, "scripts/aot_compile.py", "--config", str(config_of(LLAMA_8B)), "--layers", "1"]
    command += ["--topology", "v5e:2x2", "--cache", "xquant:4", "--mesh", "tensor=4", "--context", "1024"]
    command += ["--prefill-chunk", "1", "--implementation", "xla", "--json", str(out)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "1,024 tokens per sequence fit; decoding reads them with xla" in done.stdout
    assert json.loads(out.read_text())["implementation"] == "xla"


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ("v5e:2x2", "--mesh tensor=8 --context 1024", "takes 8 devices, and there are 4"),
        ("v5e:2x2", "--mesh data=4 --context 1024 --batch 6", "6 prompts cannot be split over data=4"),
        ("v5e:2x2", "--mesh tensor=4 --context lots", "--context lots is neither"),
        ("v5e:2x2", "--mesh tensor=4 --context 0", "context=0"),
        ("v5e:2x2", "--mesh tensor=4 --context 1024 --batch 0", "batch=0"),
        ("v5e:2x2", "--mesh tensor=4 --context 1024 --layers 0", "--layers 0"),
        ("v5e:2x2", "--mesh tensor=4 --context 1024 --implementation cuda", "implementation='cuda' is not available"),
        ("v5e:2x2", "--mesh tensor=4 --context 1024 --implementation triton", "runs on gpu, and this device is a tpu"),
        ("v5e:2x2", "--mesh tensor=4 --context 1024 --json nowhere/a.json", "there is no directory nowhere"),
        ("v9:2x2", "--context 1024", "--topology v9:2x2"),
    ],
)
def test_bad_input_is_a_clear_error(
    tmp_path: Path, topology: str, options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--config", str(config_of(LLAMA_8B)), "--topology", topology, *options.split()]
    assert aot_compile.main(command) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_config_that_is_not_there_is_a_clear_error(capsys: Any) -> None:
    assert aot_compile.main(["--config", "nowhere.json", "--topology", "v5e:2x2", "--context", "1024"]) == 2
    assert "nowhere.json" in capsys.readouterr().err
