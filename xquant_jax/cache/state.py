"""The cache: a pytree of arrays with static geometry, passed in and returned.

Every stream keeps its whole blocks of 128 tokens packed (history) and the newest tokens as they are (window).
`append` writes into the window; `flush` moves whole blocks into the history. Each sequence has its own length.
On a mesh every device holds some of the blocks and some of the window's places, see `xquant_jax.sharding`.
"""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, Int32

from xquant_jax import sharding
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CacheFullError, ConfigError
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, Leaf, allocate_blocks
from xquant_jax.sharding import Axes, Layout, P

if TYPE_CHECKING:
    from xquant_jax.cache.config import CacheConfig, Method


@struct.dataclass
class Segment:
    """A run of layers that store the same streams. All leaves have leading axes L (of the segment) and B.

    history: stream name -> quantized blocks [L, B, N, ...]
    window: name -> newest vectors [L, B, W, C]; what a method needs to make its stream vectors from at a flush
    sink: name -> the first vectors of the history, kept as they are [L, B, n, C]; empty for most methods
    """

    history: dict[str, Blocks]
    window: dict[str, Leaf]
    sink: dict[str, Leaf]
    method: "Method" = struct.field(pytree_node=False)
    num_layers: int = struct.field(pytree_node=False)


@struct.dataclass
class Cache:
    """`lengths`: tokens stored per sequence; the first 128 * `flushed` of them are history, the rest window.

    `running`: for methods that store differences between layers, the running sum of the history [B, N, ...]. It is
    rebuilt in every step, layer after layer; between steps its contents mean nothing.
    """

    lengths: Leaf  # int32 [B]
    flushed: Leaf  # int32 [B]
    segments: tuple[Segment, ...]
    running: Blocks | None
    layout: Layout = struct.field(pytree_node=False)  # on a mesh
    capacity: int = struct.field(pytree_node=False)  # tokens per sequence
    max_step: int = struct.field(pytree_node=False)  # tokens that fit into the window behind a partial block

    @property
    def in_window(self) -> Int32[Array, " B"]:
        """Tokens of each sequence that the window holds."""
        return self.lengths - BLOCK * self.flushed


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Allocated bytes by part. codes: packed words and outliers, or values as they are; window: with the first tokens
    where a method keeps them; scratch: running sums and lengths."""

    codes: int
    scales: int
    window: int
    scratch: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.window + self.scratch


def allocate(cache_config: "CacheConfig", config: ModelConfig, *, batch: int, tokens: int, max_step: int = 1) -> Cache:
    """An empty cache for `batch` sequences of at least `tokens` tokens each, fed up to `max_step` at a time.

    Longer inputs may be appended too; `max_step` only bounds what the window holds between `append` and `flush`. On a
    mesh blocks and window are rounded up to what divides, and every device allocates its own share only.
    """
    lies = sharding.layout(cache_config, config)
    blocks = sharding.round_up(max(1, tokens // BLOCK), sharding.devices_along(lies.blocks))
    create = jax.jit(_empty, static_argnums=range(6)) if sharding.active() else _empty
    return create(cache_config, config, lies, batch, blocks, max_step)


def _empty(
    cache_config: "CacheConfig", config: ModelConfig, lies: Layout, batch: int, blocks: int, max_step: int
) -> Cache:
    segments, running = [], None
    for method, layers in cache_config.segments(config):
        history = {
            name: allocate_blocks(spec, (layers, batch, blocks)) for name, spec in method.streams(config).items()
        }
        window = {
            name: jnp.zeros((layers, batch, _window_room(max_step, lies), width), dtype)
            for name, (width, dtype) in method.window(config).items()
        }
        sink = {name: w[:, :, : method.sink_tokens] for name, w in window.items() if method.sink_tokens}
        segments.append(Segment(history, window, sink, method, layers))
        if (spec := method.running(config)) is not None:
            running = allocate_blocks(spec, (batch, blocks))
    cache = Cache(
        lengths=jnp.zeros(batch, jnp.int32),
        flushed=jnp.zeros(batch, jnp.int32),
        segments=tuple(segments),
        running=running,
        layout=lies,
        capacity=blocks * BLOCK + BLOCK - 1,
        max_step=max_step,
    )
    return sharding.constrain_cache(cache)


def _window_room(step: int, lies: Layout) -> int:
    """Places behind a partial block for `step` tokens more, on a mesh a multiple of its parts."""
    return sharding.round_up(BLOCK - 1 + step, sharding.devices_along(lies.blocks))


def check_room(capacity: int, tokens: int) -> None:
    """Raises `CacheFullError` if a cache of `capacity` tokens cannot hold `tokens`."""
    if tokens > capacity:
        raise CacheFullError(
            f"the cache holds {capacity} tokens per sequence, but prompt and new tokens need {tokens}; "
            f"raise cache_tokens or shorten the prompt or max_new_tokens"
        )


def append(cache: Cache, new: tuple[dict[str, Float[Array, "_L B T _C"]], ...], counts: Int[Array, " B"]) -> Cache:
    """Writes the first `counts` of T new vectors of each sequence behind its window; the rest is dropped.

    `new` has one entry per segment. Flush whole blocks before the next append: a window holds at most 127 tokens and
    these T (it grows where they do not fit, and `flush` gives the room back). Outside of compiled code a cache that is
    full, or was not flushed, raises `CacheFullError`; inside the caller makes sure (`check_room`).
    """
    length = jax.tree.leaves(new)[0].shape[2]
    _check_append(cache, counts, length)
    segments = tuple(
        dataclasses.replace(
            segment,
            window={
                name: _extend(window, vectors[name], cache.in_window, counts, cache.layout)
                for name, window in segment.window.items()
            },
        )
        for segment, vectors in zip(cache.segments, new, strict=True)
    )
    return dataclasses.replace(cache, lengths=cache.lengths + counts, segments=segments)


def new_vectors_spec(lies: Layout, length: int) -> P:
    """The partition of a layer's new vectors [B, T, C]."""
    return P(sharding.RULES.batch, _new_tokens_axes(lies, length), lies.channels)


