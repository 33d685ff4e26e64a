"""`benchmarks.models`: the arguments of the operations are those that a cache of the model has and is read with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from benchmarks.models import FILES, TINY, config_of, decode_shape, sum_shape
from tests.conftest import random_model
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate
from xquant_jax.model.transformer import forward


@pytest.mark.parametrize(
    ("model", "cache"), [*((model, "xquant:3") for model in FILES), ("tiny", "int8"), ("tiny", "fp8")]
)
def test_streams_are_those_that_a_cache_is_allocated_with(model: str, cache: str) -> None:
    config, shape = config_of(model), decode_shape(model, cache)
    whole = jax.eval_shape(lambda: allocate(CacheConfig.parse(cache), config, batch=2, tokens=256))
    (segment,) = whole.segments
    _, key, _, value, *_ = shape.arguments(layers=config.num_layers, batch=2, blocks=2)
    allocated = list(segment.history.values())
    assert [key] == allocated if value is None else [key, value] == allocated


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("cache", ["xquant-cl:2", "xquant-cl:3,accumulator=bf16"])
def test_sums_are_those_that_a_cache_is_allocated_with(model: str, cache: str) -> None:
    config, shape = config_of(model), sum_shape(model, cache)
    whole = jax.eval_shape(lambda: allocate(CacheConfig.parse(cache), config, batch=2, tokens=256))
    running_sum, stream, *_ = shape.arguments(layers=1, batch=2, blocks=2)
    assert whole.segments[-1].history == {"delta": stream}
    assert whole.running_sum == running_sum


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("cache", ["xquant:4", "xquant-cl:2", "int8"])
def test_a_step_of_the_model_makes_these_arguments(model: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its last layer, as the trace of a whole step has them."""
    config, cache_config, made = config_of(model), CacheConfig.parse(cache), []
    run = pallas_kernels.decode_attention

    def record(*arguments: Any, **options: Any) -> Any:
        made.append((arguments, options))
        return run(*arguments, **options)

    monkeypatch.setattr(pallas_kernels, "decode_attention", record)
    loaded = random_model(config)
    method_params = cache_config.method_params(loaded.source)
    arrays = allocate(cache_config, config, batch=2, tokens=256)
    token, counts = jnp.ones((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
    step = functools.partial(forward, loaded.transformer)
    jax.eval_shape(step, loaded.params, token, arrays, method_params, counts)

    (q, key, rebuild, value, _, geometry), options = made[-1]
    shape = decode_shape(model, cache)
    queries, keys, expected_rebuild, values, *_ = shape.arguments(layers=1, batch=2, blocks=2)
    assert q.shape == queries.shape
    assert key.spec == keys.spec
    assert value.spec == (keys if values is None else values).spec
    assert jax.tree.map(lambda a: (a.shape, a.dtype), rebuild) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected_rebuild
    )
    assert (options["num_kv_heads"], options["value_heads"]) == (shape.kv_heads, shape.value_heads)
    assert geometry.scale == shape.scale
