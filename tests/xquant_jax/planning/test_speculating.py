"""`xquant plan --speculate`: what verifying drafts costs, and what it gains."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import GOLDEN
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cli import main
from xquant_jax.config import ModelConfig
from xquant_jax.planning import kernel_costs
from xquant_jax.planning.costs import Costs
from xquant_jax.planning.counting import step_operations
from xquant_jax.planning.devices import Device, find_device
from xquant_jax.planning.kernel_shapes import decode_shape
from xquant_jax.planning.plan import plan, read_config
from xquant_jax.planning.row import Speculating

MODEL = str(GOLDEN / "configs" / "Llama-3.1-8B.json")
ROUND = Device("round", flops=1e14, bandwidth=1e12, memory=100 * 2**30, source="")
TOKEN = 131_072
"""Bytes of a cached token in bf16, and of one in the window."""

READ_ONCE = 2 * (8_030_261_248 - 128_256 * 4096)
"""Bytes of all weights but the embedding's."""


@pytest.fixture(scope="module")
def llama() -> ModelConfig:
    return read_config(MODEL)


def speculating(
    config: ModelConfig,
    speculate: str,
    acceptance: float | None = None,
    *,
    device: Device = ROUND,
    context: int = 16_384,
    batch: int = 1,
) -> Speculating:
    options = {"context": context, "batch": batch, "specs": ["bf16"], "acceptance": acceptance}
    (row,) = plan(config, device, speculate=speculate, **options).rows
    assert row.speculating is not None
    return row.speculating


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
def test_tokens_of_a_step_are_those_of_drafts_that_are_drawn(llama: ModelConfig, acceptance: float) -> None:
    """Of 4 tokens those before the first that is not accepted count, and the model's own behind them."""
    accepted = np.random.default_rng(0).random((40_000, 4)) < acceptance
    made = 1 + np.cumprod(accepted, axis=1).sum(axis=1)
    expected = speculating(llama, "lookup:4", acceptance).tokens_per_step
    assert expected == pytest.approx(made.mean(), abs=4 * made.std() / 200 + 1e-9)  # four standard errors


def test_a_verification_bound_by_memory_takes_as_long_as_a_step(llama: ModelConfig) -> None:
    found = speculating(llama, "lookup:4", 0.5)
    assert found.draft_s == 0
    assert found.verify_s == pytest.approx((READ_ONCE + (16_384 + 128) * TOKEN) / 1e12)
    assert found.speedup == pytest.approx(1 + 0.5 + 0.25 + 0.125 + 0.0625)
    assert found.tokens_per_second == pytest.approx(found.speedup / found.verify_s)


def test_a_verification_bound_by_arithmetic_takes_as_long_as_its_products(llama: ModelConfig) -> None:
    """By hand: all matrices for each of 5 tokens, the head too; attention to history, window and themselves."""
    slow = Device("slow", flops=1e9, bandwidth=1e12, memory=100 * 2**30, source="")
    matrices = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # without embedding and norms
    products = 2 * 5 * matrices + 32 * 5 * 16_384 * (1024 + 128 + 5)
    found = speculating(llama, "lookup:4", 0.5, device=slow, context=1024, batch=3)
    assert found.verify_s == pytest.approx(3 * products / 1e9, rel=1e-3)
    assert found.speedup < 0.5  # five tokens are computed for less than two


def test_keys_are_rebuilt_once_for_all_tokens_of_a_verification(llama: ModelConfig) -> None:
    """One d x d matrix for the keys of each of 8 heads; scores and values, 2 H d each, for each of 5 tokens."""
    steps = step_operations(llama, CacheConfig.parse("xquant:4"), 5, all_logits=True)
    assert steps.attend[0] == 128 * (2 * 8 * 128 * 128 + 5 * 16_384)
    without = step_operations(llama, CacheConfig.parse("xquant:4"), 5)
    assert steps.once - without.once == 4 * 2 * 4096 * 128_256


def test_a_draft_from_the_window_is_steps_over_the_newest_blocks(llama: ModelConfig) -> None:
    found = speculating(llama, "window:3,blocks=2", 0.5, batch=7)
    assert found.draft_s == pytest.approx(3 * (READ_ONCE + 7 * (2 * 128 + 128) * TOKEN) / 1e12)
    assert found.tokens_per_second == pytest.approx(7 * found.tokens_per_step / (found.draft_s + found.verify_s))


def test_drafts_of_the_whole_context_gain_nothing(llama: ModelConfig) -> None:
    """Five steps of equal length for five tokens, if every draft is right."""
    assert speculating(llama, "window:4", 1.0, context=256).speedup == pytest.approx(1)
    assert speculating(llama, "window:4", context=256).speedup == pytest.approx((1 - 0.8**5) / (1 - 0.8) / 5)


def test_counted_kernels_take_what_was_counted_for_so_many_tokens(
    llama: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, cache = find_device("v6e"), CacheConfig.parse("xquant:4")
    shape = decode_shape(llama, cache.method)
    assert shape is not None
    table = {kernel_costs.key_of(shape, new): cost for new, cost in ((1, 1.5), (5, 2.0), (9, 4.0))}
    monkeypatch.setattr(kernel_costs, "_table", lambda: {"v6e": {"source": "", "ns": table}})
    costs = Costs(llama, cache)
    query = 1e9 * 16_384 / device.flops  # scores and values
    for new, nanoseconds in ((1, 1.5), (5, 2.0), (7, 3.0), (9, 4.0), (11, 4.0 + 2 * query)):
        seconds = [costs.decode_seconds(device, 4, context, new) for context in (0, 65_536)]
        assert seconds[1] - seconds[0] == pytest.approx(32 * 4 * 65_536 * nanoseconds * 1e-9)


def test_the_command_shows_speculation_where_it_is_asked_for(tmp_path: Path, capsys) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", "demo", "--device", "L4", "--cache", "xquant:4", "--json", str(out)]
    assert main(command) == 0
    assert "speedup" not in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["speculation"] is written["acceptance"] is written["rows"][0]["speculating"] is None
    assert main([*command, "--speculate", "window:2,blocks=1"]) == 0
    printed = capsys.readouterr().out
    assert "2.44 tokens a step" in printed
    written = json.loads(out.read_text())
    assert (written["speculation"], written["acceptance"]) == ("window:2,blocks=1", 0.8)
    found = written["rows"][0]["speculating"]
    (shown,) = (line.split()[-2:] for line in printed.splitlines() if line.strip().startswith("xquant:4 "))
    assert shown == [f"{found['tokens_per_second']:,.0f}", f"{found['speedup']:.2f}"]
