"""Stored vectors in registers: codes out of bit planes, scales and zeros.

A block of 128 tokens is read as two halves: in every plane of a stream, the fields of tokens t and t + 64 lie 16 bits
apart in one word, so that one turn of the word and one mask give both codes, and bits of 16.0 beside them make each
half of the word the bfloat16 number 16 + code. Rows of a tile are the tokens t < 64 of its blocks ("low") or the tokens
t + 64 of the same blocks ("high").

The interpreter does no bfloat16 arithmetic: there, and only there, ARITHMETIC is float32.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check  # the test suite's type checks would wrap what Triton compiles
def load_fields(
    words,
    first,
    exists,
    channels,
    WIDTH: tl.constexpr,
    PLANE: tl.constexpr,
    BIT: tl.constexpr,
    BESIDE: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    numbers=None,
):
    """Field pairs of one plane of tokens t < 64: [BLOCKS * 64, CHANNELS], or transposed (AXIS 1).

    Each half of a word has its field from bit BIT on, and the bits of BESIDE. `words` points at block 0 of the
    sequence; block `first` + j is read where `exists`[j].

    numbers: points at 0 ... 15, for codes that a matrix unit takes from registers. Only what comes from loads alone is
    loaded in the layout that it wants, and not carried there through shared memory.
    """
    # four axes from the start: a layout passes from a load through a broadcast, but not through a new axis
    words += tl.cast(first, tl.int64) * (4 * PLANE * WIDTH)
    block = tl.arange(0, BLOCKS) * (4 * PLANE * WIDTH)
    row = tl.arange(0, 4 * PLANE) * WIDTH
    field = tl.arange(0, 16 // PLANE)
    turn = (PLANE * (field if numbers is None else tl.load(numbers + field)) + 32 - BIT).to(tl.uint32) % 32
    if AXIS == 0:  # [blocks, fields, rows, channels]
        at = block[:, None, None, None] + row[None, None, :, None] + channels[None, None, None, :]
        there = exists[:, None, None, None]
        turn = turn[None, :, None, None]
    else:  # [channels, blocks, fields, rows]
        at = channels[:, None, None, None] + block[None, :, None, None] + row[None, None, None, :]
        there = exists[None, :, None, None]
        turn = turn[None, None, :, None]
    w = tl.load(words + at) if BLOCKS == 1 else tl.load(words + at, mask=there, other=0)
    mask: tl.constexpr = ((1 << PLANE) - 1 << BIT) * 0x10001
    if ASSEMBLY:
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shf.r.wrap.b32 t, $1, $1, $2; lop3.b32 $0, t, $3, $4, 0xEA; }",
            "=r,r,r,r,r", [w, turn, mask, BESIDE], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    elif BIT == 0:
        pairs = (w >> turn) & mask | BESIDE
    else:
        pairs = ((w >> turn) | (w << ((32 - turn) % 32))) & mask | BESIDE
    if AXIS == 0:
        return tl.reshape(pairs, (BLOCKS * 64, CHANNELS))
    else:
        return tl.reshape(pairs, (CHANNELS, BLOCKS * 64))


@triton.jit
@no_type_check
def load_pairs(
    words,
    words_high,
    first,
    exists,
    channels,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    numbers=None,
):
    """Pairs of bfloat16 numbers, 16 + code; of 8 bits the lower and the upper 4 apart."""
    PLANE: tl.constexpr = 4 if BITS >= 4 else 2
    pairs = load_fields(
        words, first, exists, channels, WIDTH, PLANE, 3, 0x41804180, AXIS, BLOCKS, CHANNELS, ASSEMBLY, numbers
    )
    upper = pairs
    if BITS == 3:
        upper = load_fields(
            words_high, first, exists, channels, WIDTH, 1, 5, 0, AXIS, BLOCKS, CHANNELS, ASSEMBLY, numbers
        )
        pairs = pairs | upper
    if BITS == 8:
        upper = load_fields(
            words_high, first, exists, channels, WIDTH, 4, 3, 0x41804180, AXIS, BLOCKS, CHANNELS, ASSEMBLY, numbers
        )
    return pairs, upper


@triton.jit
@no_type_check
def codes_of_half(pairs, upper, HALF: tl.constexpr, BITS: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Codes of one half of the tokens, exactly: 16 + code, or the code itself if there are 8 bits."""
    codes = (pairs >> (16 * HALF)).to(tl.uint16).to(tl.bfloat16, bitcast=True).to(ARITHMETIC)
    if BITS == 8:
        upper = (upper >> (16 * HALF)).to(tl.uint16).to(tl.bfloat16, bitcast=True).to(ARITHMETIC)
        codes = tl.fma(upper - 16.0, 16.0, codes - 16.0)
    return codes


