"""Keys from codes and a matrix of 8 bits, on the matrix unit for such: a part of the `decode_attention` kernel.

For every group of channels the product of codes and matrix is summed in int32, or in float32 if both are e4m3. It is
scaled by the token's scale of that group and added up in float32; zeros meet the matrix' sums over the group; last
comes each column's own scale.

Codes for int8 lie four to a word, so rows are tokens in the order of `unpack.interleaved(4)`. To e4m3 they come from
bfloat16, in its order: as bytes, small codes would be numbers below the smallest normal one. Scales along the token
come as rows of 128 tokens: a product with a permutation turns them into columns, which are spread over lanes, once for
all heads.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.eight_bits import TYPES
from pallas_kernels.operands import KeyRebuild
from pallas_kernels.pallas_tpu import unpack
from pallas_kernels.pallas_tpu.decode_attention_tiling import DecodeTiling
from pallas_kernels.pallas_tpu.streams import LANES
from xquant_jax.numerics.packing import BLOCK, PLANES


def inputs(tiling: DecodeTiling, rebuild: KeyRebuild, columns: Any) -> dict[str, Array]:
    """`matrix_sums` bfloat16 [rows, K d], which `zeros` of `scratch` meet row by row, and `column_scales` float32
    [K/g, 1, g d]; `columns` puts the columns of [rows, K d] into bundles [K/g, rows, g d]."""
    assert rebuild.sums is not None
    assert rebuild.scale is not None
    high = lax.reduce_precision(rebuild.sums, exponent_bits=8, mantissa_bits=7)
    parts = [high, rebuild.sums - high]  # both bfloat16 in value: sums of up to 512 rows have no more than 16 bits
    sums = jnp.concatenate(parts * (_zero_rows(tiling) // 2)).astype(jnp.bfloat16)
    sums = jnp.swapaxes(columns(tiling, sums), 0, 1).reshape(sums.shape)
    return {"matrix_sums": sums, "column_scales": columns(tiling, rebuild.scale[None])}


def scratch(tiling: DecodeTiling, tokens: int) -> dict[str, Any]:
    """Of a chunk: codes, what zeros add, and each group's scales, the same in all lanes."""
    return {
        "codes": pltpu.VMEM((tokens // 4, tiling.key.width), jnp.uint32),
        "zeros": pltpu.VMEM((tokens, _zero_rows(tiling) * tiling.key_groups), jnp.bfloat16),
        "scales": pltpu.VMEM((tiling.key_groups, tokens, LANES), jnp.float32),
    }


def _zero_rows(tiling: DecodeTiling) -> int:
    """Rows of `matrix_sums` for each group: two halves of its sums; twice, for 128 scales too, if codes have 8 bits."""
    return 4 if unpack.quads_offset(tiling.key.bits) else 2


def read(tiling: DecodeTiling, size: int, block: Array, refs: dict[str, Any]) -> None:
    """Codes, zeros and scales of `size` blocks from `block` of the tile to scratch."""
    row, token = (lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    order = (unpack.token_of(row, tiling.ways) == token).astype(jnp.bfloat16)
    for i in range(size):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        scale, zero = (refs[f"key_{what}"][block + i].astype(jnp.float32) for what in ("scale", "zero"))
        zeros = [zero, zero]
        if shift := unpack.quads_offset(tiling.key.bits):
            zeros += [shift * scale, shift * scale]  # a power of two: still bfloat16 in value
        columns = _dot_transposed(order, jnp.concatenate(zeros).astype(jnp.bfloat16))
        refs["zeros"][rows] = columns.astype(jnp.bfloat16)
        columns = _dot_transposed(order, scale.astype(jnp.bfloat16))
        for group in range(tiling.key_groups):
            refs["scales"][group, rows] = jnp.broadcast_to(columns[:, group : group + 1], (BLOCK, LANES))

    def strip(number: Array, _: None) -> None:
        lanes = pl.ds(pl.multiple_of(number * LANES, LANES), LANES)
        for i in range(size):
            planes = [refs[f"key_words{n}"][block + i, :, lanes] for n in range(len(PLANES[tiling.key.bits]))]
            refs["codes"][i * unpack.QUADS : (i + 1) * unpack.QUADS, lanes] = _codes(tiling, planes)

    lax.fori_loop(0, tiling.key.width // LANES, strip, None)


def _codes(tiling: DecodeTiling, planes: list[Array]) -> Array:
    """A block's codes, less `unpack.quads_offset`, as 8-bit numbers four to a word: uint32 [32, W]."""
    bits = tiling.key.bits
    if tiling.eight_bits == "int8":
        return unpack.quads(planes, bits)
    codes = unpack.numbers(planes, bits) - jnp.bfloat16(unpack.offset(bits))
    return pltpu.bitcast(codes.astype(TYPES["fp8"].dtype), jnp.uint32)


def product(tiling: DecodeTiling, size: int, n: Array | int, column: Any, refs: dict[str, Any]) -> Array:
    """Keys of `size` blocks for bundle `n` of heads, whose first is `column`, before bias: float32 [tokens, g d]."""
    columns, tokens, matrix = pl.ds(column, tiling.width), size * BLOCK, refs["matrix"]
    summed = jnp.int32 if tiling.eight_bits == "int8" else jnp.float32
    keys = jnp.dot(refs["zeros"][:tokens], refs["matrix_sums"][:, columns], preferred_element_type=jnp.float32)
    for group in range(tiling.key_groups):
        channels = slice(group * tiling.key.group, (group + 1) * tiling.key.group)
        codes = pltpu.bitcast(refs["codes"][: tokens // 4, channels], matrix.dtype)
        of_group = jnp.dot(codes, matrix[channels, columns], preferred_element_type=summed)
        scale = jnp.concatenate([refs["scales"][group, :tokens]] * (tiling.width // LANES), axis=1)
        keys = keys + of_group.astype(jnp.float32) * scale
    return keys * refs["column_scales"][n]


def _dot_transposed(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
