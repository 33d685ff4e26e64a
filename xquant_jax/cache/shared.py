"""What several sequences begin with, stored once; and their queries to it, folded as if they were one sequence's:
rebuilding keys costs the same for one query as for sixteen.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import MOST_NEW_TOKENS
from xquant_jax.cache.state import Cache, Shared
from xquant_jax.numerics.attention import Part
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import allocate_blocks


class Seats(NamedTuple):
    """m seats in each of G shared rows, and who sits there.

    takers: int32 [G, m], the sequence in each seat; B: none
    rows, seats: int32 [B], where each sequence sits
    seated: bool [B], whether it does
    """

    takers: Int[Array, "G m"]
    rows: Int[Array, " B"]
    seats: Int[Array, " B"]
    seated: Bool[Array, " B"]

    def fold(self, a: Array, nothing: int) -> Array:
        """[B, T, ...] -> [G, m T, ...], `nothing` where nobody sits."""
        picked = a.at[self.takers].get(mode="fill", fill_value=nothing)
        return picked.reshape(len(self.takers), -1, *a.shape[2:])

    def read(self, cache: Cache) -> Cache:
        """The shared rows without what nobody who sits here reads."""
        used = (self.takers < len(self.rows)).any(axis=1)
        return dataclasses.replace(cache, history_blocks=jnp.where(used, cache.history_blocks, 0))

    def unfold(self, part: Part) -> Part:
        """Of folded queries -> of the sequences'; one that has no seat gets a part without keys."""

        def pick(a: Array) -> Array:
            return a.reshape(*self.takers.shape, -1, *a.shape[2:])[self.rows, self.seats]

        seated = self.seated[:, None, None]
        return Part(jnp.where(seated[..., None], pick(part.out), 0), jnp.where(seated, pick(part.lse), -jnp.inf))


def seated(rows: Int[Array, " B"], groups: int, most: int, length: int) -> list[Seats]:
    """Seats for sequences with `length` queries each, in as many rounds as it takes for kernels to decode all that sit
    in one row together.

    rows: the row that each sequence begins with, -1 for none
    groups: how many rows there are
    most: sequences of one row, at most
    """
    size = len(rows)
    numbers = jnp.arange(size)
    members = jnp.sort(jnp.where(rows[None] == jnp.arange(groups)[:, None], numbers[None], size), axis=1)  # [G, B]
    alike = rows[:, None] == rows[None]
    place = jnp.sum(alike & (numbers[None] < numbers[:, None]), axis=1)  # among those of its row
    most = min(most, size)
    at_once = most if length > MOST_NEW_TOKENS else min(most, MOST_NEW_TOKENS // length)
    return [
        Seats(
            members[:, start : start + at_once],
            jnp.maximum(rows, 0),
            jnp.clip(place - start, 0, at_once - 1),
            (rows >= 0) & (place >= start) & (place < start + at_once),
        )
        for start in range(0, most, at_once)
    ]


def with_prefix(cache: Cache, prefix: Cache | None) -> Cache:
    """The cache, with this one row shared by all sequences that begin behind it."""
    if prefix is None:
        return cache
    if cache.shared is not None:
        return dataclasses.replace(
            cache, shared=dataclasses.replace(cache.shared, cache=with_prefix(cache.shared.cache, prefix))
        )
    if cache.running_sum is not None:  # it means nothing between steps, and is not kept
        running_sum = allocate_blocks(cache.running_sum.spec, (1, prefix.blocks))
        prefix = dataclasses.replace(prefix, running_sum=running_sum)
    rows = jnp.where(cache.origins > 0, 0, -1)
    return dataclasses.replace(cache, shared=Shared(prefix, rows, most=len(rows)))


def without_prefix(cache: Cache, prefix: Cache | None) -> Cache:
    """The cache as it was before `with_prefix`."""
    if prefix is None:
        return cache
    shared = cache.shared
    if shared is not None and shared.cache.shared is not None:
        shared = dataclasses.replace(shared, cache=without_prefix(shared.cache, prefix))
    else:
        shared = None
    return dataclasses.replace(cache, shared=shared)


def window_alone(cache: Cache, tokens: int) -> Cache:
    """The cache without its history, for `tokens` tokens: less than a block."""
    segments = tuple(
        dataclasses.replace(
            segment,
            history=jax.tree.map(lambda a: a[:, :, :0], segment.history),
            window={name: w[:, :, :tokens] for name, w in segment.window.items()},
        )
        for segment in cache.segments
    )
    running_sum = jax.tree.map(lambda a: a[:, :0], cache.running_sum)
    return dataclasses.replace(cache, segments=segments, running_sum=running_sum, capacity=tokens)


def whole_blocks_alone(cache: Cache) -> Cache:
    """The cache without its windows."""
    segments = tuple(
        dataclasses.replace(segment, window={name: w[:, :, :0] for name, w in segment.window.items()})
        for segment in cache.segments
    )
    lengths = cache.origins + BLOCK * cache.history_blocks
    return dataclasses.replace(cache, segments=segments, lengths=lengths)
