"""The operations in plain XLA: their definition, and what runs where no kernel does."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from pallas_kernels.calls import Accumulate, DecodeAttention, Quantize, RematProject
from pallas_kernels.operands import times
from xquant_jax.numerics import attention
from xquant_jax.numerics.attention import AFTER_ALL, Geometry, Part
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, as_blocks, as_tokens, dequantize, quantize


def run(call: Any) -> Any:
    """What a call returns, by definition."""
    match call:
        case RematProject():
            return remat_project(call)
        case DecodeAttention():
            return decode_attention(call)
        case Accumulate():
            return accumulate(call)
        case Quantize():
            return quantize(call.x, call.spec, call.codebook)
    raise TypeError(f"{type(call).__name__} is no call of `pallas_kernels.calls`")


def remat_project(call: RematProject) -> Float[Array, "B S N"]:
    """Dequantizes the blocks and multiplies: x^ W."""
    return times(as_tokens(dequantize(call.stream)), call.weight).astype(call.result_dtype)


def decode_attention(call: DecodeAttention) -> Part:
    """Attends to dequantized blocks, a tile of them at a time."""

    def read(vectors: dict[str, Array]) -> tuple[Array, Array]:
        z = vectors["value"]
        return call.key_rebuild(vectors["key"], call.num_kv_heads), z.reshape(*z.shape[:2], call.value_heads, -1)

    streams = {"key": call.key_stream, "value": call.values}
    return attend_history(call.q, streams, call.layer, call.history_blocks, read, call.geometry, skip=call.skip)


def accumulate(call: Accumulate) -> Blocks:
    """Adds to dequantized blocks and quantizes again, a tile of them at a time."""
    return accumulate_history(call.running_sum, call.stream, call.layer, call.history_blocks, call.accumulation)


TILE_BLOCKS = 8
"""Blocks of history dequantized at once: bounds the temporaries to 1024 tokens of one layer."""

SCORES_AT_ONCE = 2**17
"""Scores of a head and tile, new tokens times history tokens: makes tiles smaller in prefill."""

Read = Callable[[dict[str, Array]], tuple[Array, Array]]
"""Dequantized streams [B, S, C] by name -> keys [B, S, K, d] and values [B, S, K or 1, C]."""


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
    history_blocks: Int[Array, " B"],
    read: Read,
    geometry: Geometry,
    *,
    codebooks: Mapping[str, Float[Array, " levels"]] = MappingProxyType({}),
    skip: Int[Array, " B"],
) -> Part:
    """Attends to the first `history_blocks` blocks of each sequence, but for its first `skip` tokens.

    `codebooks`: of the streams that have one.
    """
    num_blocks = next(iter(history.values())).planes[0].shape[2]
    size = min(TILE_BLOCKS, num_blocks, max(1, SCORES_AT_ONCE // (BLOCK * q.shape[1])))
    batch = q.shape[0]

    def tile(number: Array) -> Part:
        start = jnp.minimum(number * size, num_blocks - size)  # the last tile may overlap the one before
        stale = number * size - start
        vectors = {
            name: read_tile(blocks, layer, start, size, codebooks.get(name)).astype(q.dtype)
            for name, blocks in history.items()
        }
        numbers = jnp.arange(size * BLOCK)[None]
        exists = numbers >= jnp.maximum(stale * BLOCK, skip - start * BLOCK)[:, None]
        exists &= numbers < BLOCK * (history_blocks - start)[:, None]
        return attention.attend(
            q, *read(vectors), geometry, origin=jnp.full(batch, start * BLOCK), exists=exists[:, None]
        )

    # of sequences that have blocks: a short one or a free slot would have all tiles read that lie before their windows
    earliest = jnp.where(history_blocks > 0, geometry.earliest(), AFTER_ALL).min()
    oldest = jnp.maximum(earliest - geometry.sliding_window + 1, 0)
    shape = jax.eval_shape(tile, jnp.int32(0))
    nothing = Part(jnp.zeros(shape.out.shape), jnp.full(shape.lse.shape, -jnp.inf))
    return lax.fori_loop(
        oldest // (size * BLOCK),
        -(-history_blocks.max() // size),
        lambda number, part: attention.merge(part, tile(number)),
        nothing,
    )


def accumulate_history(
    running_sum: Blocks,
    history: Blocks,
    layer: Int[Array, ""] | int,
    history_blocks: Int[Array, " B"],
    add: Callable[[Array, Array], Array],
) -> Blocks:
    """Adds one layer's differences to the running sum [B, N, ...] of the blocks that exist in any sequence.

    add: the sum below and what the layer stores, float32 [B, S, C] -> the sum with this layer in it
    """
    num_blocks = history.planes[0].shape[2]
    size = min(TILE_BLOCKS, num_blocks)

    def tile(number: Array, running_sum: Blocks) -> Blocks:
        start = jnp.minimum(number * size, num_blocks - size)
        before = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, axis=1), running_sum)
        total = add(as_tokens(dequantize(before)).astype(jnp.float32), read_tile(history, layer, start, size))
        after = quantize(as_blocks(total), running_sum.spec)
        fresh = jnp.arange(size) >= number * size - start  # the last tile may overlap the one before

        def write(whole: Array, old: Array, new: Array) -> Array:
            kept = jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 2)), new, old)
            return lax.dynamic_update_slice_in_dim(whole, kept, start, axis=1)

        return jax.tree.map(write, running_sum, before, after)

    return lax.fori_loop(0, -(-history_blocks.max() // size), tile, running_sum)
