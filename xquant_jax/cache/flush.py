"""Moving whole blocks from the windows into the history, quantized."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from xquant_jax import sharding
from xquant_jax.cache.partition import CachePartition, cache_specs
from xquant_jax.cache.state import Cache, pad, window_room
from xquant_jax.cache.store import store_and_read, without_sink
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, allocate_blocks
from xquant_jax.parameters import stacked


def flush(cache: Cache, method_params: tuple[Any, ...]) -> Cache:
    """Quantizes every whole block in the windows and moves it into the history; windows get their room back.

    Layer after layer, as a method may store the difference to what was read back from the layer before (`method_params`
    are those of the forward pass).
    """
    if cache.places < BLOCK:
        return cache
    with jax.named_scope("flush"):
        return _settle(cache, _quantize_whole_blocks(cache, method_params))


def flush_when_due(cache: Cache, method_params: tuple[Any, ...]) -> Cache:
    """`flush` if a sequence has a whole block in its window, under one `lax.cond`; only histories pass through it."""
    if cache.places < BLOCK:
        return cache
    with jax.named_scope("flush"):
        due = jnp.any(cache.window_lengths >= BLOCK)
        histories = lax.cond(
            due,
            lambda cache: _quantize_whole_blocks(cache, method_params),
            lambda cache: tuple(segment.history for segment in cache.segments),
            cache,
        )
        return _settle(cache, histories)


def _quantize_whole_blocks(cache: Cache, method_params: tuple[Any, ...]) -> tuple[dict[str, Blocks], ...]:
    """The histories with every whole block of the windows in them.

    On a mesh every device gathers the windows, layer after layer, and keeps the blocks that are its own.
    """
    cache, method_params = dataclasses.replace(cache, shared=None), tuple(map(stacked, method_params))
    specs = cache_specs(cache)
    histories = tuple(segment.history for segment in specs.segments)
    of_params = cache.partition.stacked_params(method_params)
    return sharding.on_shards(_quantize_own_blocks, (specs, of_params), histories)(cache, method_params)


def _quantize_own_blocks(cache: Cache, method_params: tuple[Any, ...]) -> tuple[dict[str, Blocks], ...]:
    partition, whole = cache.partition, cache.window_lengths // BLOCK
    batch = whole.shape[0]
    rows = jnp.arange(batch)[:, None]
    places = next(iter(cache.segments[0].window.values())).shape[2] * sharding.devices_along(partition.blocks)
    candidates = jnp.arange(places // BLOCK)[None]
    capacity = next(iter(cache.segments[0].history.values())).planes[0].shape[2]
    targets = cache.history_blocks[:, None] + candidates - capacity * sharding.shard_index(partition.blocks)
    kept = (candidates < whole[:, None]) & (targets >= 0) & (targets < capacity)
    targets = jnp.where(kept, targets, capacity)  # capacity: dropped

    histories, start = [], 0
    running_sum = (
        None if cache.running_sum is None else allocate_blocks(cache.running_sum.spec, (batch, candidates.size))
    )
    for segment, segment_params in zip(cache.segments, method_params, strict=True):
        share = partition.share(segment.history)
        specs = {name: h.spec for name, h in share.items()}

        def layer(
            i: Array,
            carry: Any,
            segment: Any = segment,
            start: int = start,
            method_params: Any = segment_params,
            specs=specs,
        ) -> Any:
            history, running_sum = carry
            own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, start + i, keepdims=False), method_params)
            window = {name: _first(w, i, candidates.size * BLOCK, partition) for name, w in segment.window.items()}
            window = without_sink(segment.method, window, cache.history_blocks + cache.origins == 0)
            blocks, _, running_sum = store_and_read(
                segment.method, own, window, running_sum, specs, cache.implementation
            )
            return {
                name: jax.tree.map(lambda old, new: old.at[i, rows, targets].set(new, mode="drop"), history[name], b)
                for name, b in blocks.items()
            }, running_sum

        # a loop over layers, so that float32 temporaries stay small
        history, running_sum = lax.fori_loop(0, segment.num_layers, layer, (share, running_sum))
        histories.append({name: dataclasses.replace(h, spec=segment.history[name].spec) for name, h in history.items()})
        start += segment.num_layers
    return tuple(histories)


def _first(
    window: Float[Array, "L B W C"], layer: Array, tokens: int, partition: CachePartition
) -> Float[Array, "B {tokens} C"]:
    """The first places of a layer's window, gathered from all devices that have some."""
    _, batch, width, channels = window.shape
    own = width if sharding.devices_along(partition.blocks) > 1 else tokens  # in one slice: XLA does not merge two
    (picked,) = lax.dynamic_slice(window, (layer, 0, 0, 0), (1, batch, own, channels))
    return sharding.gather(picked, partition.blocks, axis=1)[:, :tokens]


