"""Dequantize and multiply."""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.triton.kernels.codes import load_vectors


@triton.jit
@no_type_check
def project(
    words,
    words_high,
    scales,
    zeros,
    weight,  # [WIDTH, COLUMNS]
    out,  # [128 * NUM_BLOCKS, COLUMNS]
    NUM_BLOCKS: tl.constexpr,  # of all sequences
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,  # columns of a program
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Dequantizes BLOCKS blocks and multiplies them by TILE columns of the weight."""
    # one axis: the others have no more than 65,535 programs, and the columns of a tile of blocks are close together
    across: tl.constexpr = (COLUMNS + TILE - 1) // TILE
    column = tl.program_id(0) % across * TILE + tl.arange(0, TILE)
    first = tl.program_id(0) // across * BLOCKS
    exists = first + tl.arange(0, BLOCKS) < NUM_BLOCKS
    real = column < COLUMNS
    acc_low = tl.full((BLOCKS * 64, TILE), 0.0, tl.float32)
    acc_high = tl.full((BLOCKS * 64, TILE), 0.0, tl.float32)
    at = tl.arange(0, CHUNK)[:, None] * COLUMNS + column[None, :]
    for channel in range(0, WIDTH, CHUNK):
        right = tl.load(weight + channel * COLUMNS + at, mask=real[None, :], other=0)
        low, high = load_vectors(
            words, words_high, scales, zeros, first, exists, channel,
            WIDTH, BITS, GROUP, BLOCKS, CHUNK, DTYPE, ARITHMETIC, ASSEMBLY,
        )  # fmt: skip
        acc_low = tl.dot(low, right, acc_low, input_precision=PRECISION)
        acc_high = tl.dot(high, right, acc_high, input_precision=PRECISION)
    token = tl.cast(first, tl.int64) * 128 + (tl.arange(0, BLOCKS * 64) // 64) * 128 + tl.arange(0, BLOCKS * 64) % 64
    there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
    mask = there[:, None] & real[None, :]
    at = token[:, None] * COLUMNS + column[None, :]
    tl.store(out + at, acc_low.to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + 64 * COLUMNS, acc_high.to(out.dtype.element_ty), mask=mask)
