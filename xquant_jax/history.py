"""Attention over the quantized history, tile by tile, in plain XLA.

The stacked history of all layers is never sliced as a whole: a tile is cut out, dequantized, turned into keys and
values, attended to and forgotten. Tiles past the longest sequence, or before every sliding window, cost nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from xquant_jax import attention
from xquant_jax.attention import Geometry, Part
from xquant_jax.packing import BLOCK
from xquant_jax.quantization import Blocks, dequantize

TILE_BLOCKS = 8
"""Blocks of history dequantized at once: bounds the temporaries to 1024 tokens of one layer."""

KeysValues = Callable[[dict[str, Array]], tuple[Array, Array]]
"""Stored vectors [B, S, C] by stream name -> keys [B, S, K, d] and values [B, S, K or 1, C]."""


def read_tile(
    blocks: Blocks, layer: Int[Array, ""] | int, start: Int[Array, ""] | int, size: int
) -> Float[Array, "B S C"]:
    """Dequantizes `size` blocks from block `start` of one layer of a history [L, B, N, ...]."""

    def cut(a: Array) -> Array:
        at = (layer, 0, start, *[0] * (a.ndim - 3))
        return lax.dynamic_slice(a, at, (1, a.shape[1], size, *a.shape[3:]))[0]

    tile = dequantize(jax.tree.map(cut, blocks))
    return tile.reshape(tile.shape[0], size * BLOCK, -1)


def attend_history(
    q: Float[Array, "B T H d"],
    history: dict[str, Blocks],
    layer: Int[Array, ""] | int,
    flushed: Int[Array, " B"],
    keys_values: KeysValues,
    geometry: Geometry,
) -> Part:
    """Attends to the first `flushed` blocks of each sequence."""
    num_blocks = next(iter(history.values())).words[0].shape[2]
    size = min(TILE_BLOCKS, num_blocks)
    batch = q.shape[0]

    def tile(number: Array) -> Part:
        start = jnp.minimum(number * size, num_blocks - size)  # the last tile may overlap the one before
        vectors = {name: read_tile(b, layer, start, size).astype(q.dtype) for name, b in history.items()}
        k, v = keys_values(vectors)
        return attention.attend(
            q,
            k,
            v,
            geometry,
            origin=jnp.full(batch, start * BLOCK),
            first=(number * size - start) * BLOCK,
            count=(flushed - start) * BLOCK,
        )

    oldest = jnp.maximum(geometry.positions.min() - geometry.sliding_window + 1, 0)
    first = oldest // (size * BLOCK)
    last = -(-flushed.max() // size)
    out, lse = jax.eval_shape(tile, jnp.int32(0))
    nothing = Part(jnp.zeros(out.shape, out.dtype), jnp.full(lse.shape, -jnp.inf, lse.dtype))
    return lax.fori_loop(first, last, lambda i, part: attention.merge(part, tile(i)), nothing)
