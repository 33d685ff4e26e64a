"""The arguments that real models make for the operations: the cache methods themselves are run on their configs.

A model is named as in `FILES`, a cache as users type it. Of a cache with several kinds of layers, it is the last ones'.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from converters.families import model_config
from converters.shards import read_json
from pallas_kernels.shapes import DecodeShape, SumShape
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import Method
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.quantization import StreamSpec
from xquant_jax.numerics.rope import Rope
from xquant_jax.planning.shapes import method_params_of_one_layer

CONFIGS = Path(__file__).parents[1] / "tests" / "golden" / "configs"
FILES = {
    "Llama-3.1-8B": "Llama-3.1-8B.json",
    "Llama-2-7B": "Llama-2-7b-hf.json",
    "Qwen3-8B": "Qwen3-8B.json",
}


def _tiny(kv_heads: int) -> ModelConfig:
    """A model so small that kernels can be interpreted."""
    return ModelConfig(
        vocab_size=64,
        width=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=64,
        mlp_width=128,
        norm_eps=1e-5,
        rope=Rope(),
        sliding_windows=(None,) * 4,
        dtype="float32",
    )


TINY = {"tiny": _tiny(kv_heads=2), "tiny, K = H": _tiny(kv_heads=4)}


@functools.cache
def config_of(model: str) -> ModelConfig:
    """What a model is, by its name in `FILES` or `TINY`."""
    return TINY[model] if model in TINY else model_config(read_json(CONFIGS / FILES[model]))


@functools.cache
def decode_shape(model: str, cache: str) -> DecodeShape:
    """Of attention to what the layers store, or to the running sum where there is one."""
    config, (method, method_params) = config_of(model), _layer(model, cache)
    absorbed = method.absorbed(method_params, config)
    assert absorbed is not None, f"{cache} has no form with values absorbed"
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


@functools.cache
def sum_shape(model: str, cache: str) -> SumShape:
    """Of what a layer adds to the running sum."""
    config, (method, method_params) = config_of(model), _layer(model, cache)
    (stream,), running_sum = method.streams(config).values(), method.running_sum(config)
    assert running_sum is not None, f"{cache} has no running sum"
    return SumShape(running_sum, stream, jax.eval_shape(method.accumulation, method_params))


def streams(model: str, cache: str) -> tuple[StreamSpec, ...]:
    """What is quantized and packed, each kind of stream once."""
    config = config_of(model)
    return tuple(dict.fromkeys(_last(model, cache).streams(config).values()))


def _last(model: str, cache: str) -> Method:
    *_, (method, _) = CacheConfig.parse(cache).segments(config_of(model))
    return method


def _layer(model: str, cache: str) -> tuple[Method, Any]:
    """The method of the last layers, and shapes of what one of them multiplies with."""
    method: Any = _last(model, cache)
    same = dataclasses.replace(method, bits=4) if hasattr(method, "bits") else method
    return method, _method_params(model, CacheConfig(same))


@functools.cache
def _method_params(model: str, cache: CacheConfig) -> Any:
    """They do not depend on bits, and some take seconds to find."""
    *_, params = method_params_of_one_layer(config_of(model), cache)[0]
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params)
