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
from xquant_jax.quantization import Blocks, Leaf, allocate_blocks, quantize

if TYPE_CHECKING:
    from xquant_jax.methods import CacheConfig, Method


@struct.dataclass
class Stream:
    """One stored vector per token and layer. All leaves have leading axes L (of the segment) and B."""

    history: Blocks  # [L, B, N blocks, ...]
    window: Leaf  # [L, B, W, C]


@struct.dataclass
class Segment:
    """A run of layers that store the same streams."""

    streams: dict[str, Stream]
    method: "Method" = struct.field(pytree_node=False)
    num_layers: int = struct.field(pytree_node=False)


@struct.dataclass
class Cache:
    """`lengths`: tokens stored per sequence; the first 128 * `flushed` of them are history, the rest window."""

    lengths: Leaf  # int32 [B]
    flushed: Leaf  # int32 [B]
    segments: tuple[Segment, ...]
    capacity: int = struct.field(pytree_node=False)  # tokens per sequence
    max_step: int = struct.field(pytree_node=False)  # tokens that fit into the window behind a partial block

    @property
    def in_window(self) -> Int32[Array, " B"]:
        """Tokens of each sequence that the window holds."""
        return self.lengths - BLOCK * self.flushed


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Allocated bytes by part. codes: packed words, or values as they are; scratch: lengths and the like."""

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
    segments = []
    for method, layers in cache_config.segments(config):
        streams = {
            name: Stream(
                history=allocate_blocks(spec, (layers, batch, blocks)),
                window=jnp.zeros((layers, batch, BLOCK - 1 + max_step, spec.width), spec.dtype),
            )
            for name, spec in method.streams(config).items()
        }
        segments.append(Segment(streams, method, layers))
    return Cache(
        lengths=jnp.zeros(batch, jnp.int32),
        flushed=jnp.zeros(batch, jnp.int32),
        segments=tuple(segments),
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
            segment,
            streams={
                name: dataclasses.replace(stream, window=write(stream.window, vectors[name]))
                for name, stream in segment.streams.items()
            },
        )
        for segment, vectors in zip(cache.segments, new, strict=True)
    )
    return dataclasses.replace(cache, lengths=cache.lengths + counts, segments=segments)


def _check_append(cache: Cache, counts: Array, length: int) -> None:
    if any(isinstance(a, Tracer) for a in (cache.lengths, cache.flushed, counts)):
        return
    check_room(cache.capacity, int((cache.lengths + counts).max()))
    width = max(next(iter(cache.segments[0].streams.values())).window.shape[2], BLOCK - 1 + length)
    if int((cache.in_window + counts).max()) > width:
        raise CacheFullError(f"the window holds {width} tokens and whole blocks were not flushed; call flush first")


def flush(cache: Cache) -> Cache:
    """Quantizes every whole block in the windows and moves it into the history; windows get their room back."""
    whole = cache.in_window // BLOCK
    segments = tuple(
        dataclasses.replace(
            segment,
            streams={
                name: _flush_stream(stream, cache.flushed, whole, BLOCK - 1 + cache.max_step)
                for name, stream in segment.streams.items()
            },
        )
        for segment in cache.segments
    )
    return dataclasses.replace(cache, flushed=cache.flushed + whole, segments=segments)


def flush_when_due(cache: Cache) -> Cache:
    """`flush` if a sequence has a whole block in its window, under one `lax.cond`."""
    return lax.cond(jnp.any(cache.in_window >= BLOCK), flush, lambda cache: cache, cache)


def _flush_stream(stream: Stream, flushed: Int32[Array, " B"], whole: Int32[Array, " B"], room: int) -> Stream:
    layers, batch, width = stream.window.shape[:3]
    candidates = width // BLOCK
    rows = jnp.arange(batch)[:, None]
    number = jnp.arange(candidates)
    capacity = stream.history.words[0].shape[2]
    targets = jnp.where(number < whole[:, None], flushed[:, None] + number, capacity)  # capacity: dropped

    def layer(i: Array, history: Blocks) -> Blocks:  # layer by layer, so that float32 temporaries stay small
        window = lax.dynamic_index_in_dim(stream.window, i, keepdims=False)[:, : candidates * BLOCK]
        blocks = quantize(window.reshape(batch, candidates, BLOCK, -1), stream.history.spec)
        return jax.tree.map(lambda h, b: h.at[i, rows, targets].set(b, mode="drop"), history, blocks)

    history = lax.fori_loop(0, layers, layer, stream.history)
    slots = jnp.minimum(whole[:, None] * BLOCK + jnp.arange(room), width - 1)
    window = jnp.take_along_axis(stream.window, slots[None, :, :, None], axis=2)
    return dataclasses.replace(stream, history=history, window=window)


def cache_bytes(cache: Cache) -> CacheBytes:
    """Sums the bytes of every array of the cache (or of its shape structs) by part."""

    def size(tree: Any) -> int:
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    streams = [stream for segment in cache.segments for stream in segment.streams.values()]
    return CacheBytes(
        codes=sum(size(s.history.words) for s in streams),
        scales=sum(size((s.history.scale, s.history.zero)) for s in streams),
        window=sum(size(s.window) for s in streams),
        scratch=size((cache.lengths, cache.flushed)),
    )
