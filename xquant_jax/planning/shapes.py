"""The arrays of a model that is not there, as shapes: its parameters, and what cache methods multiply with.

No checkpoint is opened: a config says all of it.
"""

import math
from functools import cache, lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from converters.svd import factor_shapes
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.cache.methods.learned import Codebooks, Directions, Need, Prediction
from xquant_jax.config import ModelConfig
from xquant_jax.model.transformer import Transformer
from xquant_jax.parameters import build_tree


def size(tree: Any) -> int:
    """Bytes of all leaves, arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@lru_cache
def parameter_shapes(config: ModelConfig, *, scan_layers: bool = True) -> Any:
    """The parameter tree, as shapes."""
    model, tokens = Transformer(config, scan_layers), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda t: model.init(jax.random.key(0), t, method="score")["params"], tokens)


@lru_cache(maxsize=256)
def method_params_of_one_layer(config: ModelConfig, cache_config: CacheConfig) -> tuple[tuple[Any, ...], set[int]]:
    """What each segment's method multiplies with in one layer, leaves [1, ...] of zeros, and the ids of those leaves
    that are parameters of the model."""
    layers = parameter_shapes(config)["layers"]
    needed = {name: layers[name] for name in ("attention_norm", "key", "value", "key_norm") if name in layers}
    params = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), needed)
    return cache_config.method_params(_one_layer(config, params)), {id(leaf) for leaf in jax.tree.leaves(params)}


def method_param_bytes(config: ModelConfig, cache_config: CacheConfig) -> tuple[int, int]:
    """Bytes of all that the methods multiply with, and of what a step reads of it; parameters are not counted again."""
    method_params, known = method_params_of_one_layer(config, cache_config)
    held: dict[int, int] = {}
    read = end = 0
    for (_, layers), tree in zip(cache_config.segments(config), method_params, strict=True):
        end += layers
        new = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(tree) if id(leaf) not in known}
        held |= {leaf: end * of_layer for leaf, of_layer in new.items()}  # from layer 0: `CacheConfig.method_params`
        read += layers * sum(new.values())
    return sum(held.values()), read


def _one_layer(config: ModelConfig, layers: dict[str, Any]) -> FactorSource:
    """A source whose arrays are zeros of a single layer: methods show what they make of them."""

    @cache
    def zeros(
        kind: str, folded: bool, number: int, balanced: bool
    ) -> dict[str, Any]:  # by layers too, as a loaded model has them
        shapes = factor_shapes(kind, config)  # pyright: ignore[reportArgumentType]
        return build_tree((path, jnp.zeros((1, *shape), config.dtype)) for path, shape in shapes.items())

    def svd(kind: str, *, folded: bool = False, number: int | None = None, balanced: bool = False) -> dict[str, Any]:
        return zeros(kind, folded, number or config.num_layers, balanced)

    def calibrated(need: Need) -> dict[str, Any]:
        match need:
            case Directions(basis=basis, rank=rank):
                heads = 2 * config.num_kv_heads * min(config.width, config.head_dim)
                width = heads if basis == "per_head" else min(config.width, 2 * config.kv_width)
                shapes = {"down": (1, width, rank), "up": (1, rank, width)}
            case Prediction():
                width = min(config.width, 2 * config.kv_width)
                shapes = {"predict": (1, width, width), "residual": (1, width)}
            case Codebooks(bits=bits):
                shapes = dict.fromkeys(("key", "value"), (1, 2**bits))
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}

    return FactorSource(config, layers, svd, calibrated)
