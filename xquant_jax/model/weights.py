"""Reading weights: layer after layer into stacked arrays, on one device or each shard onto its own.

On a mesh a process reads only what its devices hold, one array of one layer at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from converters.finite import all_finite
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import (
    Layers,
    Parameter,
    build_tree,
    layer_name,
    layer_parameters,
    layers_of,
    outer_of,
    outer_parameters,
)
from xquant_jax.sharding.rules import RULES


def read_parameters(
    checkpoint: Any, dtype: str, mesh: Mesh | None = None, *, scan_layers: bool = True
) -> dict[str, Any]:
    """The parameters of the transformer."""
    config = checkpoint.model_config
    if mesh is None:
        outer, layer = checkpoint.outer(), checkpoint.layer
    else:
        outer = checkpoint.outer(sharding=_shardings(outer_parameters(config), mesh))
        layer = partial(checkpoint.layer, sharding=_shardings(layer_parameters(config), mesh))
    params = jax.tree.map(jnp.asarray, cast(outer, dtype))
    if scan_layers:
        return params | {"layers": stack_layers(config.num_layers, layer, dtype)}
    for i in range(config.num_layers):
        params[layer_name(i)] = jax.tree.map(jnp.asarray, cast(layer(i), dtype))
    return params


def parameter_specs(config: ModelConfig, *, scan_layers: bool = True) -> dict[str, Any]:
    """The partition of every parameter that `read_parameters` returns."""
    specs = build_tree((row.path, parameter_spec(row)) for row in outer_parameters(config))
    layer = build_tree((row.path, parameter_spec(row)) for row in layer_parameters(config))
    if scan_layers:
        return specs | {"layers": jax.tree.map(lambda spec: P(None, *spec), layer, is_leaf=lambda x: isinstance(x, P))}
    return specs | {layer_name(i): layer for i in range(config.num_layers)}


def parameter_spec(parameter: Parameter) -> P:
    """The partition of a parameter of one layer or of the outer part."""
    return RULES.spec(*parameter.logical_axes)


def stack_layers(num_layers: int, read: Callable[[int], Any], dtype: str) -> Any:
    """Reads layer after layer into stacked device arrays, which lie as those of a layer do."""
    stack = None
    for i in range(num_layers):
        layer = cast(read(i), dtype)
        if stack is None:
            stack = jax.tree.map(lambda a: _zeros(num_layers, a, dtype), layer)
        stack = _set(stack, layer, i)
    return stack


def cast(tree: Any, dtype: str) -> Any:
    """Arrays in another type; CheckpointError if a number is too large for it."""

    def one(path: tuple[Any, ...], a: Any) -> Any:
        if a.dtype == dtype:
            return a
        with np.errstate(over="ignore"):
            narrow = a.astype(jnp.dtype(dtype))
        finite = all_finite(narrow) if isinstance(narrow, np.ndarray) else bool(_finite(narrow))
        if not finite:
            raise CheckpointError(
                f"{jax.tree_util.keystr(path)} has values too large for {dtype}; choose another dtype"
            )
        return narrow

    return jax.tree_util.tree_map_with_path(one, tree)


def _shardings(parameters: tuple[Parameter, ...], mesh: Mesh) -> dict[str, Any]:
    return build_tree((p.path, NamedSharding(mesh, parameter_spec(p))) for p in parameters)


def _zeros(num_layers: int, layer: Any, dtype: str) -> jax.Array:
    shape = (num_layers, *layer.shape)
    partition = getattr(layer, "sharding", None)
    if not isinstance(partition, NamedSharding):
        return jnp.zeros(shape, dtype)
    return jnp.zeros(shape, dtype, device=NamedSharding(partition.mesh, P(None, *partition.spec)))


@partial(jax.jit, donate_argnames="stack")
def _set(stack: Any, layer: Any, i: Any) -> Any:
    return jax.tree.map(lambda s, a: s.at[i].set(a), stack, layer)


@jax.jit
def _finite(a: jax.Array) -> jax.Array:
    return jnp.isfinite(a).all()


def weights_checksum(params: Any) -> int:
    """32 bits that depend on every bit of all parameters and its place, however they are split over devices and whether
    layers are stacked or not."""

    def mixed(a: Array, first: int = 0) -> Array:
        """The sum over a word of each number and its place, mixed by the finalizer of MurmurHash3 (Appleby).

        first: the number of the first layer, where the leading axis is that of layers
        """
        x = lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}").astype(jnp.uint32)
        for axis in range(a.ndim):
            place = lax.broadcasted_iota(jnp.uint32, a.shape, axis) + jnp.uint32(0 if axis else first)
            x = x * jnp.uint32(0x9E3779B1) + place
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)

    @jax.jit
    def total(outer: Any, layers: Layers) -> Array:
        parts = [mixed(a) for a in jax.tree.leaves(outer)]
        if isinstance(layers, tuple):
            by_leaf = zip(*map(jax.tree.leaves, layers), strict=True)
            parts += [sum((mixed(a[None], i) for i, a in enumerate(own)), start=jnp.uint32(0)) for own in by_leaf]
        else:
            parts += [mixed(a) for a in jax.tree.leaves(layers)]
        return sum((part * jnp.uint32(2 * i + 1) for i, part in enumerate(parts)), start=jnp.uint32(0))

    return int(total(outer_of(params), layers_of(params)))