def _new_tokens_axes(lies: Layout, length: int) -> Axes:
    """Each device keeps some of the new tokens where they divide, else all."""
    return () if length % sharding.devices_along(lies.blocks) else lies.blocks


def _extend(
    window: Float[Array, "L B W C"],
    vectors: Float[Array, "L B T C"],
    in_window: Int[Array, " B"],
    counts: Int[Array, " B"],
    lies: Layout,
) -> Float[Array, "L B _wide C"]:
    """The window with `counts` of the vectors behind its `in_window`, made wider where they do not fit."""
    length, room = vectors.shape[2], _window_room(vectors.shape[2], lies)
    split = _new_tokens_axes(lies, length)

    def write(window: Array, vectors: Array, in_window: Array, counts: Array) -> Array:
        """Into the places that exist: a few at once, for all layers."""
        width = window.shape[2]
        rows, number = jnp.arange(window.shape[1])[:, None], jnp.arange(length)
        places = in_window[:, None] + number - width * sharding.shard_index(lies.blocks)
        exists = (number < counts[:, None]) & (places >= 0) & (places < width)
        vectors = sharding.gather(vectors, split, axis=2)
        return window.at[:, rows, jnp.where(exists, places, width)].set(vectors.astype(window.dtype), mode="drop")

    def widen(window: Array, vectors: Array, in_window: Array, counts: Array) -> Array:
        """Into a wider window, all of a sequence at once: what lies behind the first `counts` means nothing."""
        devices = sharding.devices_along(lies.blocks)
        own = room // devices

        def layers(window: Float[Array, "*L B W C"], vectors: Float[Array, "*L B T C"]) -> Float[Array, "*L B _own C"]:
            window = _pad(sharding.gather(window, lies.blocks, axis=window.ndim - 2), room)
            vectors = sharding.gather(vectors, split, axis=vectors.ndim - 2).astype(window.dtype)
            outer = (0,) * (window.ndim - 3)

            def sequence(b: Array, window: Array) -> Array:
                new = lax.dynamic_slice_in_dim(vectors, b, 1, axis=-3)
                return lax.dynamic_update_slice(window, new, (*outer, b, in_window[b], 0))

            wide = lax.fori_loop(0, window.shape[-3], sequence, window)
            return lax.dynamic_slice_in_dim(wide, own * sharding.shard_index(lies.blocks), own, axis=-2)

        if devices == 1:
            return layers(window, vectors)
        return lax.map(lambda both: layers(*both), (window, vectors))  # what is gathered stays small

    batch = sharding.RULES.spec("batch")
    extend = write if window.shape[2] >= room else widen
    shares = (lies.window, P(None, *new_vectors_spec(lies, length)), batch, batch)
    return _layer_by_layer(sharding.on_shards(extend, shares, lies.window)(window, vectors, in_window, counts))


