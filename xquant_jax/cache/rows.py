"""Rows of a cache: a sequence each."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from xquant_jax import sharding
from xquant_jax.cache.partition import cache_specs, constrain_cache
from xquant_jax.cache.state import Cache


def copy_rows(cache: Cache, own: Cache, targets: Int[Array, " R"]) -> Cache:
    """The cache with the rows of another in its slots. What a slot had beyond their blocks is never read."""
    shared, cache, own = cache.shared, *(dataclasses.replace(c, shared=None) for c in (cache, own))
    specs = cache_specs(cache)
    copy = sharding.on_shards(_copy_own_rows, (specs, cache_specs(own), sharding.P()), specs)
    return dataclasses.replace(copy(cache, own, targets), shared=shared)


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
    """The cache with zeros for all that these rows have stored.

    What lies beyond a sequence's length is never attended to, but with weight zero it is multiplied: numbers that are
    not finite would reach the next sequence of the row.
    """

    def clear(whole: Array) -> Array:
        """[L, B, ...]"""
        return jnp.where(jnp.expand_dims(rows, (0, *range(2, whole.ndim))), jnp.zeros((), whole.dtype), whole)

    def clear_sum(whole: Array) -> Array:
        """[B, ...]"""
        return jnp.where(jnp.expand_dims(rows, tuple(range(1, whole.ndim))), jnp.zeros((), whole.dtype), whole)

    return constrain_cache(
        dataclasses.replace(
            cache,
            segments=jax.tree.map(clear, cache.segments),
            running_sum=jax.tree.map(clear_sum, cache.running_sum),
        )
    )