@triton.jit
@no_type_check
def load_scales(scales, first, exists, half, channel, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
    """Scales (or zeros) of groups of channels, of the group that `channel` is in: [BLOCKS * 64] rows of a half."""
    scales += (tl.cast(first, tl.int64) * 128 + 64 * half) * (WIDTH // GROUP) + channel // GROUP
    row = tl.arange(0, BLOCKS * 64)
    at = (row // 64 * 128 + row % 64) * (WIDTH // GROUP)
    if BLOCKS == 1:
        return tl.load(scales + at)
    else:
        there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
        return tl.load(scales + at, mask=there, other=0)


@triton.jit
@no_type_check
def _load_channel_scales(
    scales,
    first,
    exists,
    channel,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """Scales (or zeros) of whole blocks for each channel: [BLOCKS * 64, CHANNELS], equal within a block."""
    # in pairs: a load of fewer values than there are threads may be repeated in every layout that needs it
    twos = (scales + tl.cast(first, tl.int64) * WIDTH + channel).to(tl.pointer_type(tl.uint32), bitcast=True)
    at = tl.arange(0, BLOCKS)[:, None] * (WIDTH // 2) + tl.arange(0, CHANNELS // 2)[None, :]
    two = tl.load(twos + at) if BLOCKS == 1 else tl.load(twos + at, mask=exists[:, None], other=0)
    even = two.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    odd = (two >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    s = tl.reshape(tl.join(even, odd), (BLOCKS, CHANNELS)).to(ARITHMETIC)
    return tl.reshape(tl.broadcast_to(s[:, None, :], (BLOCKS, 64, CHANNELS)), (BLOCKS * 64, CHANNELS))


@triton.jit
@no_type_check
def load_vectors(
    words,
    words_high,
    scales,
    zeros,
    first,
    exists,
    channel,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Channels channel ... channel + CHANNELS of the stored vectors, low and high tokens [BLOCKS * 64, CHANNELS].

    GROUP 0: groups run along the channel, over the 128 tokens of a block; else over GROUP channels of a token.
    """
    channels = channel + tl.arange(0, CHANNELS)
    pairs, upper = load_pairs(words, words_high, first, exists, channels, WIDTH, BITS, 0, BLOCKS, CHANNELS, ASSEMBLY)
    low, high = codes_of_half(pairs, upper, 0, BITS, ARITHMETIC), codes_of_half(pairs, upper, 1, BITS, ARITHMETIC)
    if GROUP == 0:
        scale_low = _load_channel_scales(scales, first, exists, channel, WIDTH, BLOCKS, CHANNELS, ARITHMETIC)
        zero_low = _load_channel_scales(zeros, first, exists, channel, WIDTH, BLOCKS, CHANNELS, ARITHMETIC)
        scale_high, zero_high = scale_low, zero_low
    else:
        scale_low = load_scales(scales, first, exists, 0, channel, WIDTH, GROUP, BLOCKS).to(ARITHMETIC)[:, None]
        scale_high = load_scales(scales, first, exists, 1, channel, WIDTH, GROUP, BLOCKS).to(ARITHMETIC)[:, None]
        zero_low = load_scales(zeros, first, exists, 0, channel, WIDTH, GROUP, BLOCKS).to(ARITHMETIC)[:, None]
        zero_high = load_scales(zeros, first, exists, 1, channel, WIDTH, GROUP, BLOCKS).to(ARITHMETIC)[:, None]
    if BITS < 8:  # the 16 of the codes is taken back, with a rounding like that of x^ itself
        zero_low, zero_high = zero_low - 16 * scale_low, zero_high - 16 * scale_high
    low = tl.fma(low, tl.broadcast_to(scale_low, low.shape), tl.broadcast_to(zero_low, low.shape))
    high = tl.fma(high, tl.broadcast_to(scale_high, high.shape), tl.broadcast_to(zero_high, high.shape))
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
@no_type_check
def at_history(words, words_high, scales, zeros, history, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Pointers to a stream's arrays at block `history` of all."""
    groups: tl.constexpr = WIDTH if GROUP == 0 else 128 * (WIDTH // GROUP)
    words += history * (4 * (4 if BITS >= 4 else 2) * WIDTH)
    words_high += history * (4 * (1 if BITS == 3 else 4) * WIDTH)
    return words, words_high, scales + history * groups, zeros + history * groups
