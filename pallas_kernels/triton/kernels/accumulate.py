"""The kernels of `accumulate`: a running sum read, added to and quantized again, in place.

What is multiplied with a matrix is needed by the programs of all columns, and each of them overwrites its part of the
sum: so `lay_out` first writes it down elsewhere, in bfloat16 and for a range of blocks at a time. `add` then makes the
products, and every program quantizes the 128 columns of its tokens, which are whole groups, where they lie.

Tiles and halves are those of `codes`.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.triton.kernels.codes import at_history, load_vectors

COLUMNS = tl.constexpr(128)  # of a program: a group of the sum
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
MAGIC = tl.constexpr(8388608.0)  # 2^23: added to a number below it, leaves the nearest integer in the last bits


@triton.jit
@no_type_check
def _tile(scalars, history_blocks, WIDTH: tl.constexpr, BATCH: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr):
    """A program's first column, sequence, first block, the block behind its last that exists, first row in the range.

    Neighbours have the same tile, which the cache then holds; tiles are in order of their blocks, what exists first.
    """
    column, number = tl.program_id(0) % (WIDTH // COLUMNS) * COLUMNS, tl.program_id(0) // (WIDTH // COLUMNS)
    row, tile = number % BATCH, number // BATCH
    range_row = (row * TILES + tile).to(tl.int64) * (BLOCKS * 128)
    return column, row, tl.load(scalars + 1) + tile * BLOCKS, tl.load(history_blocks + row), range_row


@triton.jit
@no_type_check
def _low_tokens(BLOCKS: tl.constexpr):
    """Tokens t < 64 of a tile's blocks, in the tile."""
    row = tl.arange(0, BLOCKS * 64)
    return row // 64 * 128 + row % 64