def _settle(cache: Cache, histories: tuple[dict[str, Blocks], ...]) -> Cache:
    """Takes the histories over and forgets what was moved into them from the windows."""
    whole = cache.window_lengths // BLOCK
    begins = (cache.history_blocks + cache.origins == 0) & (whole > 0)
    segments = tuple(
        dataclasses.replace(
            segment,
            history=history,
            window=_shift(segment.window, whole, window_room(cache.max_step, cache.partition), cache.partition),
            sink={
                name: _keep_first(segment.window[name], sink, begins, cache.partition)
                for name, sink in segment.sink.items()
            },
        )
        for segment, history in zip(cache.segments, histories, strict=True)
    )
    return dataclasses.replace(cache, history_blocks=cache.history_blocks + whole, segments=segments)


def _shift(
    windows: dict[str, Float[Array, "L B W _C"]], whole: Int32[Array, " B"], room: int, partition: CachePartition
) -> dict[str, Float[Array, "L B room _C"]]:
    """Drops what was flushed from the front and whatever exceeds `room` at the end. Less than a block is left: the
    places behind it keep whatever was there."""
    if next(iter(windows.values())).shape[2] == room == BLOCK:
        return windows  # a whole block was all of it

    def shift(windows: dict[str, Array], whole: Array) -> dict[str, Array]:
        devices = sharding.devices_along(partition.blocks)
        own = room // devices
        offset, size = own * sharding.shard_index(partition.blocks), min(own, BLOCK)

        def left(window: Float[Array, "*L B W C"]) -> Float[Array, "*L B _left C"]:
            window = sharding.gather(window, partition.blocks, axis=window.ndim - 2)
            blocks = [window[..., start : start + BLOCK, :] for start in range(0, window.shape[-2], BLOCK)]
            blocks[-1] = pad(blocks[-1], BLOCK)
            number = jnp.minimum(whole, len(blocks) - 1)[:, None, None]
            kept = lax.select_n(jnp.broadcast_to(number, blocks[0].shape), *blocks)
            return lax.dynamic_slice_in_dim(pad(kept, room), offset, size, axis=-2)

        def all_left(windows: dict[str, Array]) -> dict[str, Array]:
            return jax.tree.map(left, windows)

        # what is gathered stays small; in one loop, as in `append`
        kept = all_left(windows) if devices == 1 else lax.map(all_left, windows)
        return jax.tree.map(lambda w, new: lax.dynamic_update_slice(w[:, :, :own], new, (0, 0, 0, 0)), windows, kept)

    batch, of_windows = sharding.RULES.spec("batch"), dict.fromkeys(windows, partition.window)
    return sharding.on_shards(shift, (of_windows, batch), of_windows)(windows, whole)


def _keep_first(
    window: Float[Array, "L B W C"], sink: Float[Array, "L B n C"], begins: Bool[Array, " B"], partition: CachePartition
) -> Float[Array, "L B n C"]:
    """The window's first vectors where a sequence's first block leaves it."""
    n = sink.shape[2]

    def keep(window: Array, sink: Array, begins: Array) -> Array:
        first = sharding.gather(window[:, :, :n], partition.blocks, axis=2)[
            :, :, :n
        ]  # those of the first device come first
        return jnp.where(begins[:, None, None], first, sink)

    batch = sharding.RULES.spec("batch")
    return sharding.on_shards(keep, (partition.window, partition.sink, batch), partition.sink)(window, sink, begins)
