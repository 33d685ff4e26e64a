"""How a model and its cache lie on a mesh of devices: rules from logical axes to the mesh axes, and their checks.

The mesh is the one of `jax.set_mesh`. Dense arithmetic is left to XLA's partitioner, which `constrain` guides; what
reads or writes the cache runs on every device's own share (`on_shards`). Without a mesh the same code runs as it is.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "sequence", "tensor")
"""The axes of a mesh, outermost first: neighbours along `tensor` talk most."""

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes that each logical axis is split over.

    Streams that belong to heads are split by head and by block; those that every head needs whole by block alone,
    over as many devices. The window's places are split like the blocks. Tokens fed at once share the devices along
    `sequence` out among themselves, where they divide.
    """

    batch: Axes = ("data",)
    tokens: Axes = ("sequence",)
    heads: Axes = ("tensor",)
    mlp: Axes = ("tensor",)
    vocabulary: Axes = ("tensor",)
    head_blocks: Axes = ("sequence",)
    whole_blocks: Axes = ("sequence", "tensor")

    def spec(self, *logical: str | None) -> P:
        """The partition of an array whose axes are these."""
        return P(*(getattr(self, name) if name else None for name in logical))


RULES = Rules()


def active() -> bool:
    """Whether arrays are to be spread over the mesh of `jax.set_mesh`."""
    return set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def devices_along(axes: Axes) -> int:
    """Into how many parts these axes split; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in axes)


def tokens_axis(length: int) -> str | None:
    """The logical axis of `length` new tokens: split if they divide."""
    return None if length % devices_along(RULES.tokens) else "tokens"


def constrain(x: Any, *logical: str | None) -> Any:
    """The array, asked to lie as the rules say."""
    return jax.lax.with_sharding_constraint(x, RULES.spec(*logical)) if active() else x


def constrain_as(tree: Any, specs: Any) -> Any:
    """The arrays of a tree, asked to lie as a tree of partitions says, or all as one does."""
    if not active():
        return tree
    specs = jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def on_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on every device's own part of its arguments; `function` itself without a mesh."""
    if not active():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shard_index(axes: Axes) -> Any:
    """Within `on_shards`: which of the parts that these axes split into this device has."""
    return lax.axis_index(axes) if active() and axes else 0


def gather(x: Any, axes: Axes, axis: int) -> Any:
    """Within `on_shards`: the parts of all devices along these mesh axes, joined along the array's `axis`."""
    return lax.all_gather(x, axes, axis=axis, tiled=True) if active() and axes else x


def named_specs(tree: Any, axes: dict[str, tuple[str | None, ...]]) -> Any:
    """The partition of every leaf of a tree by its own name."""

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        return RULES.spec(*axes.get(getattr(path[-1], "key", ""), ()))

    return jax.tree_util.tree_map_with_path(spec, tree, is_leaf=lambda x: type(x) is tuple and isinstance(x[0], int))


def named(specs: Any, mesh: Mesh) -> Any:
    """A tree of partitions as shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def place(tree: Any, specs: Any, mesh: Mesh | None) -> Any:
    """The arrays of a tree, put where a tree of partitions (or one for all) says; what lies there stays.

    Numpy arrays must be the same in every process.
    """
    if mesh is None:
        return tree
    specs = jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs

    def put(x: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        if isinstance(x, jax.Array) and (sharding.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, specs)


def round_up(n: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-n // step) * step
