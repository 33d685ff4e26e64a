"""What kernels were counted to take, in place of a roofline."""

import dataclasses
import json
from pathlib import Path

import pytest

from converters.families import model_config
from converters.shards import read_json
from tests.conftest import GOLDEN
from xquant_jax.cache.config import CacheConfig
from xquant_jax.config import ModelConfig
from xquant_jax.planning import kernel_costs
from xquant_jax.planning.costs import Costs
from xquant_jax.planning.devices import find_device, read_devices
from xquant_jax.planning.kernel_shapes import decode_shape, sum_shape

BATCH, CONTEXT = 4, 131_072


@pytest.fixture(scope="module")
def llama() -> ModelConfig:
    return model_config(read_json(GOLDEN / "configs" / "Llama-3.1-8B.json"))


def costs(config: ModelConfig, cache: str) -> Costs:
    return Costs(config, CacheConfig.parse(cache))


def by_hand(config: ModelConfig, cache: str, nanoseconds: float, monkeypatch: pytest.MonkeyPatch) -> Costs:
    """All kernels of the cache's last layers take so long for a token, on a v6e."""
    *_, (method, _) = CacheConfig.parse(cache).segments(config)
    shapes = [decode_shape(config, method), sum_shape(config, method)]
    table = {kernel_costs.key_of(shape): nanoseconds for shape in shapes if shape is not None}
    monkeypatch.setattr(kernel_costs, "_table", lambda: {"v6e": {"source": "", "ns": table}})
    return costs(config, cache)


def test_layers_take_the_roofline_of_the_rest_and_what_kernels_take(
    llama: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, found = find_device("v6e"), by_hand(llama, "xquant:4", 1.5, monkeypatch)
    step = found.step(device, BATCH, CONTEXT)
    at_once = found.step(device, BATCH, 0).seconds  # weights, windows and new tokens
    assert step.seconds == pytest.approx(at_once + 32 * BATCH * CONTEXT * 1.5e-9)
    assert step.bound == "kernels"
    assert found.counted(device)


def test_layers_of_a_kind_that_was_not_counted_keep_the_roofline(
    llama: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of xquant-cl store their latents plainly, or begin the sum: no kernel of theirs is in the table."""
    device, found = find_device("v6e"), by_hand(llama, "xquant-cl:2", 10.0, monkeypatch)
    *plain, (_, summed) = found.cache_config.segments(llama)
    assert plain
    counted = summed * BATCH * CONTEXT * 20.0e-9  # two kernels
    history = found.decode_seconds(device, BATCH, CONTEXT) - found.decode_seconds(device, BATCH, 0)
    monkeypatch.setattr(kernel_costs, "_table", dict)
    roofline = found.decode_seconds(device, BATCH, CONTEXT) - found.decode_seconds(device, BATCH, 0)
    assert counted < history < counted + roofline


def test_windows_bound_what_kernels_read(llama: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    windowed = dataclasses.replace(llama, sliding_windows=(1024,) * 32)
    device, found = find_device("v6e"), by_hand(windowed, "xquant:4", 1.5, monkeypatch)
    assert found.decode_seconds(device, 1, CONTEXT) == pytest.approx(found.decode_seconds(device, 1, 1024), rel=0.01)


def test_other_devices_shapes_and_methods_are_not_found(llama: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(llama, "xquant:4", 1.5, monkeypatch)
    device = find_device("v6e")
    other = dataclasses.replace(device, bandwidth=1.0)
    narrower = dataclasses.replace(llama, num_kv_heads=4)
    for where, config, cache in (
        (find_device("v5e"), llama, "xquant:4"),
        (other, llama, "xquant:4"),
        (device, narrower, "xquant:4"),
        (device, llama, "xquant:3"),
        (device, llama, "bf16"),
        (device, llama, "kvquant:4"),
    ):
        assert not costs(config, cache).counted(where)


def test_the_committed_costs_are_of_devices_that_are_known_and_say_where_they_come_from() -> None:
    table = json.loads(Path(kernel_costs.__file__).with_name("kernel_costs.json").read_text())
    assert table.keys() <= {device.name for device in read_devices()}
    for entry in table.values():
        assert entry["source"]
        assert all(nanoseconds > 0 for nanoseconds in entry["ns"].values())
