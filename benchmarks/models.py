"""The arguments that real models make for the operations.

A model is named as in `FILES`, a cache as users type it. Of a cache with several kinds of layers, it is the last ones'.
"""

import dataclasses
import functools
from pathlib import Path

from converters.families import model_config
from converters.shards import read_json
from pallas_kernels.shapes import DecodeShape, SumShape
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import Method
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.quantization import StreamSpec
from xquant_jax.numerics.rope import Rope
from xquant_jax.planning import kernel_shapes

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


def _narrow(heads: int, kv_heads: int, head_dim: int, width: int, **options: bool) -> ModelConfig:
    """Sizes of a layer's attention; the rest of the model has no part in what is compiled of it."""
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "width": width}
    return dataclasses.replace(_tiny(1), **sizes, dtype="bfloat16", **options)


NARROW = {
    "Llama-3.2-1B": _narrow(32, 8, 64, 2048),
    "Qwen2.5-0.5B": _narrow(14, 2, 64, 896, qkv_bias=True),
    "Gemma-3-1B": _narrow(4, 1, 256, 1152, qk_norm=True),
    "Gemma-3-4B": _narrow(8, 4, 256, 2560, qk_norm=True),
}
"""Models with little to read of a token, or few heads; by their sizes alone."""

TINY = {"tiny": _tiny(kv_heads=2), "tiny, K = H": _tiny(kv_heads=4)}


@functools.cache
def config_of(model: str) -> ModelConfig:
    """What a model is, by its name in `FILES`, `NARROW` or `TINY`."""
    known = NARROW | TINY
    return known[model] if model in known else model_config(read_json(CONFIGS / FILES[model]))


@functools.cache
def decode_shape(model: str, cache: str) -> DecodeShape:
    """Of attention to what the layers store, or to the running sum where there is one."""
    shape = kernel_shapes.decode_shape(config_of(model), _last(model, cache))
    assert shape is not None, f"no kernel has a form of {cache}"
    return shape


@functools.cache
def sum_shape(model: str, cache: str) -> SumShape:
    """Of what a layer adds to the running sum."""
    shape = kernel_shapes.sum_shape(config_of(model), _last(model, cache))
    assert shape is not None, f"{cache} has no running sum"
    return shape


def streams(model: str, cache: str) -> tuple[StreamSpec, ...]:
    """What is quantized and packed, each kind of stream once."""
    return tuple(dict.fromkeys(_last(model, cache).streams(config_of(model)).values()))


def _last(model: str, cache: str) -> Method:
    *_, (method, _) = CacheConfig.parse(cache).segments(config_of(model))
    return method
