"""How far a cache moves the distributions of the next token when every layer stores in a way of its own.

The mean Kullback-Leibler divergence from the model without a cache, in nats per token, of protocol "paper"
(`evaluation.scoring`). It is never negative, and of few windows far less noisy than a difference of losses.

Which way a layer stores is a number that the compiled program is given, so that it is compiled once for all of them,
and it begins at the first layer that differs from the others: nothing changes below.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import Method
from xquant_jax.evaluation.scoring import _attend_to_stored
from xquant_jax.model import layers
from xquant_jax.model.transformer import Transformer
from xquant_jax.numerics import attention
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, allocate_blocks
from xquant_jax.parameters import layers_of, stacked

Run = tuple[int, tuple[Method, ...]]
"""Layers that are built alike: how many there are, and what each way of storing them is."""


class Reference(NamedTuple):
    """What a window is without a cache, and what enters each layer when all of them are stored as `others` says.

    log_probabilities: of tokens 2 ... N
    entering: the residual stream and the running sum, with the leading axis L
    """

    log_probabilities: Float[Array, "n V"]
    entering: Any


@dataclasses.dataclass
class LayerwiseScorer:
    """Divergences with every layer stored as one of `ways`, which differ in nothing but bits.

    model: a `Model`, or whatever else has a transformer, params, a source of factors and an implementation. Layers that
        are not stacked (`scan_layers=False`) are stacked here, which takes their memory once more
    """

    model: Any
    ways: Sequence[CacheConfig]

    def __post_init__(self) -> None:
        config = self.model.config
        segments = [way.segments(config) for way in self.ways]
        runs: tuple[Run, ...] = tuple(
            (same[0][1], tuple(method for method, _ in same)) for same in zip(*segments, strict=True)
        )
        self._exact = not any(method.has_running_sum for _, methods in runs for method in methods)
        method_params = [*zip(*(way.method_params(self.model.source) for way in self.ways), strict=True)]
        self._arguments = (self.model.params, method_params)
        static = (self.model.transformer, runs, self.model.implementation, self._exact)
        self._observe: Any = jax.jit(partial(_observe, *static))
        self._diverge: Any = jax.jit(partial(_diverge, *static))

    @property
    def others(self) -> int:
        """The number that means: as without a cache. Where layers store differences to those below, which only a
        cache has, it is that of the last of the ways."""
        return len(self.ways) if self._exact else len(self.ways) - 1

    def observe(self, tokens: Int[np.ndarray, " N"]) -> Reference:
        """Of one window, what all its divergences are measured with."""
        return Reference(*self._observe(*self._arguments, jnp.asarray(tokens, jnp.int32)))

    def divergence(self, reference: Reference, chosen: Int[np.ndarray, " L"]) -> float:
        """Of one window, with each layer stored as its number says: 0, 1 ... of `ways`, or `others`."""
        differing = np.flatnonzero(chosen != self.others)
        first = differing[0] if len(differing) else len(chosen)
        return float(self._diverge(*self._arguments, *reference, jnp.asarray(chosen, jnp.int32), jnp.int32(first)))


def _observe(
    model: Transformer,
    runs: tuple[Run, ...],
    implementation: str | None,
    exact: bool,
    params: Any,
    method_params: Any,
    tokens: Int[Array, " N"],
) -> tuple[Array, Any]:
    logits: Any = model.apply({"params": params}, tokens[None], method="score")
    of_sums = (method.running_sum(model.config) for _, (method, *_) in runs)
    of_sum = next((spec for spec in of_sums if spec is not None), None)
    running_sum = None if of_sum is None else allocate_blocks(of_sum, (1, -(-len(tokens) // BLOCK)))
    others = jnp.int32(len(runs[0][1]) - (not exact))
    carry, start, entering = (layers.embed(params, tokens[None]), running_sum), 0, []
    for (count, methods), own in zip(runs, method_params, strict=True):
        layer = partial(_layer, model, methods, implementation, exact, params, own, len(tokens), others)
        carry, seen = lax.scan(lambda c, number, layer=layer: (layer(number, c), c), carry, start + jnp.arange(count))
        entering.append(seen)
        start += count
    return jax.nn.log_softmax(logits[0, :-1]), jax.tree.map(lambda *a: jnp.concatenate(a), *entering)


def _diverge(
    model: Transformer,
    runs: tuple[Run, ...],
    implementation: str | None,
    exact: bool,
    params: Any,
    method_params: Any,
    log_probabilities: Float[Array, "n V"],
    entering: Any,
    chosen: Int[Array, " L"],
    first: Int[Array, ""],
) -> Float[Array, ""]:
    length = len(log_probabilities) + 1
    first = jnp.minimum(first, len(chosen) - 1)
    carry, start = jax.tree.map(lambda a: a[first], entering), 0
    for (count, methods), own in zip(runs, method_params, strict=True):

        def body(number: Array, carry: Any, methods=methods, own=own) -> Any:
            way = chosen[number]
            return _layer(model, methods, implementation, exact, params, own, length, way, number, carry)

        carry = lax.fori_loop(jnp.clip(first, start, start + count), start + count, body, carry)
        start += count
    logits = layers.logits(params, carry[0], model.config)[0, :-1]
    differences = log_probabilities - jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_probabilities) * differences, axis=-1).mean()


def _layer(
    model: Transformer,
    methods: tuple[Method, ...],
    implementation: str | None,
    exact: bool,
    params: Any,
    method_params: tuple[Any, ...],
    length: int,
    way: Int[Array, ""],
    number: Int[Array, ""],
    carry: tuple[Float[Array, "1 N D"], Blocks | None],
) -> tuple[Float[Array, "1 N D"], Blocks | None]:
    """The layer of that number, stored as `way` says: the residual stream and the running sum of the next one."""
    c, (h, running_sum) = model.config, carry
    pick = partial(lax.dynamic_index_in_dim, index=number, keepdims=False)
    geometry = layers.geometry(c, jnp.arange(length)[None], pick(layers.sliding_windows(c)))
    filled = jnp.minimum(jnp.arange(-(-length // BLOCK) * BLOCK), length - 1)[None, :, None]
    branches: list[Any] = [
        partial(_attend_to_stored, method, own, filled, c, implementation, number, geometry, running_sum)
        for method, own in zip(methods, method_params, strict=True)
    ]
    if exact:
        branches.append(partial(_attend_exactly, geometry, running_sum))

    def attend(*inputs: Array) -> tuple[Array, Any]:
        return lax.switch(way, branches, *inputs)

    return layers.layer(jax.tree.map(pick, stacked(layers_of(params))), h, attend, c)


def _attend_exactly(
    geometry: Geometry, running_sum: Blocks | None, h: Array, x: Array, q: Array, k: Array, v: Array
) -> tuple[Array, Blocks | None]:
    """As `_attend_to_stored`, to keys and values that the model computes."""
    return attention.attend(q, k, v, geometry, origin=geometry.positions[:, 0]).out, running_sum
