"""A cache with less in it, for drafts: first tokens and the newest ones (Xiao et al. 2024, arXiv 2309.17453)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from xquant_jax import sharding
from xquant_jax.cache.partition import CachePartition, cache_specs
from xquant_jax.cache.shared import whole_blocks_alone
from xquant_jax.cache.state import Cache, Segment, Shared
from xquant_jax.numerics.packing import BLOCK


def newest(cache: Cache, blocks: int) -> Cache:
    """The cache with the newest `blocks` blocks of every sequence's history, its window, and its first tokens: those
    that are kept as they are, or else its first block. Tokens keep their positions.

    Of what is shared the newest blocks stay as well. The window is the cache's own: what is appended to it is appended
    to a copy. Where there are no more blocks it is the cache itself.
    """
    parts = sharding.devices_along(cache.partition.blocks)
    size = sharding.round_up(blocks, parts)
    shared = cache.shared
    if shared is not None:
        shared = dataclasses.replace(shared, cache=newest(shared.cache, blocks))
    if cache.blocks <= size:
        return dataclasses.replace(cache, shared=shared)
    first = jnp.maximum(cache.history_blocks - size, 0)
    if shared is None and not all(segment.sink for segment in cache.segments):
        shared = Shared(_first_block(cache, first > 0), rows=None)
    return _with_blocks(
        cache,
        first,
        size,
        origins=cache.origins + BLOCK * first,
        history_blocks=cache.history_blocks - first,
        shared=shared,
    )


def _first_block(cache: Cache, there: Array) -> Cache:
    """The first block of the sequences that `there` names."""
    size = sharding.devices_along(cache.partition.blocks)
    none = jnp.zeros_like(cache.lengths)
    lengths = {"lengths": jnp.where(there, BLOCK, 0), "history_blocks": there.astype(jnp.int32), "lost": none}
    return _with_blocks(whole_blocks_alone(cache), none, size, origins=none, shared=None, **lengths)


def _with_blocks(cache: Cache, first: Int[Array, " B"], size: int, **changes: Any) -> Cache:
    """The cache with `size` blocks of each sequence, from block `first` on, and other changes."""
    partition, spec = cache.partition, sharding.RULES.spec("batch")
    bare = dataclasses.replace(cache, shared=None)
    specs = cache_specs(bare)
    of_histories = tuple(segment.history for segment in specs.segments)

    def pick(histories: Any, first: Array) -> Any:
        return jax.tree.map(lambda a: _pick(a, first, size, partition), histories)

    picked = sharding.on_shards(pick, (of_histories, spec), of_histories)
    histories = picked(tuple(segment.history for segment in cache.segments), first)
    segments: tuple[Segment, ...] = tuple(
        dataclasses.replace(segment, history=own) for segment, own in zip(cache.segments, histories, strict=True)
    )
    running_sum = jax.tree.map(lambda a: a[:, :size], cache.running_sum)  # its contents mean nothing between steps
    capacity = size * BLOCK + BLOCK - 1
    return dataclasses.replace(cache, segments=segments, running_sum=running_sum, capacity=capacity, **changes)


def _pick(
    blocks: Array,  # [L, B, N, ...], a device's own
    first: Array,
    size: int,
    partition: CachePartition,
) -> Array:
    """Blocks of each row from its `first` on, [L, B, size, ...]; on a mesh a device's share of them."""
    parts, own = sharding.devices_along(partition.blocks), blocks.shape[2]
    if parts == 1:
        cut = jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, size, axis=1), in_axes=(1, 0), out_axes=1)
        return cut(blocks, first)
    shard = sharding.shard_index(partition.blocks)
    places = first[:, None] + jnp.arange(size)[None] - own * shard
    mine = jnp.where((places >= 0) & (places < own), places, own)
    found = jax.vmap(lambda row, at: row.at[:, at].get(mode="fill", fill_value=0), in_axes=(1, 0), out_axes=1)
    whole = lax.psum(found(blocks, mine), partition.blocks)  # one device has each block
    return lax.dynamic_slice_in_dim(whole, size // parts * shard, size // parts, axis=2)
