"""Writing new tokens' vectors into the windows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Float, Int

from xquant_jax import sharding
from xquant_jax.cache.partition import CachePartition
from xquant_jax.cache.state import Cache, check_room, pad, window_room
from xquant_jax.errors import CacheFullError, ConfigError
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.sharding import Axes, P


def append(
    cache: Cache, new: tuple[dict[str, Float[Array, "_L B T _C"]], ...], counts: Int[Array, " B"], *, grow: bool = True
) -> Cache:
    """Writes the first `counts` of T new vectors of each sequence behind its window; the rest is dropped.

    `new` has one entry per segment. Flush whole blocks before the next append: a window holds at most 127 tokens and
    these T (it grows where they do not fit, and `flush` gives the room back; without `grow` it has the places that it
    has). Outside of compiled code a cache that is full, or was not flushed, raises `CacheFullError`; inside, lengths
    stop where the room does and `lost` counts the tokens that were dropped (`check_nothing_lost`).
    """
    length = jax.tree.leaves(new)[0].shape[2]
    places = cache.places
    wide = max(places, window_room(length, cache.partition)) if grow else places
    room = _room(cache, places, wide)
    _check_append(cache, counts, length, room)
    asked, counts = counts, jnp.clip(counts, 0, room)
    segments = tuple(
        dataclasses.replace(
            segment,
            window=_extend(segment.window, vectors, cache.window_lengths, counts, cache.partition, wide),
        )
        for segment, vectors in zip(cache.segments, new, strict=True)
    )
    return dataclasses.replace(
        cache, lengths=cache.lengths + counts, lost=cache.lost + asked - counts, segments=segments
    )


def _room(cache: Cache, places: int, wide: int) -> Int[Array, " B"]:
    """How many tokens of each sequence fit: into the cache, and, before the next flush, into its window, which has
    `places` and can have `wide`."""
    fits = wide - cache.window_lengths
    if places < wide:  # it grows, which takes a window that was flushed
        fits = jnp.where(cache.window_lengths < BLOCK, fits, 0)
    return jnp.maximum(0, jnp.minimum(fits, cache.capacity + cache.origins - cache.lengths))


def new_vectors_spec(partition: CachePartition, length: int) -> P:
    """The partition of a layer's new vectors [B, T, C]."""
    return P(sharding.RULES.batch, _new_tokens_axes(partition, length), partition.channels)


def _new_tokens_axes(partition: CachePartition, length: int) -> Axes:
    """Each device keeps some of the new tokens where they divide, else all."""
    return () if length % sharding.devices_along(partition.blocks) else partition.blocks


def _extend(
    windows: dict[str, Float[Array, "L B W _C"]],
    vectors: dict[str, Float[Array, "L B T _C"]],
    window_lengths: Int[Array, " B"],
    counts: Int[Array, " B"],
    partition: CachePartition,
    room: int,
) -> dict[str, Float[Array, "L B {room} _C"]]:
    """The windows with `counts` of the vectors behind their `window_lengths`, made wider if they have less places than
    `room`."""
    length, places = (next(iter(arrays.values())).shape[2] for arrays in (vectors, windows))
    split = _new_tokens_axes(partition, length)

    def write(window: Array, vectors: Array, window_lengths: Array, counts: Array) -> Array:
        """Into the places that exist: a few at once, for all layers."""
        width = window.shape[2]
        rows, number = jnp.arange(window.shape[1])[:, None], jnp.arange(length)[None]
        places = window_lengths[:, None] + number - width * sharding.shard_index(partition.blocks)
        exists = (number < counts[:, None]) & (places >= 0) & (places < width)
        vectors = sharding.gather(vectors, split, axis=2)
        return window.at[:, rows, jnp.where(exists, places, width)].set(vectors.astype(window.dtype), mode="drop")

    def widen(
        window: Float[Array, "*L B W C"], vectors: Float[Array, "*L B T C"], window_lengths: Array
    ) -> Float[Array, "*L B _own C"]:
        """Into a wider window, all of a sequence at once: what lies behind the first `counts` means nothing."""
        own = room // sharding.devices_along(partition.blocks)
        window = pad(sharding.gather(window, partition.blocks, axis=window.ndim - 2), room)
        vectors = sharding.gather(vectors, split, axis=vectors.ndim - 2).astype(window.dtype)
        outer = (0,) * (window.ndim - 3)

        def sequence(b: Array, window: Array) -> Array:
            new = lax.dynamic_slice_in_dim(vectors, b, 1, axis=-3)
            return lax.dynamic_update_slice(window, new, (*outer, b, window_lengths[b], 0))

        wide = lax.fori_loop(0, window.shape[-3], sequence, window)
        return lax.dynamic_slice_in_dim(wide, own * sharding.shard_index(partition.blocks), own, axis=-2)

    def extend(windows: Any, vectors: Any, window_lengths: Array, counts: Array) -> Any:
        if places == room:
            return jax.tree.map(lambda w, v: write(w, v, window_lengths, counts), windows, vectors)

        def widen_all(both: tuple[Any, Any]) -> Any:
            return jax.tree.map(lambda w, v: widen(w, v, window_lengths), *both)

        if sharding.devices_along(partition.blocks) == 1:
            return widen_all((windows, vectors))
        # what is gathered stays small; in one loop: XLA for CPU runs two at once and mixes up their collectives
        return lax.map(widen_all, (windows, vectors))

    batch = sharding.RULES.spec("batch")
    of_windows = dict.fromkeys(windows, partition.window)
    of_vectors = dict.fromkeys(windows, P(None, *new_vectors_spec(partition, length)))
    extended = sharding.on_shards(extend, (of_windows, of_vectors, batch, batch), of_windows)
    return jax.tree.map(_layer_by_layer, extended(windows, vectors, window_lengths, counts))


def _layer_by_layer(window: Float[Array, "L B W C"]) -> Float[Array, "L B W C"]:
    """With layers outermost, as they are read. XLA for TPU prefers them next to the channels to write one token of all
    layers at once; every layer would then read all."""
    return with_layout_constraint(window, DeviceLayout((0, 1, 2, 3)))


def _check_append(cache: Cache, counts: Array, length: int, room: Array) -> None:
    if any(isinstance(a, Tracer) for a in (cache.lengths, cache.history_blocks, counts)):
        return
    if int(jnp.max(counts)) > length:
        raise ConfigError(f"counts={counts} is not possible; there are {length} new vectors")
    check_room(cache.capacity, int((cache.lengths - cache.origins + counts).max()))
    if bool((counts > room).any()):
        raise CacheFullError(
            f"the window has room for {room} tokens more, and whole blocks were not flushed; call flush first"
        )
