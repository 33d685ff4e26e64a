"""What cache methods multiply with, from a model's parameters and from nothing else.

SVD factors are computed from the parameters, or read from a converted checkpoint while the parameters are the very
arrays that were loaded from it.
"""

import dataclasses
import threading
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from converters import FOLDED, ConvertedCheckpoint, FactorKind, layer_factors
from converters.svd import FACTORIZED, factor_shapes
from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.cache.methods.learned import Need
from xquant_jax.cache.partition import PER_HEAD_PARAMS, partition_of
from xquant_jax.config import ModelConfig
from xquant_jax.model.weights import stack_layers
from xquant_jax.numerics import bases
from xquant_jax.parameters import Layers, Tree, build_tree, leaves_of, stacked


class Kept:
    """What was computed, by key. Threads that ask at the same time wait for one of them to compute it."""

    def __init__(self) -> None:
        self._lock, self._found = threading.RLock(), {}

    def get(self, key: Hashable, compute: Callable[[], Any], serves: Callable[[Any], bool] = lambda found: True) -> Any:
        """What is kept under the key if it serves; else what is computed now, which takes its place."""
        with self._lock:
            if key not in self._found or not serves(self._found[key]):
                self._found.pop(key, None)  # freed before its successor is made
                self._found[key] = compute()
            return self._found[key]


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a model was loaded from, and the arrays that hold the weights of its factors."""

    checkpoint: Any  # a `converters.Checkpoint`
    arrays: tuple[weakref.ref[jax.Array], ...]

    @classmethod
    def of(cls, checkpoint: Any, layers: Layers) -> "Origin":
        """layers: the parameters of all layers, as they were loaded from the checkpoint"""
        return cls(checkpoint, tuple(map(weakref.ref, jax.tree.leaves(_factorized(layers)))))

    def holds(self, layers: Layers) -> bool:
        """Whether these are the arrays that were loaded, not others that have taken their place."""
        arrays = jax.tree.leaves(_factorized(layers))
        return len(arrays) == len(self.arrays) and all(own() is a for own, a in zip(self.arrays, arrays, strict=True))

    def moved(self, layers: Layers, placed: Layers) -> "Origin":
        """The origin of `placed`, which are `layers` on other devices."""
        return Origin.of(self.checkpoint, placed) if self.holds(layers) else self

    def has_factors(self, layers: Layers) -> bool:
        """Whether the checkpoint holds the factors of these arrays: it was converted, they were loaded from it, and
        none was rounded to a narrower type."""
        if not isinstance(self.checkpoint, ConvertedCheckpoint) or not self.holds(layers):
            return False
        any_layer = layers[0] if isinstance(layers, tuple) else layers  # for the types
        stored, loaded = (leaves_of(_factorized(tree)) for tree in (self.checkpoint.layer(0), any_layer))
        return all(np.can_cast(stored[path].dtype, a.dtype) for path, a in loaded.items())


def factor_source(
    config: ModelConfig,
    layers: Layers,
    calibrated: Callable[[Need], dict[str, Any]],
    *,
    origin: Origin | None = None,
    mesh: Mesh | None = None,
    kept: Kept | None = None,
) -> FactorSource:
    """Where cache methods find the matrices that they multiply with.

    layers: the parameters of all layers
    calibrated: as in `FactorSource`
    origin: where they were loaded from, if they were
    mesh: devices that they are spread over; process 0 computes for all, as others might find other signs
    kept: takes in the stacks of factors, one of each kind, which serve all that ask for as many layers or fewer
    """
    kept = kept or Kept()
    dtype = jax.tree.leaves(layers)[0].dtype.name

    def svd(kind: FactorKind, *, folded: bool = False, number: int | None = None, balanced: bool = False) -> Tree:
        wanted = number or config.num_layers

        def compute() -> Tree:
            if origin is not None and FOLDED.get(kind) == folded and origin.has_factors(layers):
                one = partial(_read, origin.checkpoint, config, mesh, kind)
            else:
                one = partial(_compute, config, layers, mesh, kind, folded)
            return stack_layers(wanted, partial(_balanced, one) if balanced else one, dtype)

        key = ("svd", kind, folded, balanced)
        return kept.get(key, compute, lambda found: len(jax.tree.leaves(found)[0]) >= wanted)

    return FactorSource(config, stacked(needed(layers)), svd, calibrated)


def needed(layers: Layers) -> Layers:
    """What cache methods multiply with, of the parameters of all layers."""
    if isinstance(layers, tuple):
        return tuple(needed(own) for own in layers)  # pyright: ignore[reportReturnType]
    return {name: tree for name, tree in layers.items() if name in ("attention_norm", "key", "value", "key_norm")}


def method_params(
    source: FactorSource, cache_config: CacheConfig, mesh: Mesh | None, *, scan_layers: bool = True
) -> tuple[Any, ...]:
    """`CacheConfig.method_params`, on a mesh where the cache needs them; without `scan_layers` each layer's apart."""
    if mesh is None:
        found = cache_config.method_params(source)
    else:
        with sharding.using(mesh):
            partition = partition_of(cache_config, source.config)
        found = cache_config.method_params(source if partition.channels else _whole(source, mesh))
        found = sharding.place(found, partition.stacked_params(found), mesh)
    return found if scan_layers else _apart(found, cache_config, source.config)