def _layer_by_layer(window: Float[Array, "L B W C"]) -> Float[Array, "L B W C"]:
    """With layers outermost, as they are read. XLA for TPU prefers them next to the channels to write one token of all
    layers at once; every layer would then read all."""
    return with_layout_constraint(window, DeviceLayout((0, 1, 2, 3)))


def _check_append(cache: Cache, counts: Array, length: int) -> None:
    if any(isinstance(a, Tracer) for a in (cache.lengths, cache.flushed, counts)):
        return
    if int(jnp.max(counts)) > length:
        raise ConfigError(f"counts={counts} is not possible; there are {length} new vectors")
    check_room(cache.capacity, int((cache.lengths + counts).max()))
    width, room = next(iter(cache.segments[0].window.values())).shape[2], _window_room(length, cache.layout)
    fits = int((cache.in_window + counts).max()) <= width if width >= room else int(cache.in_window.max()) < BLOCK
    if not fits:
        raise CacheFullError(
            f"the window holds {max(width, room)} tokens and whole blocks were not flushed; call flush first"
        )


def flush(cache: Cache, factors: tuple[Any, ...], implementation: str | None = None) -> Cache:
    """Quantizes every whole block in the windows and moves it into the history; windows get their room back.

    Layer after layer, as a method may store the difference to what was read back from the layer before (`factors`
    are those of the forward pass). `implementation`: of the kernels, see `pallas_kernels.api`.
    """
    with jax.named_scope("flush"):
        return _settle(cache, _quantize_whole_blocks(cache, factors, implementation))


def flush_when_due(cache: Cache, factors: tuple[Any, ...], implementation: str | None = None) -> Cache:
    """`flush` if a sequence has a whole block in its window, under one `lax.cond`; only histories pass through it."""
    with jax.named_scope("flush"):
        due = jnp.any(cache.in_window >= BLOCK)
        histories = lax.cond(
            due,
            lambda cache: _quantize_whole_blocks(cache, factors, implementation),
            lambda cache: tuple(segment.history for segment in cache.segments),
            cache,
        )
        return _settle(cache, histories)


def _quantize_whole_blocks(
    cache: Cache, factors: tuple[Any, ...], implementation: str | None
) -> tuple[dict[str, Blocks], ...]:
    """The histories with every whole block of the windows in them.

    On a mesh every device gathers the windows, layer after layer, and keeps the blocks that are its own.
    """
    specs = sharding.cache_specs(cache)
    histories = tuple(segment.history for segment in specs.segments)
    of_factors = cache.layout.stacked_factors(factors)
    quantize = partial(_quantize_own_blocks, implementation=implementation)
    return sharding.on_shards(quantize, (specs, of_factors), histories)(cache, factors)


def _quantize_own_blocks(
    cache: Cache, factors: tuple[Any, ...], *, implementation: str | None
) -> tuple[dict[str, Blocks], ...]:
    lies, whole = cache.layout, cache.in_window // BLOCK
    batch = whole.shape[0]
    rows = jnp.arange(batch)[:, None]
    places = next(iter(cache.segments[0].window.values())).shape[2] * sharding.devices_along(lies.blocks)
    candidates = jnp.arange(places // BLOCK)
    capacity = next(iter(cache.segments[0].history.values())).words[0].shape[2]
    targets = cache.flushed[:, None] + candidates - capacity * sharding.shard_index(lies.blocks)
    kept = (candidates < whole[:, None]) & (targets >= 0) & (targets < capacity)
    targets = jnp.where(kept, targets, capacity)  # capacity: dropped

    histories, start = [], 0
    running = None if cache.running is None else allocate_blocks(cache.running.spec, (batch, candidates.size))
    for segment, segment_factors in zip(cache.segments, factors, strict=True):
        share = lies.share(segment.history)
        specs = {name: h.spec for name, h in share.items()}

        def layer(
            i: Array,
            carry: Any,
            segment: Any = segment,
            start: int = start,
            factors: Any = segment_factors,
            specs=specs,
        ) -> Any:
            history, running = carry
            own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, start + i, keepdims=False), factors)
            window = {name: _first(w, i, candidates.size * BLOCK, lies) for name, w in segment.window.items()}
            window = segment.method.without_sink(window, cache.flushed == 0)
            blocks, _, running = segment.method.store_and_read(own, window, running, specs, implementation)
            return {
                name: jax.tree.map(lambda old, new: old.at[i, rows, targets].set(new, mode="drop"), history[name], b)
                for name, b in blocks.items()
            }, running

        # a loop over layers, so that float32 temporaries stay small
        history, running = lax.fori_loop(0, segment.num_layers, layer, (share, running))
        histories.append({name: dataclasses.replace(h, spec=segment.history[name].spec) for name, h in history.items()})
        start += segment.num_layers
    return tuple(histories)


