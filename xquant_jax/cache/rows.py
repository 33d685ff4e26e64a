"""Rows of a cache: a sequence each."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from xquant_jax import sharding
from xquant_jax.cache.partition import cache_specs, constrain_cache
from xquant_jax.cache.shared import whole_blocks_alone
from xquant_jax.cache.state import Cache
from xquant_jax.numerics.packing import BLOCK


def copy_rows(cache: Cache, own: Cache, targets: Int[Array, " R"]) -> Cache:
    """The cache with the rows of another in its slots. What a slot had beyond their blocks is never read."""
    shared, cache, own = cache.shared, *(dataclasses.replace(c, shared=None) for c in (cache, own))
    specs = cache_specs(cache)
    copy = sharding.on_shards(_copy_own_rows, (specs, cache_specs(own), sharding.P()), specs)
    return dataclasses.replace(copy(cache, own, targets), shared=shared)


def share_rows(cache: Cache, own: Cache, rows: Int[Array, " R"], targets: Int[Array, " S"]) -> Cache:
    """The cache with the whole blocks of the rows of another in its shared `rows`, once, and the rest of each in as
    many of its own `targets` as there are to each, one after another. B and G: nowhere."""
    answers, shared = len(targets) // len(rows), cache.shared
    assert shared is not None
    assert shared.rows is not None

    def repeat(a: Array, axis: int) -> Array:
        return jnp.repeat(a, answers, axis=axis)

    rest = dataclasses.replace(
        own,
        lengths=repeat(own.lengths, 0),
        lost=repeat(own.lost, 0),
        origins=repeat(own.origins + BLOCK * own.history_blocks, 0),
        history_blocks=jnp.zeros(len(targets), jnp.int32),
        segments=tuple(
            dataclasses.replace(
                segment,
                history=jax.tree.map(lambda a: repeat(a[:, :, :0], 1), segment.history),
                window=jax.tree.map(lambda a: repeat(a[:, :, : cache.places], 1), segment.window),
                sink=jax.tree.map(lambda a: repeat(a, 1), segment.sink),
            )
            for segment in own.segments
        ),
    )
    shared = dataclasses.replace(
        shared,
        cache=copy_rows(shared.cache, whole_blocks_alone(own), rows),
        rows=shared.rows.at[targets].set(repeat(rows, 0), mode="drop"),
    )
    return dataclasses.replace(copy_rows(cache, rest, targets), shared=shared)


def load_blocks(own: Cache, store: Cache, numbers: Int[Array, "R N"]) -> Cache:
    """Rows of a cache with blocks of a store, a row of which is one block, and with the first tokens kept with it."""

    def load(into: Array, stored: Array) -> Array:
        """[L, R, n, ...] and [L, P, 1, ...]."""
        size = min(into.shape[2], numbers.shape[1])
        return into.at[:, :, :size].set(stored.at[:, numbers[:, :size], 0].get(mode="clip"))

    segments = tuple(
        dataclasses.replace(
            segment,
            history=jax.tree.map(load, segment.history, stored.history),
            sink={name: stored.sink[name].at[:, numbers[:, 0]].get(mode="clip") for name in segment.sink},
        )
        for segment, stored in zip(own.segments, store.segments, strict=True)
    )
    return dataclasses.replace(own, segments=segments)


def save_blocks(store: Cache, own: Cache, numbers: Int[Array, "R N"]) -> Cache:
    """The store with the blocks of rows of a cache at these numbers; one that it does not have: nowhere."""

    def save(stored: Array, made: Array) -> Array:
        size = min(made.shape[2], numbers.shape[1])
        return stored.at[:, numbers[:, :size], 0].set(made[:, :, :size], mode="drop")

    segments = tuple(
        dataclasses.replace(
            stored,
            history=jax.tree.map(save, stored.history, segment.history),
            sink={
                name: sink.at[:, numbers[:, 0]].set(segment.sink[name], mode="drop")
                for name, sink in stored.sink.items()
            },
        )
        for segment, stored in zip(own.segments, store.segments, strict=True)
    )
    return dataclasses.replace(store, segments=segments)


def _copy_own_rows(cache: Cache, own: Cache, targets: Array) -> Cache:
    batch, size = sharding.RULES.batch, cache.lengths.shape[0]
    targets = targets - size * sharding.shard_index(batch)
    targets = jnp.where((targets >= 0) & (targets < size), targets, size)

    def put(whole: Array, part: Array) -> Array:
        """[L, B, N, ...] and [L, R, n, ...]: blocks, or places of a window."""
        return whole.at[:, targets, : part.shape[2]].set(sharding.gather(part, batch, axis=1), mode="drop")

    def put_number(whole: Array, part: Array) -> Array:
        return whole.at[targets].set(sharding.gather(part, batch, axis=0), mode="drop")

    return dataclasses.replace(
        cache,
        lengths=put_number(cache.lengths, own.lengths),
        origins=put_number(cache.origins, own.origins),
        lost=put_number(cache.lost, own.lost),
        history_blocks=put_number(cache.history_blocks, own.history_blocks),
        segments=jax.tree.map(put, cache.segments, own.segments),
    )


@partial(jax.jit, donate_argnames="cache")
def clear_rows(cache: Cache, rows: Bool[Array, " B"]) -> Cache:
    """The cache with zeros for all that these rows have stored, also in shared rows that nobody else reads.

    What lies beyond a sequence's length is never attended to, but with weight zero it is multiplied: numbers that are
    not finite would reach the next sequence of the row.
    """

    def clear(whole: Array) -> Array:
        """[L, B, ...]"""
        return jnp.where(jnp.expand_dims(rows, (0, *range(2, whole.ndim))), jnp.zeros((), whole.dtype), whole)

    def clear_sum(whole: Array) -> Array:
        """[B, ...]"""
        return jnp.where(jnp.expand_dims(rows, tuple(range(1, whole.ndim))), jnp.zeros((), whole.dtype), whole)

    shared = cache.shared
    if shared is not None and shared.rows is not None:
        reads = shared.rows[None] == jnp.arange(len(shared.cache.lengths))[:, None]
        alone = (reads & rows[None]).any(axis=1) & ~(reads & ~rows[None]).any(axis=1)
        shared = dataclasses.replace(shared, cache=clear_rows(shared.cache, alone))
    return constrain_cache(
        dataclasses.replace(
            cache,
            segments=jax.tree.map(clear, cache.segments),
            running_sum=jax.tree.map(clear_sum, cache.running_sum),
            shared=shared,
        )
    )
