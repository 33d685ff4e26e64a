"""One layer of a cache, and attention to what it has stored: its window, its first tokens where they are kept, and its
history. On one device, or to the share that one has.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels import MOST_NEW_TOKENS, Accumulate, DecodeAttention
from pallas_kernels.xla import Read, attend_history
from xquant_jax.cache.methods.base import Absorbed
from xquant_jax.cache.state import Segment
from xquant_jax.config import ModelConfig
from xquant_jax.numerics import attention, rope
from xquant_jax.numerics.attention import Geometry, Part
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's view of a cache: the whole cache, a segment's unsliced arrays, and the index of the layer in them.

    `running_sum` is that of the layers below. On a mesh a device has some of a sequence's blocks and of its window's
    places: those from `first_block` and from `first_place` on. `history_blocks` and `window_lengths` count the whole
    sequence's, `origins` the tokens before them. `new`: vectors like the window's of T tokens that follow it, each of
    which attends to those before it.
    """

    segment: Segment
    layer: Int[Array, ""]
    origins: Int[Array, " B"]
    history_blocks: Int[Array, " B"]
    window_lengths: Int[Array, " B"]
    running_sum: Blocks | None
    new: dict[str, Float[Array, "B T _C"]] | None = None
    alone: bool = False  # whether nothing is shared: the first tokens are those of each sequence, wherever it goes on
    first_block: Int[Array, ""] | int = 0
    first_place: Int[Array, ""] | int = 0

    @property
    def blocks(self) -> int:
        """How many blocks of a sequence this device has room for."""
        return next(iter(self.segment.history.values())).planes[0].shape[2]

    def window(self) -> dict[str, Array]:
        """The newest vectors of this layer, [B, W, C] by name."""
        return self._pick(self.segment.window)

    def sink(self) -> dict[str, Array]:
        """The first vectors of this layer's history as they were, [B, n, C] by name."""
        return self._pick(self.segment.sink)

    def _pick(self, arrays: dict[str, Array]) -> dict[str, Array]:
        return {name: lax.dynamic_index_in_dim(a, self.layer, keepdims=False) for name, a in arrays.items()}


def attend_own(
    method_params: Any,
    q: Float[Array, "B T H d"],
    layer_cache: LayerCache,
    geometry: Geometry,
    config: ModelConfig,
    implementation: str | None = None,
) -> tuple[Part, Blocks | None]:
    """Attention to a layer's history, window and first tokens, and the running sum with the layer in it.

    On a mesh to what one device has, `config` telling the heads that it has.

    Up to `MOST_NEW_TOKENS` new tokens values are absorbed, which equals the definition but for rounding.
    """
    method = layer_cache.segment.method
    if method.keys_rotated:
        q = rope.rotate_heads(q, geometry.positions, geometry.frequencies)
        geometry = dataclasses.replace(geometry, rotated=True)
    absorbed = method.absorbed(method_params, config) if q.shape[1] <= MOST_NEW_TOKENS else None

    def keys_values(vectors: dict[str, Array]) -> tuple[Array, Array]:
        if absorbed is None:
            return method.rebuild(method_params, vectors, config)
        vectors = absorbed.prepare(vectors) if absorbed.prepare else vectors
        z = vectors[absorbed.value]
        k = absorbed.key_rebuild(vectors[absorbed.key], config.num_kv_heads)
        return k, z.reshape(*z.shape[:2], absorbed.value_heads, -1)

    parts = _attend_recent(q, layer_cache, geometry, keys_values)
    history, layer, running_sum = layer_cache.segment.history, layer_cache.layer, layer_cache.running_sum
    if not layer_cache.blocks:
        return _projected(parts, absorbed), running_sum
    skip = jnp.where(layer_cache.origins == 0, method.sink, 0) - BLOCK * layer_cache.first_block
    history_blocks = jnp.clip(layer_cache.history_blocks - layer_cache.first_block, 0, layer_cache.blocks)
    first = layer_cache.origins + BLOCK * layer_cache.first_block
    geometry = dataclasses.replace(geometry, positions=geometry.positions - first[:, None])
    if method.has_running_sum:
        assert running_sum is not None
        (stream,) = history.values()
        accumulation = method.accumulation(method_params)
        call = Accumulate(running_sum, stream, accumulation, history_blocks, layer)
        running_sum = pallas_kernels.run(call, implementation)
        total: Blocks = jax.tree.map(lambda a: a[None], running_sum)
        history, layer = dict.fromkeys(layer_cache.segment.window, total), 0
    if absorbed is not None and absorbed.prepare is None:
        call = DecodeAttention(
            q,
            history[absorbed.key],
            absorbed.key_rebuild,
            None if absorbed.value == absorbed.key else history[absorbed.value],
            history_blocks,
            geometry,
            layer,
            skip=skip,
            num_kv_heads=config.num_kv_heads,
            value_heads=absorbed.value_heads,
        )
        old = pallas_kernels.run(call, implementation)
    else:
        if q.shape[1] <= MOST_NEW_TOKENS:
            pallas_kernels.decode_without_kernel(implementation, f"it has no form of {method.name} with these options")
        old = attend_history(
            q,
            history,
            layer,
            history_blocks,
            keys_values,
            geometry,
            codebooks=method.codebooks(method_params),
            skip=skip,
        )
    return _projected([*parts, old], absorbed), running_sum


