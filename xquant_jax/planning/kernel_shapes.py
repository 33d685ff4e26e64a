"""The arguments that a cache method makes for the kernels on a model, as shapes: the methods themselves are run."""

import dataclasses
import functools
from typing import Any

import jax

from pallas_kernels.shapes import DecodeShape, SumShape
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import Method
from xquant_jax.config import ModelConfig
from xquant_jax.planning.shapes import method_params_of_one_layer


def decode_shape(config: ModelConfig, method: Method) -> DecodeShape | None:
    """Of attention to what a layer stores, or to the running sum where there is one; None for methods that no kernel
    has a form of."""
    method_params = _method_params(config, method)
    absorbed = method.absorbed(method_params, config)
    if absorbed is None or absorbed.prepare is not None:
        return None
    running_sum = method.running_sum(config)
    streams = {absorbed.key: running_sum} if running_sum else method.streams(config)
    return DecodeShape(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        dim=config.head_dim,
        key=streams[absorbed.key],
        value=None if absorbed.value == absorbed.key else streams[absorbed.value],
        rebuild=absorbed.key_rebuild,
        value_heads=absorbed.value_heads,
        scale=config.softmax_scale,
    )


def sum_shape(config: ModelConfig, method: Method) -> SumShape | None:
    """Of what a layer adds to the running sum; None for methods that have none."""
    running_sum = method.running_sum(config)
    if running_sum is None:
        return None
    (stream,) = method.streams(config).values()
    return SumShape(running_sum, stream, jax.eval_shape(method.accumulation, _method_params(config, method)))


def _method_params(config: ModelConfig, method: Method) -> Any:
    """Shapes of what one layer multiplies with."""
    same: Any = method
    if hasattr(same, "bits"):
        same = dataclasses.replace(same, bits=4)
    return _of_one_layer(config, CacheConfig(same))


@functools.lru_cache(maxsize=256)
def _of_one_layer(config: ModelConfig, cache_config: CacheConfig) -> Any:
    """They do not depend on bits, and some take seconds to find."""
    *_, params = method_params_of_one_layer(config, cache_config)[0]
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params)
