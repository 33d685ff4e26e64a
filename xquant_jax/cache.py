"""The cache: a pytree of arrays with static geometry, passed in and returned.

Every stream keeps its whole blocks of 128 tokens packed (history) and the newest tokens as they are (window).
`append` writes into the window; `flush` moves whole blocks into the history. Each sequence has its own length.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Int32

from xquant_jax.config import ModelConfig
from xquant_jax.errors import CacheFullError
from xquant_jax.packing import BLOCK
from xquant_jax.quantization import Blocks, Leaf, allocate_blocks

if TYPE_CHECKING:
    from xquant_jax.methods import CacheConfig, Method


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

    Longer inputs may be appended too; `max_step` only bounds what the window holds between `append` and `flush`.
    """
    blocks = max(1, tokens // BLOCK)
    segments, running = [], None
    for method, layers in cache_config.segments(config):
        history = {
            name: allocate_blocks(spec, (layers, batch, blocks)) for name, spec in method.streams(config).items()
        }
        window = {
            name: jnp.zeros((layers, batch, BLOCK - 1 + max_step, width), dtype)
            for name, (width, dtype) in method.window(config).items()
        }
        sink = {name: w[:, :, : method.sink_tokens] for name, w in window.items() if method.sink_tokens}
        segments.append(Segment(history, window, sink, method, layers))
        if (spec := method.running(config)) is not None:
            running = allocate_blocks(spec, (batch, blocks))
    return Cache(
        lengths=jnp.zeros(batch, jnp.int32),
        flushed=jnp.zeros(batch, jnp.int32),
        segments=tuple(segments),
        running=running,
        capacity=blocks * BLOCK + BLOCK - 1,
        max_step=max_step,
    )


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
    batch, length = jax.tree.leaves(new)[0].shape[1:3]
    _check_append(cache, counts, length)
    rows = jnp.arange(batch)[:, None]
    slots = cache.in_window[:, None] + jnp.arange(length)

    def write(window: Array, vectors: Array) -> Array:
        missing = BLOCK - 1 + length - window.shape[2]
        window = jnp.pad(window, ((0, 0), (0, 0), (0, max(missing, 0)), (0, 0)))
        kept = jnp.where(jnp.arange(length) < counts[:, None], slots, window.shape[2])
        return window.at[:, rows, kept].set(vectors.astype(window.dtype), mode="drop")

    segments = tuple(
        dataclasses.replace(
            segment, window={name: write(window, vectors[name]) for name, window in segment.window.items()}
        )
        for segment, vectors in zip(cache.segments, new, strict=True)
    )
    return dataclasses.replace(cache, lengths=cache.lengths + counts, segments=segments)


def _check_append(cache: Cache, counts: Array, length: int) -> None:
    if any(isinstance(a, Tracer) for a in (cache.lengths, cache.flushed, counts)):
        return
    check_room(cache.capacity, int((cache.lengths + counts).max()))
    width = max(next(iter(cache.segments[0].window.values())).shape[2], BLOCK - 1 + length)
    if int((cache.in_window + counts).max()) > width:
        raise CacheFullError(f"the window holds {width} tokens and whole blocks were not flushed; call flush first")


def flush(cache: Cache, factors: tuple[Any, ...]) -> Cache:
    """Quantizes every whole block in the windows and moves it into the history; windows get their room back.

    Layer after layer, as a method may store the difference to what was read back from the layer before (`factors`
    are those of the forward pass).
    """
    return _settle(cache, _quantize_whole_blocks(cache, factors))


def flush_when_due(cache: Cache, factors: tuple[Any, ...]) -> Cache:
    """`flush` if a sequence has a whole block in its window, under one `lax.cond`; only histories pass through it."""
    due = jnp.any(cache.in_window >= BLOCK)
    histories = lax.cond(
        due,
        lambda cache: _quantize_whole_blocks(cache, factors),
        lambda cache: tuple(segment.history for segment in cache.segments),
        cache,
    )
    return _settle(cache, histories)


def _quantize_whole_blocks(cache: Cache, factors: tuple[Any, ...]) -> tuple[dict[str, Blocks], ...]:
    """The histories with every whole block of the windows in them."""
    whole = cache.in_window // BLOCK
    batch = whole.shape[0]
    rows = jnp.arange(batch)[:, None]
    candidates = next(iter(cache.segments[0].window.values())).shape[2] // BLOCK
    capacity = next(iter(cache.segments[0].history.values())).words[0].shape[2]
    number = jnp.arange(candidates)
    targets = jnp.where(number < whole[:, None], cache.flushed[:, None] + number, capacity)  # capacity: dropped

    histories, start = [], 0
    running = None if cache.running is None else allocate_blocks(cache.running.spec, (batch, candidates))
    for segment, segment_factors in zip(cache.segments, factors, strict=True):

        def layer(
            i: Array, carry: Any, segment: Any = segment, start: int = start, factors: Any = segment_factors
        ) -> Any:
            history, running = carry
            own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, start + i, keepdims=False), factors)
            window = {
                name: lax.dynamic_index_in_dim(w, i, keepdims=False)[:, : candidates * BLOCK]
                for name, w in segment.window.items()
            }
            window = segment.method.without_sink(window, cache.flushed == 0)
            specs = {name: h.spec for name, h in history.items()}
            blocks, _, running = segment.method.store_and_read(own, window, running, specs)
            return {
                name: jax.tree.map(lambda h, b: h.at[i, rows, targets].set(b, mode="drop"), history[name], stored)
                for name, stored in blocks.items()
            }, running

        # a loop over layers, so that float32 temporaries stay small
        history, running = lax.fori_loop(0, segment.num_layers, layer, (segment.history, running))
        histories.append(history)
        start += segment.num_layers
    return tuple(histories)


def _settle(cache: Cache, histories: tuple[dict[str, Blocks], ...]) -> Cache:
    """Takes the histories over and forgets what was moved into them from the windows."""
    whole, room = cache.in_window // BLOCK, BLOCK - 1 + cache.max_step
    begins = ((cache.flushed == 0) & (whole > 0))[:, None, None]
    segments = tuple(
        dataclasses.replace(
            segment,
            history=history,
            window={name: _shift(window, whole, room) for name, window in segment.window.items()},
            sink={
                name: jnp.where(begins, segment.window[name][:, :, : sink.shape[2]], sink)
                for name, sink in segment.sink.items()
            },
        )
        for segment, history in zip(cache.segments, histories, strict=True)
    )
    return dataclasses.replace(cache, flushed=cache.flushed + whole, segments=segments)


def _shift(window: Float[Array, "L B W C"], whole: Int32[Array, " B"], room: int) -> Float[Array, "L B room C"]:
    """Drops what was flushed from the front and whatever exceeds `room` at the end."""
    if window.shape[2] == room == BLOCK:
        return window  # a whole block was all of it
    slots = jnp.minimum(whole[:, None] * BLOCK + jnp.arange(room), window.shape[2] - 1)
    return jnp.take_along_axis(window, slots[None, :, :, None], axis=2)


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