@triton.jit
@no_type_check
def lay_out(
    scalars,  # int32 [2]: layer, first block of the range
    history_blocks,  # int32 [B]
    words,
    words_high,
    scales,
    zeros,
    matrix,  # [WIDTH, OUT_WIDTH] if MULTIPLY
    out,  # [B, 128 * blocks of the range, OUT_WIDTH]; rows of blocks that do not exist are not written
    NUM_BLOCKS: tl.constexpr,  # N, of each sequence
    BATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    MULTIPLY: tl.constexpr,
    TILES: tl.constexpr,  # of a sequence, in the range
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Dequantizes 128 columns of a tile, or its product with 128 columns of the matrix."""
    column, row, first, end, range_row = _tile(scalars, history_blocks, OUT_WIDTH, BATCH, TILES, BLOCKS)
    if first >= end:
        return
    exists = first + tl.arange(0, BLOCKS) < end
    history = (tl.load(scalars).to(tl.int64) * BATCH + row) * NUM_BLOCKS
    words, words_high, scales, zeros = at_history(words, words_high, scales, zeros, history, WIDTH, BITS, GROUP)
    columns = column + tl.arange(0, COLUMNS)
    if MULTIPLY:
        low = tl.full((BLOCKS * 64, COLUMNS), 0.0, tl.float32)
        high = tl.full((BLOCKS * 64, COLUMNS), 0.0, tl.float32)
        for channel in range(0, WIDTH, CHUNK):
            right = tl.load(matrix + (channel + tl.arange(0, CHUNK))[:, None] * OUT_WIDTH + columns[None, :])
            left_low, left_high = load_vectors(
                words, words_high, scales, zeros, first, exists, channel,
                WIDTH, BITS, GROUP, BLOCKS, CHUNK, DTYPE, ARITHMETIC, ASSEMBLY,
            )  # fmt: skip
            low = tl.dot(left_low, right, low, input_precision=PRECISION)
            high = tl.dot(left_high, right, high, input_precision=PRECISION)
    else:
        low, high = load_vectors(
            words, words_high, scales, zeros, first, exists, column,
            WIDTH, BITS, GROUP, BLOCKS, COLUMNS, DTYPE, ARITHMETIC, ASSEMBLY,
        )  # fmt: skip
    out += (range_row + _low_tokens(BLOCKS))[:, None] * OUT_WIDTH + columns[None, :]
    tl.store(out, low.to(DTYPE))
    tl.store(out + 64 * OUT_WIDTH, high.to(DTYPE))


@triton.jit
@no_type_check
def add(
    scalars,  # these as in `lay_out`
    history_blocks,
    words,  # of the stream, all layers
    words_high,
    scales,
    zeros,
    below,  # [B, 128 * blocks of the range, BELOW]: of the sum, what the last matrix is multiplied with
    matrix,  # [BELOW, SUM_WIDTH]
    stored,  # [B, 128 * blocks of the range, STORED]: of the stream
    lift,  # [STORED, SUM_WIDTH]
    sum_words,  # [B, N, 16, SUM_WIDTH], and so on: read, if ADD_SUM, and written
    sum_words_high,
    sum_scales,
    sum_zeros,
    NUM_BLOCKS: tl.constexpr,
    BATCH: tl.constexpr,
    SUM_WIDTH: tl.constexpr,
    BELOW: tl.constexpr,  # 0: no product
    STORED: tl.constexpr,  # 0: the stream is added as it is
    ADD_SUM: tl.constexpr,  # the sum is added as it is
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Adds up 128 columns of a tile and quantizes them."""
    column, row, first, end, range_row = _tile(scalars, history_blocks, SUM_WIDTH, BATCH, TILES, BLOCKS)
    if first >= end:
        return
    exists = first + tl.arange(0, BLOCKS) < end
    if STORED > 0:
        low = tl.full((BLOCKS * 64, COLUMNS), 0.0, tl.float32)
        high = tl.full((BLOCKS * 64, COLUMNS), 0.0, tl.float32)
    else:
        history = (tl.load(scalars).to(tl.int64) * BATCH + row) * NUM_BLOCKS
        words, words_high, scales, zeros = at_history(words, words_high, scales, zeros, history, WIDTH, BITS, GROUP)
        low, high = load_vectors(
            words, words_high, scales, zeros, first, exists, column,
            WIDTH, BITS, GROUP, BLOCKS, COLUMNS, tl.float32, tl.float32, ASSEMBLY,
        )  # fmt: skip
    sum_words, sum_words_high, sum_scales, sum_zeros = at_history(
        sum_words, sum_words_high, sum_scales, sum_zeros, row.to(tl.int64) * NUM_BLOCKS, SUM_WIDTH, 8, COLUMNS
    )
    if ADD_SUM:
        sum_low, sum_high = load_vectors(
            sum_words, sum_words_high, sum_scales, sum_zeros, first, exists, column,
            SUM_WIDTH, 8, COLUMNS, BLOCKS, COLUMNS, tl.float32, tl.float32, ASSEMBLY,
        )  # fmt: skip
        low += sum_low
        high += sum_high
    if BELOW > 0:  # last, so that nothing else is in registers when sums are quantized
        low, high = _multiply(low, high, below, matrix, range_row, column, SUM_WIDTH, BELOW, BLOCKS, CHUNK, PRECISION)
    if STORED > 0:
        low, high = _multiply(low, high, stored, lift, range_row, column, SUM_WIDTH, STORED, BLOCKS, CHUNK, PRECISION)
    code_low, scale_low, zero_low = _quantize(low)
    code_high, scale_high, zero_high = _quantize(high)
    if ADD_SUM:
        tl.debug_barrier()  # threads overwrite what others have read
    _store_words(sum_words, sum_words_high, code_low, code_high, first, exists, column, SUM_WIDTH, BLOCKS)
    there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
    groups: tl.constexpr = SUM_WIDTH // COLUMNS
    at = (tl.cast(first, tl.int64) * 128 + _low_tokens(BLOCKS)) * groups + column // COLUMNS
    tl.store(sum_scales + at, scale_low, mask=there)
    tl.store(sum_zeros + at, zero_low, mask=there)
    tl.store(sum_scales + at + 64 * groups, scale_high, mask=there)
    tl.store(sum_zeros + at + 64 * groups, zero_high, mask=there)


@triton.jit
@no_type_check
def _multiply(
    low,
    high,
    left,
    matrix,
    range_row,
    column,
    OUT_WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the product of a tile's rows with 128 columns of the matrix."""
    channels = tl.arange(0, CHUNK)
    left += (range_row + _low_tokens(BLOCKS))[:, None] * INNER + channels[None, :]
    matrix += channels[:, None] * OUT_WIDTH + (column + tl.arange(0, COLUMNS))[None, :]
    for channel in range(0, INNER, CHUNK):
        right = tl.load(matrix + channel * OUT_WIDTH)
        low = tl.dot(tl.load(left + channel), right, low, input_precision=PRECISION)
        high = tl.dot(tl.load(left + channel + 64 * INNER), right, high, input_precision=PRECISION)
    return low, high


@triton.jit
@no_type_check
def _quantize(x):
    """`numerics.quantization.quantize` of a group in each row at 8 bits: codes, and bfloat16 scales and zeros."""
    low = tl.min(x, axis=1)
    away, towards = _away_from_zero(low), low.to(tl.uint32, bitcast=True) & 0xFFFF0000
    zero = tl.where(low < 0, away, towards).to(tl.float32, bitcast=True)
    scale = _away_from_zero((tl.max(x, axis=1) - zero) * (1 / 255)).to(tl.float32, bitcast=True)
    scale = tl.maximum(scale, SMALLEST_NORMAL)
    unit = (x - zero[:, None]) * (1.0 / scale)[:, None]  # from 0 to 255, but for rounding
    return (unit + MAGIC).to(tl.uint32, bitcast=True) & 255, _upper(scale), _upper(zero)


@triton.jit
@no_type_check
def _away_from_zero(x):
    """Bits of x rounded to the next number away from zero that bfloat16 can hold."""
    return (x.to(tl.uint32, bitcast=True) + 0xFFFF) & 0xFFFF0000


@triton.jit
@no_type_check
def _upper(x):
    """float32 that bfloat16 can hold, as that."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
@no_type_check
def _store_words(words, words_high, low, high, first, exists, column, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """Codes of 8 bits [BLOCKS * 64, 128] of the low and the high tokens, as two planes."""
    pairs = tl.reshape(low | (high << 16), (BLOCKS, 4, 16, COLUMNS))
    shift = (4 * tl.arange(0, 4)).to(tl.uint32)[None, :, None, None]
    block = (tl.cast(first, tl.int64) + tl.arange(0, BLOCKS)) * (16 * WIDTH)
    at = block[:, None, None] + tl.arange(0, 16)[None, :, None] * WIDTH
    at += (column + tl.arange(0, COLUMNS))[None, None, :]
    there = exists[:, None, None]
    tl.store(words + at, tl.sum((pairs & 0x000F000F) << shift, axis=1), mask=there)
    tl.store(words_high + at, tl.sum(((pairs >> 4) & 0x000F000F) << shift, axis=1), mask=there)