def _projected(parts: list[Part], absorbed: Absorbed | None) -> Part:
    """The parts as one, with values."""
    whole = attention.merge(*parts)
    return whole if absorbed is None else Part(absorbed.project(whole.out), whole.lse)


def _attend_recent(
    q: Float[Array, "B T H d"], layer_cache: LayerCache, geometry: Geometry, keys_values: Read
) -> list[Part]:
    """Attention to the window, to the first tokens where they are kept, and to new tokens: one part, or none if there
    is no place for any of them."""
    vectors, origin = layer_cache.window(), BLOCK * layer_cache.history_blocks + layer_cache.first_place
    origin = origin + layer_cache.origins
    numbers = jnp.arange(next(iter(vectors.values())).shape[1])[None]
    filled = (layer_cache.window_lengths - layer_cache.first_place)[:, None]
    exists = (numbers < filled)[:, None]
    if sink := layer_cache.sink():
        vectors = {name: jnp.concatenate([sink[name], new], axis=1) for name, new in vectors.items()}
        kept = jnp.arange(layer_cache.segment.method.sink)[None]
        begins = (layer_cache.origins == 0) | layer_cache.alone
        there = (layer_cache.history_blocks > 0) & begins & (layer_cache.first_block == 0)
        numbers = _joined(kept - origin[:, None], numbers)
        exists = _joined(jnp.broadcast_to(there[:, None, None], (len(there), 1, kept.shape[1])), exists)
    vectors = {name: own.astype(q.dtype) for name, own in vectors.items()}
    if layer_cache.new is not None:
        vectors = {name: _joined(own, layer_cache.new[name].astype(own.dtype), 1) for name, own in vectors.items()}
        numbers = _joined(numbers, filled + jnp.arange(q.shape[1])[None])
        exists = _joined(exists, jnp.tri(q.shape[1], k=-1, dtype=bool)[None] & (layer_cache.first_place == 0))
    if not numbers.shape[1]:
        return []
    return [attention.attend(q, *keys_values(vectors), geometry, origin=origin, numbers=numbers, exists=exists)]


def _joined(one: Array, two: Array, axis: int = -1) -> Array:
    """Both along an axis; along the others what is 1 wide is repeated."""
    axis %= one.ndim
    shape = jnp.broadcast_shapes(*(tuple(1 if i == axis else n for i, n in enumerate(a.shape)) for a in (one, two)))
    wide = (jnp.broadcast_to(a, (*shape[:axis], a.shape[axis], *shape[axis + 1 :])) for a in (one, two))
    return jnp.concatenate(list(wide), axis=axis)
