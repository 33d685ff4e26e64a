"""The cache: a pytree of arrays with static geometry, passed in and returned.

Every stream keeps its whole blocks of 128 tokens packed (history) and the newest tokens as they are (window).
`append` writes into the window; `flush` moves whole blocks into the history. Each sequence has its own length.
On a mesh every device holds some of the blocks and some of the window's places, see `xquant_jax.sharding`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int32

from pallas_kernels import api
from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import Method
from xquant_jax.cache.partition import CachePartition, constrain_cache, partition_of
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CacheFullError
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, Leaf, allocate_blocks


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
    method: Method = struct.field(pytree_node=False)
    num_layers: int = struct.field(pytree_node=False)


@struct.dataclass
class Shared:
    """What several sequences of a cache begin with, stored once.

    cache: a row for each beginning: whole blocks, the first tokens as they are, and no window
    rows: int32 [B], the row that each sequence begins with, -1 for none; None: sequence b with row b
    most: sequences that begin with the same row, at most
    """

    cache: "Cache"
    rows: Leaf | None
    most: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Cache:
    """`lengths`: tokens stored per sequence. The first `origins` of them lie in `shared`, the next 128 *
    `history_blocks` are history, the rest window.

    `running_sum`: for methods that store differences between layers, the running sum of the history [B, N, ...]. It is
    rebuilt in every step, layer after layer; between steps its contents mean nothing.

    `lost`: tokens of each sequence that did not fit and were dropped; see `check_nothing_lost`.
    """

    lengths: Leaf  # int32 [B]
    origins: Leaf  # int32 [B]
    history_blocks: Leaf  # int32 [B]
    segments: tuple[Segment, ...]
    running_sum: Blocks | None
    lost: Leaf  # int32 [B]
    shared: Shared | None
    partition: CachePartition = struct.field(pytree_node=False)  # on a mesh
    capacity: int = struct.field(pytree_node=False)  # tokens per sequence, beside those in `shared`
    max_step: int = struct.field(pytree_node=False)  # tokens that fit into the window behind a partial block
    implementation: str | None = struct.field(pytree_node=False)  # of the kernels, see `pallas_kernels.api`

    @property
    def blocks(self) -> int:
        """How many blocks of each sequence the history has room for."""
        return next(iter(self.segments[0].history.values())).planes[0].shape[2]

    @property
    def places(self) -> int:
        """How many tokens of each sequence the window has room for."""
        return next(iter(self.segments[0].window.values())).shape[2]

    @property
    def window_lengths(self) -> Int32[Array, " B"]:
        """Tokens of each sequence that the window holds."""
        return self.lengths - self.origins - BLOCK * self.history_blocks


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

    def __add__(self, other: "CacheBytes") -> "CacheBytes":
        return CacheBytes(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def allocate(
    cache_config: CacheConfig,
    config: ModelConfig,
    *,
    batch: int,
    tokens: int,
    max_step: int = 1,
    implementation: str | None = None,
) -> Cache:
    """An empty cache for `batch` sequences of at least `tokens` tokens each, fed up to `max_step` at a time.

    Longer inputs may be appended too; `max_step` only bounds what the window holds between `append` and `flush`. On a
    mesh blocks and window are rounded up to what divides, and every device allocates its own share only.

    implementation: of the kernels that will read and write the cache, see `pallas_kernels.api`; None: the best that the
        device has

    Raises `ConfigError` for options that do not fit the model, and an implementation that does not run here.
    """
    api.check(implementation)
    partition = partition_of(cache_config, config)
    blocks = sharding.round_up(max(1, tokens // BLOCK), sharding.devices_along(partition.blocks))
    create = jax.jit(_empty, static_argnums=range(7)) if sharding.active() else _empty
    return create(cache_config, config, partition, batch, blocks, max_step, implementation)


def _empty(
    cache_config: CacheConfig,
    config: ModelConfig,
    partition: CachePartition,
    batch: int,
    blocks: int,
    max_step: int,
    implementation: str | None,
) -> Cache:
    segments, running_sum = [], None
    for method, layers in cache_config.segments(config):
        history = {
            name: allocate_blocks(spec, (layers, batch, blocks)) for name, spec in method.streams(config).items()
        }
        window = {
            name: jnp.zeros((layers, batch, window_room(max_step, partition), width), dtype)
            for name, (width, dtype) in method.window(config).items()
        }
        sink = {name: w[:, :, : method.sink] for name, w in window.items() if method.sink}
        segments.append(Segment(history, window, sink, method, layers))
        if (spec := method.running_sum(config)) is not None:
            running_sum = allocate_blocks(spec, (batch, blocks))
    cache = Cache(
        lengths=jnp.zeros(batch, jnp.int32),
        origins=jnp.zeros(batch, jnp.int32),
        history_blocks=jnp.zeros(batch, jnp.int32),
        segments=tuple(segments),
        running_sum=running_sum,
        lost=jnp.zeros(batch, jnp.int32),
        shared=None,
        partition=partition,
        capacity=blocks * BLOCK + BLOCK - 1,
        max_step=max_step,
        implementation=implementation,
    )
    return constrain_cache(cache)


def window_room(step: int, partition: CachePartition) -> int:
    """Places behind a partial block for `step` tokens more, on a mesh a multiple of its parts."""
    return sharding.round_up(BLOCK - 1 + step, sharding.devices_along(partition.blocks))


def check_room(capacity: int, tokens: int) -> None:
    """Raises `CacheFullError` if a cache of `capacity` tokens cannot hold `tokens`."""
    if tokens > capacity:
        raise CacheFullError(
            f"the cache holds {capacity} tokens per sequence, but prompt and new tokens need {tokens}; "
            f"raise cache_tokens or shorten the prompt or max_new_tokens"
        )


def check_nothing_lost(cache: Cache) -> None:
    """Raises `CacheFullError` if a step in compiled code was given tokens that the cache had no room for.

    Outside of compiled code `append` raises by itself; in it lengths stop where the room does, and `lost`
    counts the rest.
    """
    lost = np.asarray(cache.lost)
    if lost.any():
        rows = ", ".join(f"{row} ({lost[row]})" for row in np.flatnonzero(lost)[:8])
        raise CacheFullError(
            f"tokens were dropped, of sequences (tokens) {rows}: the cache was full at {cache.capacity} tokens per "
            f"sequence, or was not flushed; allocate more tokens, and flush after every step"
        )


def pad(window: Float[Array, "*rest W C"], room: int) -> Float[Array, "*rest {room} C"]:
    return jnp.pad(window, [(0, 0)] * (window.ndim - 2) + [(0, room - window.shape[-2]), (0, 0)])


def cache_bytes(cache: Cache) -> CacheBytes:
    """Sums the bytes of every array of the cache (or of its shape structs) by part, `shared` included."""

    def size(tree: Any) -> int:
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    histories = [history for segment in cache.segments for history in segment.history.values()]
    own = CacheBytes(
        codes=sum(size((h.planes, h.places, h.outliers)) for h in histories),
        scales=sum(size((h.scale, h.zero)) for h in histories),
        window=sum(size((segment.window, segment.sink)) for segment in cache.segments),
        scratch=size((cache.lengths, cache.origins, cache.history_blocks, cache.lost, cache.running_sum)),
    )
    return own if cache.shared is None else own + cache_bytes(cache.shared.cache)
