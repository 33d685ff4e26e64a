"""Attention over the quantized history, tile by tile, in plain XLA.

The stacked history of all layers is never sliced as a whole: a tile is cut out, dequantized, turned into keys and
values, attended to and forgotten. Tiles past the longest sequence, or before every sliding window, cost nothing.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from xquant_jax import attention
from xquant_jax.attention import Geometry, Part
from xquant_jax.packing import BLOCK
from xquant_jax.quantization import Blocks, as_tokens, dequantize

TILE_BLOCKS = 8
"""Blocks of history dequantized at once: bounds the temporaries to 1024 tokens of one layer."""

SCORES_AT_ONCE = 2**17
"""Scores of a head and tile, new tokens times history tokens: makes tiles smaller in prefill."""

Read = Callable[[dict[str, Array], Blocks | None], tuple[Array, Array, Blocks | None]]
"""Dequantized streams [B, S, C] by name and the running sum of the same blocks [B, S/128, ...] -> keys [B, S, K, d],
values [B, S, K or 1, C] and the running sum with this layer in it."""


def read_tile(
    blocks: Blocks,
    layer: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
    size: int,
    codebook: Float[Array, " levels"] | None = None,
) -> Float[Array, "B S C"]:
    """Dequantizes `size` blocks from block `start` of one layer of a history [L, B, N, ...]."""

    def cut(a: Array) -> Array:
        at = (layer, 0, start, *[0] * (a.ndim - 3))
        return lax.dynamic_slice(a, at, (1, a.shape[1], size, *a.shape[3:]))[0]

    return as_tokens(dequantize(jax.tree.map(lambda a: _as_it_lies(cut(a)), blocks), codebook))


def _as_it_lies(tile: Array) -> Array:
    """The tile in the layout that XLA for TPU gives arrays of its kind: the longer of the last two axes innermost.

    Left to itself it prefers another one for the products to come, and copies the whole history to it.
    """
    if 1 in tile.shape[-2:]:  # where there is no second of them, the blocks are
        flat = tile.reshape(*tile.shape[:-2], -1)
        return with_layout_constraint(flat, Layout(tuple(range(flat.ndim)))).reshape(tile.shape)
    *outer, rows, columns = range(tile.ndim)
    inner = (rows, columns) if tile.shape[columns] >= tile.shape[rows] else (columns, rows)
    return with_layout_constraint(tile, Layout((*outer, *inner)))


def attend_history(
    q: Float[Array, "B T H d"],
    history: dict[str, Blocks],
    layer: Int[Array, ""] | int,
    flushed: Int[Array, " B"],
    read: Read,
    geometry: Geometry,
    running: Blocks | None = None,
    *,
    codebooks: Mapping[str, Float[Array, " levels"]] = MappingProxyType({}),
    skip: Int[Array, ""] | int = 0,
) -> tuple[Part, Blocks | None]:
    """Attends to the first `flushed` blocks of each sequence, but for their first `skip` tokens.

    A method that stores differences between layers hands the running sum of the history from layer to layer.
    `codebooks`: of the streams that have one.
    """
    num_blocks = next(iter(history.values())).words[0].shape[2]
    size = min(TILE_BLOCKS, num_blocks, max(1, SCORES_AT_ONCE // (BLOCK * q.shape[1])))
    batch = q.shape[0]

    def tile(number: Array, running: Blocks | None) -> tuple[Part, Blocks | None]:
        start = jnp.minimum(number * size, num_blocks - size)  # the last tile may overlap the one before
        stale = number * size - start
        vectors = {
            name: read_tile(blocks, layer, start, size, codebooks.get(name)).astype(q.dtype)
            for name, blocks in history.items()
        }
        before = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, axis=1), running)
        k, v, after = read(vectors, before)
        fresh = jnp.arange(size) >= stale

        def write(whole: Array, old: Array, new: Array) -> Array:
            kept = jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 2)), new, old)
            return lax.dynamic_update_slice_in_dim(whole, kept, start, axis=1)

        part = attention.attend(
            q,
            k,
            v,
            geometry,
            origin=jnp.full(batch, start * BLOCK),
            first=jnp.maximum(stale * BLOCK, skip - start * BLOCK),
            count=(flushed - start) * BLOCK,
        )
        return part, jax.tree.map(write, running, before, after)

    # layers above need the running sum of every tile, whatever this one looks back at
    oldest = jnp.maximum(geometry.positions.min() - geometry.sliding_window + 1, 0)
    first = oldest // (size * BLOCK) if running is None else jnp.zeros_like(oldest)
    last = -(-flushed.max() // size)
    shape, _ = jax.eval_shape(tile, jnp.int32(0), running)
    nothing = Part(jnp.zeros(shape.out.shape), jnp.full(shape.lse.shape, -jnp.inf))

    def body(number: Array, carry: tuple[Part, Blocks | None]) -> tuple[Part, Blocks | None]:
        part, running = tile(number, carry[1])
        return attention.merge(carry[0], part), running

    return lax.fori_loop(first, last, body, (nothing, running))
