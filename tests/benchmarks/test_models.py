"""`benchmarks.models`: the arguments of the operations are those that a cache of the model has and is read with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from benchmarks.models import FILES, TINY, config_of, decode_shape, sum_shape
from pallas_kernels import DecodeAttention
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
    call = shape.call(layers=config.num_layers, batch=2, blocks=2)
    streams = [call.key_stream] if call.value_stream is None else [call.key_stream, call.value_stream]
    assert streams == list(segment.history.values())


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("cache", ["xquant-cl:2", "xquant-cl:3,first=3@4,accumulator=bf16"])
def test_sums_are_those_that_a_cache_is_allocated_with(model: str, cache: str) -> None:
    config, shape = config_of(model), sum_shape(model, cache)
    whole = jax.eval_shape(lambda: allocate(CacheConfig.parse(cache), config, batch=2, tokens=256))
    call = shape.call(layers=1, batch=2, blocks=2)
    assert whole.segments[-1].history == {"delta": call.stream}
    assert whole.running_sum == call.running_sum


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("cache", ["xquant:4", "xquant-cl:2", "int8"])
def test_a_step_of_the_model_makes_these_arguments(model: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its last layer, as the trace of a whole step has them."""
    config, cache_config, made = config_of(model), CacheConfig.parse(cache), []
    run = pallas_kernels.run

    def record(call: Any, *arguments: Any, **options: Any) -> Any:
        made.append(call)
        return run(call, *arguments, **options)

    monkeypatch.setattr(pallas_kernels, "run", record)
    loaded = random_model(config)
    method_params = cache_config.method_params(loaded.source)
    arrays = allocate(cache_config, config, batch=2, tokens=256)
    token, counts = jnp.ones((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
    step = functools.partial(forward, loaded.transformer)
    jax.eval_shape(step, loaded.params, token, arrays, method_params, counts)

    call = [call for call in made if isinstance(call, DecodeAttention)][-1]
    expected = decode_shape(model, cache).call(layers=1, batch=2, blocks=2)
    assert call.q.shape == expected.q.shape
    assert call.key_stream.spec == expected.key_stream.spec
    assert call.values.spec == expected.values.spec
    assert shapes_of(call.key_rebuild) == shapes_of(expected.key_rebuild)
    assert (call.num_kv_heads, call.value_heads) == (expected.num_kv_heads, expected.value_heads)
    assert call.geometry.scale == expected.geometry.scale


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)
