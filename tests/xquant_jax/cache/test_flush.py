"""Which kernels write the blocks: those that the cache was allocated for, whoever flushes it."""

from collections.abc import Callable

import jax
import pytest

import pallas_kernels
import xquant_jax as xq
from pallas_kernels import target
from tests.conftest import random_model, tiny_config
from xquant_jax.cache.flush import flush, flush_when_due
from xquant_jax.config import ModelConfig

CONFIG: ModelConfig = tiny_config(
    width=256, num_heads=4, num_kv_heads=2, head_dim=64, num_layers=4, sliding_windows=(None,) * 4
)


@pytest.mark.parametrize(
    ("spec", "flushing", "implementation"),
    [
        ("xquant:4", flush, "xla"),
        ("xquant:4", flush_when_due, "pallas_tpu"),
        ("xquant-cl:2,first=2@4", flush_when_due, "xla"),
        ("xquant-cl:2,first=2@4", flush, "pallas_tpu"),
    ],
)
def test_a_flush_takes_the_kernels_of_its_cache(spec: str, flushing: Callable, implementation: str) -> None:
    model, cache_config = random_model(CONFIG), xq.CacheConfig.parse(spec)
    method_params = cache_config.method_params(model.source)
    with target.interpreted(), pallas_kernels.recorded() as ran:
        cache = xq.allocate(cache_config, CONFIG, batch=1, tokens=300, implementation=implementation)
        jax.eval_shape(flushing, cache, method_params)
    assert ran == {implementation}


def test_an_implementation_that_does_not_run_here_is_refused_when_the_cache_is_made() -> None:
    with pytest.raises(xq.ConfigError, match=r"implementation='pallas_tpu' runs on tpu, and this device is a cpu"):
        xq.allocate(xq.CacheConfig.parse("xquant:4"), CONFIG, batch=1, tokens=300, implementation="pallas_tpu")