def _apart(found: tuple[Tree, ...], cache_config: CacheConfig, config: ModelConfig) -> tuple[tuple[Tree, ...], ...]:
    """Of every segment the trees of its layers, with that of its first in the places of the layers before."""
    segments, start = [], 0
    for (_, number), tree in zip(cache_config.segments(config), found, strict=True):
        own = [_pick(tree, start + i) for i in range(number)]
        segments.append((*[own[0]] * start, *own))
        start += number
    return tuple(segments)


def layer_on_host(layers: Layers, mesh: Mesh | None, index: int) -> Tree:
    """The arrays of one layer that factors are made of, whole, as numpy arrays. Every process of a mesh must call it
    at the same time."""
    own = _factorized(layers[index]) if isinstance(layers, tuple) else _pick(_factorized(layers), index)
    return jax.tree.map(np.asarray, sharding.place(own, sharding.P(), mesh))


@jax.jit
def _pick(layers: Tree, index: Any) -> Tree:
    return jax.tree.map(partial(lax.dynamic_index_in_dim, index=index, keepdims=False), layers)


def _factorized(layers: Any) -> Any:
    if isinstance(layers, tuple):
        return tuple(map(_factorized, layers))
    leaves = leaves_of(layers)
    return build_tree((path, leaves[path]) for path in FACTORIZED)


def _read(checkpoint: ConvertedCheckpoint, config: ModelConfig, mesh: Mesh | None, kind: FactorKind, i: int) -> Tree:
    """Factors of one layer as a converted checkpoint has them, each process its own shards."""
    to = None if mesh is None else sharding.named(_specs(kind, config), mesh)
    return checkpoint.factors(kind, i, sharding=to)


def _compute(config: ModelConfig, layers: Layers, mesh: Mesh | None, kind: FactorKind, folded: bool, i: int) -> Tree:
    """Factors of one layer from its parameters, float32."""
    weights = layer_on_host(layers, mesh, i)
    if jax.process_index() == 0 or mesh is None:
        factors = layer_factors([kind], weights, config, folded=folded)[kind]
    else:
        factors = build_tree((path, np.zeros(shape, np.float32)) for path, shape in factor_shapes(kind, config).items())
    if mesh is None:
        return factors
    if jax.process_count() > 1:
        factors = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(factors))
    return sharding.place(factors, _specs(kind, config), mesh)


def _balanced(one: Callable[[int], Tree], i: int) -> Tree:
    """Factors of one layer in the balanced and rotated basis of each side's latents."""
    return {
        side: dict(zip(("project", "rebuild"), bases.balanced(own["project"], own["rebuild"]), strict=True))
        for side, own in one(i).items()
    }


def _specs(kind: FactorKind, config: ModelConfig) -> Tree:
    """The partition of one layer's factors."""
    shapes = build_tree(factor_shapes(kind, config).items())
    return sharding.named_specs(shapes, PER_HEAD_PARAMS if kind == "per_head" else {})


def _whole(source: FactorSource, mesh: Mesh) -> FactorSource:
    """On a mesh, a source of what every device has whole."""
    whole = partial(sharding.place, specs=sharding.P(), mesh=mesh)
    layers = {name: whole(tree) for name, tree in source.layers.items()}
    return dataclasses.replace(source, layers=layers, svd=lambda *kind, **which: whole(source.svd(*kind, **which)))