def _first(window: Float[Array, "L B W C"], layer: Array, tokens: int, lies: Layout) -> Float[Array, "B {tokens} C"]:
    """The first places of a layer's window, gathered from all devices that have some."""
    _, batch, width, channels = window.shape
    own = width if sharding.devices_along(lies.blocks) > 1 else tokens  # in one slice: XLA does not merge two
    (picked,) = lax.dynamic_slice(window, (layer, 0, 0, 0), (1, batch, own, channels))
    return sharding.gather(picked, lies.blocks, axis=1)[:, :tokens]


def _settle(cache: Cache, histories: tuple[dict[str, Blocks], ...]) -> Cache:
    """Takes the histories over and forgets what was moved into them from the windows."""
    whole = cache.in_window // BLOCK
    begins = (cache.flushed == 0) & (whole > 0)
    segments = tuple(
        dataclasses.replace(
            segment,
            history=history,
            window={
                name: _shift(window, whole, _window_room(cache.max_step, cache.layout), cache.layout)
                for name, window in segment.window.items()
            },
            sink={
                name: _keep_first(segment.window[name], sink, begins, cache.layout)
                for name, sink in segment.sink.items()
            },
        )
        for segment, history in zip(cache.segments, histories, strict=True)
    )
    return dataclasses.replace(cache, flushed=cache.flushed + whole, segments=segments)


def _shift(
    window: Float[Array, "L B W C"], whole: Int32[Array, " B"], room: int, lies: Layout
) -> Float[Array, "L B room C"]:
    """Drops what was flushed from the front and whatever exceeds `room` at the end. Less than a block is left: the
    places behind it keep whatever was there."""
    if window.shape[2] == room == BLOCK:
        return window  # a whole block was all of it

    def shift(window: Array, whole: Array) -> Array:
        devices = sharding.devices_along(lies.blocks)
        own = room // devices
        offset, size = own * sharding.shard_index(lies.blocks), min(own, BLOCK)

        def layer(window: Float[Array, "*L B W C"]) -> Float[Array, "*L B _left C"]:
            window = sharding.gather(window, lies.blocks, axis=window.ndim - 2)
            blocks = [window[..., start : start + BLOCK, :] for start in range(0, window.shape[-2], BLOCK)]
            blocks[-1] = _pad(blocks[-1], BLOCK)
            number = jnp.minimum(whole, len(blocks) - 1)[:, None, None]
            left = lax.select_n(jnp.broadcast_to(number, blocks[0].shape), *blocks)
            return lax.dynamic_slice_in_dim(_pad(left, room), offset, size, axis=-2)

        kept = layer(window) if devices == 1 else lax.map(layer, window)  # what is gathered stays small
        return lax.dynamic_update_slice(window[:, :, :own], kept, (0, 0, 0, 0))

    batch = sharding.RULES.spec("batch")
    return sharding.on_shards(shift, (lies.window, batch), lies.window)(window, whole)


def _pad(window: Float[Array, "*rest W C"], room: int) -> Float[Array, "*rest {room} C"]:
    return jnp.pad(window, [(0, 0)] * (window.ndim - 2) + [(0, room - window.shape[-2]), (0, 0)])


def _keep_first(
    window: Float[Array, "L B W C"], sink: Float[Array, "L B n C"], begins: Bool[Array, " B"], lies: Layout
) -> Float[Array, "L B n C"]:
    """The window's first vectors where a sequence's first block leaves it."""
    n = sink.shape[2]

    def keep(window: Array, sink: Array, begins: Array) -> Array:
        first = sharding.gather(window[:, :, :n], lies.blocks, axis=2)[:, :, :n]  # those of the first device come first
        return jnp.where(begins[:, None, None], first, sink)

    batch = sharding.RULES.spec("batch")
    return sharding.on_shards(keep, (lies.window, lies.sink, batch), lies.sink)(window, sink, begins)


def cache_bytes(cache: Cache) -> CacheBytes:
    """Sums the bytes of every array of the cache (or of its shape structs) by part."""

    def size(tree: Any) -> int:
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    histories = [history for segment in cache.segments for history in segment.history.values()]
    return CacheBytes(
        codes=sum(size((h.words, h.places, h.outliers)) for h in histories),
        scales=sum(size((h.scale, h.zero)) for h in histories),
        window=sum(size((segment.window, segment.sink)) for segment in cache.segments),
        scratch=size((cache.lengths, cache.flushed, cache.running)),
    )
