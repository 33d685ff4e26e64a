"""Attention to all that a layer has stored: its window, its first tokens where they are kept, and its history.

On a mesh every device attends to its own share, and the parts are merged by log-sum-exp. Keys and values never travel:
only queries, and one partial result a device.
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
from xquant_jax import sharding
from xquant_jax.cache.state import Cache, Segment
from xquant_jax.config import ModelConfig
from xquant_jax.numerics import attention, rope
from xquant_jax.numerics.attention import LOWEST, Geometry, Part
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks
from xquant_jax.sharding import RULES, Axes, P


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's view of a cache: the whole cache, a segment's unsliced arrays, and the index of the layer in them.

    `running_sum` is that of the layers below. On a mesh a device has some of a sequence's blocks and of its window's
    places: those from `first_block` and from `first_place` on. `history_blocks` and `window_lengths` count the whole
    sequence's.
    """

    segment: Segment
    layer: Int[Array, ""]
    history_blocks: Int[Array, " B"]
    window_lengths: Int[Array, " B"]
    running_sum: Blocks | None
    first_block: Int[Array, ""] | int = 0
    first_place: Int[Array, ""] | int = 0

    @classmethod
    def of(cls, cache: Cache, segment: Segment, layer: Int[Array, ""], running_sum: Blocks | None) -> "LayerCache":
        return cls(segment, layer, cache.history_blocks, cache.window_lengths, running_sum)

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


def attend_stored(
    method_params: Any,
    q: Float[Array, "B T H d"],
    layer_cache: LayerCache,
    geometry: Geometry,
    config: ModelConfig,
    cache: Cache,
) -> tuple[Part, Blocks | None]:
    """Attention to everything that a layer has stored, and the running sum with the layer in it.

    `cache` says how the arrays lie and which kernels read them; `layer_cache` holds those of the layer. On a mesh
    queries are gathered from the devices that share a block, and heads split again.
    """
    partition, implementation = cache.partition, cache.implementation
    if not sharding.active():
        return attend_own(method_params, q, layer_cache, geometry, config, implementation)
    heads = sharding.devices_along(partition.channels)
    own_config = dataclasses.replace(
        config, num_heads=config.num_heads // heads, num_kv_heads=config.num_kv_heads // heads
    )
    segment = layer_cache.segment

    def attend(
        method_params: Any,
        q: Array,
        arrays: tuple[Any, ...],
        running_sum: Blocks | None,
        layer: Array,
        positions: Array,
        sliding_window: Array,
        frequencies: Array,
    ) -> tuple[Part, Blocks | None]:
        history, window, sink, history_blocks, window_lengths = arrays
        shard = sharding.shard_index(partition.blocks)
        own = LayerCache(
            dataclasses.replace(segment, history=partition.share(history), window=window, sink=sink),
            layer,
            history_blocks,
            window_lengths,
            running_sum,
            first_block=shard * next(iter(history.values())).planes[0].shape[2],
            first_place=shard * next(iter(window.values())).shape[2],
        )
        here = dataclasses.replace(
            geometry, positions=positions, sliding_window=sliding_window, frequencies=frequencies
        )
        part, running_sum = attend_own(method_params, q, own, here, own_config, implementation)
        return _merge_over(part, partition.blocks, split), running_sum

    batch = RULES.spec("batch")
    of_queries = P(RULES.batch, None, partition.channels)
    tokens = sharding.tokens_axis(q.shape[1])
    of_result: Any = RULES.spec("batch", tokens, "heads")
    split = {1: RULES.tokens} if tokens else {}
    if not partition.channels:
        split[2] = RULES.heads
    of_running_sum = None if layer_cache.running_sum is None else partition.running_sum
    run = sharding.on_shards(
        attend,
        (
            partition.method_params(method_params),
            of_queries,
            (partition.history, partition.window, partition.sink, batch, batch),
            of_running_sum,
            P(),
            batch,
            P(),
            P(),
        ),
        (Part(of_result, of_result), of_running_sum),
    )
    counts = (layer_cache.history_blocks, layer_cache.window_lengths)
    arrays = (segment.history, segment.window, segment.sink, *counts)
    window = jnp.asarray(geometry.sliding_window, jnp.int32)
    of_layer = (layer_cache.running_sum, layer_cache.layer)
    return run(method_params, q, arrays, *of_layer, geometry.positions, window, geometry.frequencies)


def attend_own(
    method_params: Any,
    q: Float[Array, "B T H d"],
    layer_cache: LayerCache,
    geometry: Geometry,
    config: ModelConfig,
    implementation: str | None = None,
) -> tuple[Part, Blocks | None]:
    """The same without a mesh, or to what one device has, `config` telling the heads that it has.

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

    recent = _attend_recent(q, layer_cache, geometry, keys_values)
    skip = method.sink - BLOCK * layer_cache.first_block
    history, layer, running_sum = layer_cache.segment.history, layer_cache.layer, layer_cache.running_sum
    history_blocks = jnp.clip(layer_cache.history_blocks - layer_cache.first_block, 0, layer_cache.blocks)
    geometry = dataclasses.replace(geometry, positions=geometry.positions - BLOCK * layer_cache.first_block)
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
    both = attention.merge(recent, old)
    return (both if absorbed is None else Part(absorbed.project(both.out), both.lse)), running_sum


def _attend_recent(q: Float[Array, "B T H d"], layer_cache: LayerCache, geometry: Geometry, keys_values: Read) -> Part:
    """Attention to the window, and to the first tokens where they are kept."""
    vectors, origin = layer_cache.window(), BLOCK * layer_cache.history_blocks + layer_cache.first_place
    numbers = jnp.arange(next(iter(vectors.values())).shape[1])[None]
    exists = numbers < (layer_cache.window_lengths - layer_cache.first_place)[:, None]
    if sink := layer_cache.sink():
        vectors = {name: jnp.concatenate([sink[name], new], axis=1) for name, new in vectors.items()}
        kept = jnp.arange(layer_cache.segment.method.sink)[None]
        there = (layer_cache.history_blocks > 0) & (layer_cache.first_block == 0)
        numbers = jnp.concatenate([kept - origin[:, None], jnp.broadcast_to(numbers, exists.shape)], axis=1)
        exists = jnp.concatenate([jnp.broadcast_to(there[:, None], (len(there), kept.shape[1])), exists], axis=1)
    vectors = {name: own.astype(q.dtype) for name, own in vectors.items()}
    return attention.attend(q, *keys_values(vectors), geometry, origin=origin, numbers=numbers, exists=exists)


def _merge_over(part: Part, axes: Axes, split: dict[int, Axes]) -> Part:
    """The merge of the parts that the devices along `axes` have, each keeping its share of what `split` names.

    split: array axis -> mesh axes, which are among `axes`
    """
    top = jnp.maximum(lax.pmax(part.lse, axes), LOWEST)
    weight = jnp.exp(part.lse - top)
    sums = [part.out * weight[..., None], weight]
    for axis, along in split.items():
        sums = [lax.psum_scatter(x, along, scatter_dimension=axis, tiled=True) for x in sums]
        own = sums[1].shape[axis]
        top = lax.dynamic_slice_in_dim(top, own * lax.axis_index(along), own, axis)
    rest = tuple(axis for axis in axes if axis not in sum(split.values(), ()))
    out, total = lax.psum(sums, rest) if rest else sums
    return Part(out / jnp.where(total > 0, total, 1.0)[..., None], top + jnp.log(total))
