"""The Triton kernels: attention over packed history, and dequantize-and-multiply. They know nothing of JAX.

A block of 128 tokens is read as two halves: in every plane of a stream, the fields of tokens t and t + 64 lie 16 bits
apart in one word, so that one shift and one mask give both codes, and bits of 128.0 beside them make each half of the
word the bfloat16 number 128 + code. Rows of a tile are the tokens t < 64 of its blocks ("low") or the tokens t + 64 of
the same blocks ("high").

Keys: codes are scaled while they are in registers, where they are the left operand of the matrix unit. RoPE turns keys
by their number in the tile, with tables that are constants of the kernel, and queries by the distance that is left.
Values: the scales and zeros of tokens go onto the probabilities, and codes enter the matrix unit as they are.

The interpreter does no bfloat16 arithmetic: there, and only there, ARITHMETIC is float32.
"""

from typing import no_type_check

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below every score, and finite: differences of it are numbers
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check  # the test suite's type checks would wrap what Triton compiles
def _load_fields(
    words,
    first,
    exists,
    channels,
    WIDTH: tl.constexpr,
    PLANE: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Field pairs of one plane of tokens t < 64: [BLOCKS * 64, CHANNELS], or transposed (AXIS 1).

    `words` points at block 0 of the sequence; block `first` + j is read where `exists`[j].
    """
    # four axes from the start: a layout passes from a load through a broadcast, but not through a new axis
    words += tl.cast(first, tl.int64) * (4 * PLANE * WIDTH)
    block = tl.arange(0, BLOCKS) * (4 * PLANE * WIDTH)
    row = tl.arange(0, 4 * PLANE) * WIDTH
    shift = PLANE * tl.arange(0, 16 // PLANE).to(tl.uint32)
    if AXIS == 0:  # [blocks, fields, rows, channels]
        at = block[:, None, None, None] + row[None, None, :, None] + channels[None, None, None, :]
        there = exists[:, None, None, None]
        shift = shift[None, :, None, None]
    else:  # [channels, blocks, fields, rows]
        at = channels[:, None, None, None] + block[None, :, None, None] + row[None, None, None, :]
        there = exists[None, :, None, None]
        shift = shift[None, None, :, None]
    w = tl.load(words + at) if BLOCKS == 1 else tl.load(words + at, mask=there, other=0)
    mask: tl.constexpr = ((1 << PLANE) - 1) * 0x10001
    pairs = (w >> shift) & mask
    if AXIS == 0:
        return tl.reshape(pairs, (BLOCKS * 64, CHANNELS))
    else:
        return tl.reshape(pairs, (CHANNELS, BLOCKS * 64))


@triton.jit
@no_type_check
def _load_pairs(
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
):
    """Pairs of bfloat16 numbers, 128 + code; of 8 bits the lower and the upper 4 apart."""
    PLANE: tl.constexpr = 4 if BITS >= 4 else 2
    pairs = _load_fields(words, first, exists, channels, WIDTH, PLANE, AXIS, BLOCKS, CHANNELS)
    upper = pairs
    if BITS == 3:
        upper = _load_fields(words_high, first, exists, channels, WIDTH, 1, AXIS, BLOCKS, CHANNELS)
        pairs = pairs | (upper << 2)
    if BITS == 8:
        upper = _load_fields(words_high, first, exists, channels, WIDTH, 4, AXIS, BLOCKS, CHANNELS)
        upper = upper | 0x43004300
    return pairs | 0x43004300, upper


@triton.jit
@no_type_check
def _codes(pairs, upper, HALF: tl.constexpr, BITS: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Codes of one half of the tokens, exactly: 128 + code, or the code itself if there are 8 bits."""
    codes = (pairs >> (16 * HALF)).to(tl.uint16).to(tl.bfloat16, bitcast=True).to(ARITHMETIC)
    if BITS == 8:
        upper = (upper >> (16 * HALF)).to(tl.uint16).to(tl.bfloat16, bitcast=True).to(ARITHMETIC)
        codes = tl.fma(upper - 128.0, 16.0, codes - 128.0)
    return codes


@triton.jit
@no_type_check
def _load_scales(scales, first, exists, half, channel, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
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
def _load_vectors(
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
):
    """Channels channel ... channel + CHANNELS of the stored vectors, low and high tokens [BLOCKS * 64, CHANNELS].

    GROUP 0: groups run along the channel, over the 128 tokens of a block; else over GROUP channels of a token.
    """
    channels = channel + tl.arange(0, CHANNELS)
    pairs, upper = _load_pairs(words, words_high, first, exists, channels, WIDTH, BITS, 0, BLOCKS, CHANNELS)
    low, high = _codes(pairs, upper, 0, BITS, ARITHMETIC), _codes(pairs, upper, 1, BITS, ARITHMETIC)
    if BITS < 8:
        low -= 128.0
        high -= 128.0
    if GROUP == 0:
        scale_low = _load_channel_scales(scales, first, exists, channel, WIDTH, BLOCKS, CHANNELS, ARITHMETIC)
        zero_low = _load_channel_scales(zeros, first, exists, channel, WIDTH, BLOCKS, CHANNELS, ARITHMETIC)
        scale_high, zero_high = scale_low, zero_low
    else:
        scale_low = _load_scales(scales, first, exists, 0, channel, WIDTH, GROUP, BLOCKS).to(ARITHMETIC)[:, None]
        scale_high = _load_scales(scales, first, exists, 1, channel, WIDTH, GROUP, BLOCKS).to(ARITHMETIC)[:, None]
        zero_low = _load_scales(zeros, first, exists, 0, channel, WIDTH, GROUP, BLOCKS).to(ARITHMETIC)[:, None]
        zero_high = _load_scales(zeros, first, exists, 1, channel, WIDTH, GROUP, BLOCKS).to(ARITHMETIC)[:, None]
    low = tl.fma(low, tl.broadcast_to(scale_low, low.shape), tl.broadcast_to(zero_low, low.shape))
    high = tl.fma(high, tl.broadcast_to(scale_high, high.shape), tl.broadcast_to(zero_high, high.shape))
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
@no_type_check
def _round(x, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """x in DTYPE; the compiler of NVIDIA's code rounds in pairs only if it is told to."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return x.to(DTYPE)


@triton.jit
@no_type_check
def _finish_keys(
    first_half,
    second_half,
    bias,
    norm,
    head,
    cos,
    sin,
    norm_eps,
    DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROPE: tl.constexpr,
    DTYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Bias, RMS norm and RoPE of keys whose halves [rows, DIM/2] are float32, and the norm's factor for each row.

    The factor is not in the keys yet: it is cheaper to multiply scores by it.
    """
    i = tl.arange(0, DIM // 2)
    if HAS_BIAS:
        first_half += tl.load(bias + head * DIM + i).to(tl.float32)[None, :]
        second_half += tl.load(bias + head * DIM + DIM // 2 + i).to(tl.float32)[None, :]
    inverse = 1.0
    if HAS_NORM:
        square = tl.sum(first_half * first_half + second_half * second_half, axis=1)
        inverse = tl.rsqrt(square / DIM + norm_eps)
    first_half, second_half = _round(first_half, DTYPE, ASSEMBLY), _round(second_half, DTYPE, ASSEMBLY)
    if HAS_NORM:
        first_half *= tl.load(norm + i)[None, :]
        second_half *= tl.load(norm + DIM // 2 + i)[None, :]
    if ROPE:
        turned = tl.fma(first_half, cos, -(second_half * sin))
        second_half = tl.fma(second_half, cos, first_half * sin)
        first_half = turned
    return first_half, second_half, inverse


@triton.jit
@no_type_check
def _rebuild(
    words,
    words_high,
    scales,
    zeros,
    first,
    exists,
    matrix,
    head,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys of one head, CHUNK channels at a time: halves of the low tokens' keys, then halves of the high ones'."""
    HALF: tl.constexpr = DIM // 2
    LATENT: tl.constexpr = WIDTH // KV_HEADS if FORM == "per_head" else WIDTH
    COLUMNS: tl.constexpr = DIM if FORM == "per_head" else KV_HEADS * DIM
    channel = head * LATENT if FORM == "per_head" else 0
    column = 0 if FORM == "per_head" else head * DIM
    at = tl.arange(0, CHUNK)[:, None] * COLUMNS + (column + tl.arange(0, HALF))[None, :]
    a = tl.full((BLOCKS * 64, HALF), 0.0, tl.float32)
    b = tl.full((BLOCKS * 64, HALF), 0.0, tl.float32)
    c = tl.full((BLOCKS * 64, HALF), 0.0, tl.float32)
    d = tl.full((BLOCKS * 64, HALF), 0.0, tl.float32)
    for done in range(0, LATENT, CHUNK):
        left = tl.load(matrix + (channel + done) * COLUMNS + at)
        right = tl.load(matrix + (channel + done) * COLUMNS + HALF + at)
        low, high = _load_vectors(
            words, words_high, scales, zeros, first, exists, channel + done,
            WIDTH, BITS, GROUP, BLOCKS, CHUNK, DTYPE, ARITHMETIC,
        )  # fmt: skip
        a = tl.dot(low, left, a, input_precision=PRECISION)
        b = tl.dot(low, right, b, input_precision=PRECISION)
        c = tl.dot(high, left, c, input_precision=PRECISION)
        d = tl.dot(high, right, d, input_precision=PRECISION)
    return a, b, c, d


@triton.jit
@no_type_check
def _load_of_groups(
    scales,
    first,
    exists,
    half,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Scales (or zeros) of all groups, 0 where there is none: [BLOCKS * 64, GROUPS] rows of a half."""
    scales += (tl.cast(first, tl.int64) * 128 + 64 * half) * (WIDTH // GROUP)
    row, group = tl.arange(0, BLOCKS * 64), tl.arange(0, GROUPS)
    at = (row // 64 * 128 + row % 64)[:, None] * (WIDTH // GROUP) + group[None, :]
    there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
    return tl.load(scales + at, mask=there[:, None] & (group < WIDTH // GROUP)[None, :], other=0)


@triton.jit
@no_type_check
def _rebuild8(
    words,
    words_high,
    scales,
    zeros,
    first,
    exists,
    matrix,
    sums,
    column_scales,
    head,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `_rebuild`, with codes and matrix [R, C] multiplied in 8 bits.

    A byte that holds a code q is the number q in int8, and q / 512 in e4m3, for q < 16 exactly.
    """
    HALF: tl.constexpr = DIM // 2
    COLUMNS: tl.constexpr = KV_HEADS * DIM
    LINES: tl.constexpr = WIDTH // GROUP
    GROUPS: tl.constexpr = 16 if LINES <= 16 else 32 if LINES <= 32 else 64 if LINES <= 64 else 128
    UNIT: tl.constexpr = 512.0 if FORM == "fp8" else 1.0
    column = head * DIM + tl.arange(0, HALF)
    line = tl.arange(0, GROUPS)
    a = tl.full((BLOCKS * 64, HALF), 0.0, tl.float32)
    b = tl.full((BLOCKS * 64, HALF), 0.0, tl.float32)
    c = tl.full((BLOCKS * 64, HALF), 0.0, tl.float32)
    d = tl.full((BLOCKS * 64, HALF), 0.0, tl.float32)
    for part in tl.static_range(4 if BITS == 8 else 2):
        # sums in halves that bfloat16 holds, times zeros; times 128 scales, if that was taken from codes to fit int8
        added = zeros if part < 2 else scales
        added_low = _load_of_groups(added, first, exists, 0, WIDTH, GROUP, GROUPS, BLOCKS).to(DTYPE)
        added_high = _load_of_groups(added, first, exists, 1, WIDTH, GROUP, GROUPS, BLOCKS).to(DTYPE)
        if part >= 2:
            added_low, added_high = added_low * 128, added_high * 128
        of_sums = (part % 2 * LINES + line)[:, None] * COLUMNS + column[None, :]
        first_sums = tl.load(sums + of_sums, mask=(line < LINES)[:, None], other=0)
        second_sums = tl.load(sums + of_sums + HALF, mask=(line < LINES)[:, None], other=0)
        a = tl.dot(added_low, first_sums, a, input_precision=PRECISION)
        b = tl.dot(added_low, second_sums, b, input_precision=PRECISION)
        c = tl.dot(added_high, first_sums, c, input_precision=PRECISION)
        d = tl.dot(added_high, second_sums, d, input_precision=PRECISION)
    at = tl.arange(0, CHUNK)[:, None] + column[None, :] * WIDTH
    for channel in range(0, WIDTH, CHUNK):
        left = tl.load(matrix + channel + at)
        right = tl.load(matrix + channel + HALF * WIDTH + at)
        channels = channel + tl.arange(0, CHUNK)
        PLANE: tl.constexpr = 4 if BITS >= 4 else 2
        pairs = _load_fields(words, first, exists, channels, WIDTH, PLANE, 0, BLOCKS, CHUNK)
        if BITS == 3:
            pairs = pairs | (_load_fields(words_high, first, exists, channels, WIDTH, 1, 0, BLOCKS, CHUNK) << 2)
        if BITS == 8:
            pairs = pairs | (_load_fields(words_high, first, exists, channels, WIDTH, 4, 0, BLOCKS, CHUNK) << 4)
            pairs = pairs ^ 0x800080
        low, high = pairs.to(tl.int8), (pairs >> 16).to(tl.int8)
        if FORM == "fp8":
            left, right = left.to(tl.float8e4nv, bitcast=True), right.to(tl.float8e4nv, bitcast=True)
            low, high = low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
        scale_low = _load_scales(scales, first, exists, 0, channel, WIDTH, GROUP, BLOCKS).to(tl.float32)[:, None]
        scale_high = _load_scales(scales, first, exists, 1, channel, WIDTH, GROUP, BLOCKS).to(tl.float32)[:, None]
        scale_low, scale_high = scale_low * UNIT, scale_high * UNIT
        a += tl.dot(low, left).to(tl.float32) * scale_low
        b += tl.dot(low, right).to(tl.float32) * scale_low
        c += tl.dot(high, left).to(tl.float32) * scale_high
        d += tl.dot(high, right).to(tl.float32) * scale_high
    first_scale = tl.load(column_scales + column)[None, :]
    second_scale = tl.load(column_scales + column + HALF)[None, :]
    return a * first_scale, b * second_scale, c * first_scale, d * second_scale


@triton.jit
@no_type_check
def _mask(score, first, exists, half, query_position, sliding_window, BLOCKS: tl.constexpr):
    """-inf where a query does not see a key: later ones, those before the window, blocks that do not exist."""
    row = tl.arange(0, BLOCKS * 64)
    position = (first + row // 64) * 128 + row % 64 + 64 * half
    distance = query_position[None, :] - position[:, None]
    sees = (distance >= 0) & (distance < sliding_window)
    if BLOCKS > 1:
        there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
        sees = sees & there[:, None]
    return tl.where(sees, score, float("-inf"))


@triton.jit
@no_type_check
def _share(bounds, row, BLOCKS: tl.constexpr):
    """The blocks of a sequence that this program reads: an equal share of those that exist, in whole tiles."""
    begin = tl.load(bounds + 4 * row)
    end = tl.load(bounds + 4 * row + 1)
    splits = tl.num_programs(1)
    share = ((end - begin + splits - 1) // splits + BLOCKS - 1) // BLOCKS * BLOCKS
    begin = begin + tl.program_id(1) * share
    return begin, tl.minimum(begin + share, end)


@triton.jit
@no_type_check
def _at_history(
    words, words_high, scales, zeros, history, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):
    """Pointers to a stream's arrays at block `history` of all."""
    groups: tl.constexpr = WIDTH if GROUP == 0 else 128 * (WIDTH // GROUP)
    words += history * (4 * (4 if BITS >= 4 else 2) * WIDTH)
    words_high += history * (4 * (1 if BITS == 3 else 4) * WIDTH)
    return words, words_high, scales + history * groups, zeros + history * groups


@triton.jit
@no_type_check
def _score_tile(
    first,
    exists,
    head,
    q_first,
    q_second,
    query_position,
    sliding_window,
    earliest,
    latest,
    end,
    cos,
    sin,
    base_rotation,
    words,
    words_high,
    scales,
    zeros,
    matrix,
    matrix_first,
    matrix_second,
    sums,
    column_scales,
    bias,
    norm,
    NUM_BLOCKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Scores of the low and of the high tokens of a tile, [BLOCKS * 64, QUERIES]; -inf: not seen."""
    HALF: tl.constexpr = DIM // 2
    LATENT: tl.constexpr = WIDTH // KV_HEADS
    RESIDENT: tl.constexpr = FORM == "per_head" and CHUNK == LATENT
    i = tl.arange(0, HALF)
    # most tiles are seen by every query: the mask is left out there
    partly = (first * 128 <= latest - sliding_window) | ((first + BLOCKS) * 128 > tl.minimum(earliest + 1, end * 128))
    if RESIDENT:
        low, high = _load_vectors(
            words, words_high, scales, zeros, first, exists, head * LATENT,
            WIDTH, BITS, GROUP, BLOCKS, LATENT, DTYPE, ARITHMETIC,
        )  # fmt: skip
    elif FORM == "int8" or FORM == "fp8":
        low_first, low_second, high_first, high_second = _rebuild8(
            words, words_high, scales, zeros, first, exists, matrix, sums, column_scales, head,
            WIDTH, BITS, GROUP, FORM, DIM, KV_HEADS, BLOCKS, CHUNK, DTYPE, PRECISION,
        )  # fmt: skip
    elif FORM != "identity":
        low_first, low_second, high_first, high_second = _rebuild(
            words, words_high, scales, zeros, first, exists, matrix, head,
            WIDTH, BITS, GROUP, FORM, DIM, KV_HEADS, BLOCKS, CHUNK, DTYPE, ARITHMETIC, PRECISION,
        )  # fmt: skip
    else:
        low_first, high_first = _load_vectors(
            words, words_high, scales, zeros, first, exists, head * LATENT,
            WIDTH, BITS, GROUP, BLOCKS, HALF, DTYPE, ARITHMETIC,
        )  # fmt: skip
        low_second, high_second = _load_vectors(
            words, words_high, scales, zeros, first, exists, head * LATENT + HALF,
            WIDTH, BITS, GROUP, BLOCKS, HALF, DTYPE, ARITHMETIC,
        )  # fmt: skip
    for half in tl.static_range(2):
        # one half of the tokens after the other: the accumulators of both would fill the registers
        if RESIDENT:
            z = high if half else low
            k_first = tl.dot(z, matrix_first, input_precision=PRECISION)
            k_second = tl.dot(z, matrix_second, input_precision=PRECISION)
        else:
            k_first = (high_first if half else low_first).to(tl.float32)
            k_second = (high_second if half else low_second).to(tl.float32)
        k_first, k_second, inverse = _finish_keys(
            k_first, k_second, bias, norm, head, cos, sin, NORM_EPS, DIM, HAS_BIAS, HAS_NORM, ROPE, DTYPE, ASSEMBLY
        )
        if ROPE:
            base_cos = tl.load(base_rotation + (2 * first + half) * HALF + i)[:, None]
            base_sin = tl.load(base_rotation + (2 * NUM_BLOCKS + 2 * first + half) * HALF + i)[:, None]
            left = (q_first * base_cos + q_second * base_sin).to(DTYPE)
            right = (q_second * base_cos - q_first * base_sin).to(DTYPE)
        else:
            left, right = q_first.to(DTYPE), q_second.to(DTYPE)
        score = tl.dot(k_first, left, input_precision=PRECISION)
        score = tl.dot(k_second, right, score, input_precision=PRECISION)
        if HAS_NORM:
            score *= inverse[:, None]
        if partly:
            score = _mask(score, first, exists, half, query_position, sliding_window, BLOCKS)
        if half == 0:
            score_low = score
        else:
            score_high = score
    return score_low, score_high


@triton.jit
@no_type_check
def _load_constants(
    q,
    tile_rotation,
    matrix,
    row,
    head,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What stays in registers and shared memory: halves of the queries, the tile's rotation, halves of the rebuild."""
    HALF: tl.constexpr = DIM // 2
    LATENT: tl.constexpr = WIDTH // KV_HEADS
    i = tl.arange(0, HALF)
    q += ((row * KV_HEADS + head) * QUERIES + tl.arange(0, QUERIES))[None, :] * DIM + i[:, None]
    cos, sin, matrix_first, matrix_second = 0, 0, 0, 0
    if ROPE:
        at = tl.arange(0, BLOCKS * 64)[:, None] * HALF + i[None, :]
        cos = tl.load(tile_rotation + at).to(DTYPE)
        sin = tl.load(tile_rotation + BLOCKS * 64 * HALF + at).to(DTYPE)
    if FORM == "per_head" and CHUNK == LATENT:
        at = (head * LATENT + tl.arange(0, LATENT))[:, None] * DIM + i[None, :]
        matrix_first = tl.load(matrix + at)
        matrix_second = tl.load(matrix + at + HALF)
    return tl.load(q), tl.load(q + HALF), cos, sin, matrix_first, matrix_second


@triton.jit
@no_type_check
def _add_values(
    score_low,
    score_high,
    top,
    total,
    offset,
    acc,
    first,
    exists,
    channel,
    words,
    words_high,
    scales,
    zeros,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867); acc is [CHANNELS, QUERIES].

    The sum of values is acc + offset: acc weighs codes with p * scale, offset collects p * zero and takes the 128 back.
    total and offset are summed over the rows of a tile by the caller, at the end.
    """
    CODE_OFFSET: tl.constexpr = 128.0 if BITS < 8 else 0.0
    higher = tl.maximum(top, tl.max(tl.maximum(score_low, score_high), axis=0))
    shrink = tl.exp2(top - higher)
    p_low = tl.exp2(score_low - higher[None, :])
    p_high = tl.exp2(score_high - higher[None, :])
    total = total * shrink[None, :] + (p_low + p_high)

    scale_low = _load_scales(scales, first, exists, 0, channel, WIDTH, GROUP, BLOCKS).to(tl.float32)[:, None]
    scale_high = _load_scales(scales, first, exists, 1, channel, WIDTH, GROUP, BLOCKS).to(tl.float32)[:, None]
    zero_low = _load_scales(zeros, first, exists, 0, channel, WIDTH, GROUP, BLOCKS).to(tl.float32)[:, None]
    zero_high = _load_scales(zeros, first, exists, 1, channel, WIDTH, GROUP, BLOCKS).to(tl.float32)[:, None]
    weight_low = (p_low * scale_low).to(DTYPE)
    weight_high = (p_high * scale_high).to(DTYPE)
    # the rounded weights, so that what they make of 128 is taken back exactly
    codes_offset = CODE_OFFSET * (weight_low.to(tl.float32) + weight_high.to(tl.float32))
    offset = offset * shrink[None, :] + (p_low * zero_low + p_high * zero_high - codes_offset)

    channels = channel + tl.arange(0, CHANNELS)
    pairs, upper = _load_pairs(words, words_high, first, exists, channels, WIDTH, BITS, 1, BLOCKS, CHANNELS)
    low, high = _codes(pairs, upper, 0, BITS, ARITHMETIC), _codes(pairs, upper, 1, BITS, ARITHMETIC)
    # tokens t and t + 64 side by side, as they lie in a register
    codes = tl.reshape(tl.join(low, high), (CHANNELS, BLOCKS * 128)).to(DTYPE)
    weights = tl.reshape(tl.permute(tl.join(weight_low, weight_high), (0, 2, 1)), (BLOCKS * 128, QUERIES))
    acc = tl.dot(codes, weights, acc * shrink[None, :], input_precision=PRECISION)
    return higher, total, offset, acc


@triton.jit
@no_type_check
def _store_part(out, lse, at, real, channel, top, total, offset, acc, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Normalizes and stores attention [rows `at`, WIDTH] and its log-sum-exp; the latter with the first channels."""
    total = tl.sum(total, axis=0)
    some = tl.where(total > 0, total, 1.0)
    acc = (acc + tl.sum(offset, axis=0)[None, :]) / some[None, :]
    value = tl.where(total > 0, (top + tl.log2(some)) * LN_2, float("-inf"))
    if channel == 0:
        tl.store(lse + at, value, mask=real)
    columns = channel + tl.arange(0, CHANNELS)
    tl.store(out + at.to(tl.int64)[None, :] * WIDTH + columns[:, None], acc, mask=real[None, :])


@triton.jit
@no_type_check
def decode(
    scalars,  # int32 [2]: layer, sliding window
    bounds,  # int32 [B, 4]: first block, one past the last one, earliest and latest position of its queries
    q,  # float32 [B, K, QUERIES, DIM]: turned by its position, times scale * log2(e)
    query_positions,  # int32 [B, QUERIES]; -1: no query
    tile_rotation,  # float32 [2, BLOCKS * 64, DIM/2]: cosine and sine for each row's number in the tile
    base_rotation,  # float32 [2, 2 N, DIM/2]: for 0, 64, 128, ...
    key_words,
    key_words_high,
    key_scales,
    key_zeros,
    matrix,
    bias,
    norm,
    value_words,
    value_words_high,
    value_scales,
    value_zeros,
    out,  # float32 [B, splits, LENGTH * H, VALUE_WIDTH / K], normalized within the split
    lse,  # float32 [B, splits, LENGTH * H]
    NUM_BLOCKS: tl.constexpr,  # N, of each sequence
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,  # of a kv head: LENGTH * SHARED and padding
    LENGTH: tl.constexpr,
    SHARED: tl.constexpr,  # query heads of a kv head
    DIM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a tile
    CHUNK: tl.constexpr,  # channels of a dense rebuild at once
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Attention of one kv head to one part of a sequence's blocks, values of each head side by side."""
    row, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    VALUE_DIM: tl.constexpr = VALUE_WIDTH // KV_HEADS
    begin, end = _share(bounds, row, BLOCKS)
    history = (tl.load(scalars).to(tl.int64) * BATCH + row) * NUM_BLOCKS
    sliding_window = tl.load(scalars + 1)
    earliest, latest = tl.load(bounds + 4 * row + 2), tl.load(bounds + 4 * row + 3)
    key_words, key_words_high, key_scales, key_zeros = _at_history(
        key_words, key_words_high, key_scales, key_zeros, history, KEY_WIDTH, KEY_BITS, KEY_GROUP
    )
    value_words, value_words_high, value_scales, value_zeros = _at_history(
        value_words, value_words_high, value_scales, value_zeros, history, VALUE_WIDTH, VALUE_BITS, VALUE_GROUP
    )
    query = tl.arange(0, QUERIES)
    query_position = tl.load(query_positions + row * QUERIES + query)
    q_first, q_second, cos, sin, matrix_first, matrix_second = _load_constants(
        q, tile_rotation, matrix, row, head, KV_HEADS, QUERIES, DIM, KEY_WIDTH, FORM, ROPE, BLOCKS, CHUNK, DTYPE
    )
    top = tl.full((QUERIES,), LOWEST, tl.float32)
    total = tl.full((BLOCKS * 64, QUERIES), 0.0, tl.float32)
    offset = tl.full((BLOCKS * 64, QUERIES), 0.0, tl.float32)
    acc = tl.full((VALUE_DIM, QUERIES), 0.0, tl.float32)
    for first in range(begin, end, BLOCKS):
        exists = first + tl.arange(0, BLOCKS) < end
        score_low, score_high = _score_tile(
            first, exists, head, q_first, q_second, query_position, sliding_window, earliest, latest, end,
            cos, sin, base_rotation, key_words, key_words_high, key_scales, key_zeros,
            matrix, matrix_first, matrix_second, matrix, matrix, bias, norm,
            NUM_BLOCKS, KV_HEADS, DIM, NORM_EPS, KEY_WIDTH, KEY_BITS, KEY_GROUP, FORM, HAS_BIAS, HAS_NORM, ROPE,
            BLOCKS, CHUNK, DTYPE, ARITHMETIC, PRECISION, ASSEMBLY,
        )  # fmt: skip
        top, total, offset, acc = _add_values(
            score_low, score_high, top, total, offset, acc, first, exists, head * VALUE_DIM,
            value_words, value_words_high, value_scales, value_zeros, VALUE_WIDTH, VALUE_BITS, VALUE_GROUP,
            VALUE_DIM, QUERIES, BLOCKS, DTYPE, ARITHMETIC, PRECISION,
        )  # fmt: skip
    number = (query // SHARED) * (KV_HEADS * SHARED) + head * SHARED + query % SHARED  # t, then query head
    at = (row * tl.num_programs(1) + tl.program_id(1)) * (LENGTH * KV_HEADS * SHARED) + number
    _store_part(out, lse, at, query < LENGTH * SHARED, 0, top, total, offset, acc, VALUE_DIM, VALUE_DIM)


@triton.jit
@no_type_check
def decode_scores(
    scalars,  # these as in `decode`
    bounds,
    q,
    query_positions,
    tile_rotation,
    base_rotation,
    words,
    words_high,
    scales,
    zeros,
    matrix,
    sums,  # these two with a matrix of 8 bits only
    column_scales,
    bias,
    norm,
    scores,  # float32 [B, LENGTH * H, 128 N], in units of log2; blocks out of bounds are not written
    NUM_BLOCKS: tl.constexpr,
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    LENGTH: tl.constexpr,
    SHARED: tl.constexpr,
    DIM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The first half of attention where all heads read the whole value stream: scores of one kv head."""
    row, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    begin, end = _share(bounds, row, BLOCKS)
    history = (tl.load(scalars).to(tl.int64) * BATCH + row) * NUM_BLOCKS
    sliding_window = tl.load(scalars + 1)
    earliest, latest = tl.load(bounds + 4 * row + 2), tl.load(bounds + 4 * row + 3)
    words, words_high, scales, zeros = _at_history(words, words_high, scales, zeros, history, WIDTH, BITS, GROUP)
    query = tl.arange(0, QUERIES)
    query_position = tl.load(query_positions + row * QUERIES + query)
    q_first, q_second, cos, sin, matrix_first, matrix_second = _load_constants(
        q, tile_rotation, matrix, row, head, KV_HEADS, QUERIES, DIM, WIDTH, FORM, ROPE, BLOCKS, CHUNK, DTYPE
    )
    number = (query // SHARED) * (KV_HEADS * SHARED) + head * SHARED + query % SHARED
    token = (tl.arange(0, BLOCKS * 64) // 64) * 128 + tl.arange(0, BLOCKS * 64) % 64
    at = (row * (LENGTH * KV_HEADS * SHARED) + number).to(tl.int64)[None, :] * (NUM_BLOCKS * 128) + token[:, None]
    for first in range(begin, end, BLOCKS):
        exists = first + tl.arange(0, BLOCKS) < end
        low, high = _score_tile(
            first, exists, head, q_first, q_second, query_position, sliding_window, earliest, latest, end,
            cos, sin, base_rotation, words, words_high, scales, zeros,
            matrix, matrix_first, matrix_second, sums, column_scales, bias, norm,
            NUM_BLOCKS, KV_HEADS, DIM, NORM_EPS, WIDTH, BITS, GROUP, FORM, HAS_BIAS, HAS_NORM, ROPE,
            BLOCKS, CHUNK, DTYPE, ARITHMETIC, PRECISION, ASSEMBLY,
        )  # fmt: skip
        there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
        real = there[:, None] & (query < LENGTH * SHARED)[None, :]
        tl.store(scores + at + first * 128, low, mask=real)
        tl.store(scores + at + first * 128 + 64, high, mask=real)


@triton.jit
@no_type_check
def decode_values(
    scalars,
    bounds,
    scores,  # of `decode_scores`
    words,
    words_high,
    scales,
    zeros,
    out,  # float32 [B, splits, LENGTH * H, CHANNELS if PER_HEAD else WIDTH], normalized within the split
    lse,  # float32 [B, splits, LENGTH * H]
    NUM_BLOCKS: tl.constexpr,
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,  # of a program
    LENGTH: tl.constexpr,
    SHARED: tl.constexpr,
    PER_HEAD: tl.constexpr,  # each CHANNELS are one kv head's values; else all heads read the whole width
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a program
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The second half: softmax of the scores of QUERIES query heads, and CHANNELS channels of their values."""
    TILES: tl.constexpr = WIDTH // CHANNELS
    ROWS: tl.constexpr = LENGTH * KV_HEADS * SHARED
    row, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    begin, end = _share(bounds, row, BLOCKS)
    history = (tl.load(scalars).to(tl.int64) * BATCH + row) * NUM_BLOCKS
    words, words_high, scales, zeros = _at_history(words, words_high, scales, zeros, history, WIDTH, BITS, GROUP)
    query = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    if PER_HEAD:
        real = query < LENGTH * SHARED
        query = (query // SHARED) * (KV_HEADS * SHARED) + tile * SHARED + query % SHARED
    else:
        real = query < ROWS
    token = (tl.arange(0, BLOCKS * 64) // 64) * 128 + tl.arange(0, BLOCKS * 64) % 64
    at = (row * ROWS + query).to(tl.int64)[None, :] * (NUM_BLOCKS * 128) + token[:, None]
    top = tl.full((QUERIES,), LOWEST, tl.float32)
    total = tl.full((BLOCKS * 64, QUERIES), 0.0, tl.float32)
    offset = tl.full((BLOCKS * 64, QUERIES), 0.0, tl.float32)
    acc = tl.full((CHANNELS, QUERIES), 0.0, tl.float32)
    for first in range(begin, end, BLOCKS):
        exists = first + tl.arange(0, BLOCKS) < end
        there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
        known = there[:, None] & real[None, :]
        low = tl.load(scores + at + first * 128, mask=known, other=float("-inf"))
        high = tl.load(scores + at + first * 128 + 64, mask=known, other=float("-inf"))
        top, total, offset, acc = _add_values(
            low, high, top, total, offset, acc, first, exists, tile * CHANNELS, words, words_high, scales, zeros,
            WIDTH, BITS, GROUP, CHANNELS, QUERIES, BLOCKS, DTYPE, ARITHMETIC, PRECISION,
        )  # fmt: skip
    at = (row * tl.num_programs(1) + tl.program_id(1)) * ROWS + query
    if PER_HEAD:
        _store_part(out, lse, at, real, 0, top, total, offset, acc, CHANNELS, CHANNELS)
    else:
        _store_part(out, lse, at, real, tile * CHANNELS, top, total, offset, acc, WIDTH, CHANNELS)


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
):
    """Dequantizes BLOCKS blocks and multiplies them by TILE columns of the weight."""
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    first = tl.program_id(1) * BLOCKS
    exists = first + tl.arange(0, BLOCKS) < NUM_BLOCKS
    real = column < COLUMNS
    acc_low = tl.full((BLOCKS * 64, TILE), 0.0, tl.float32)
    acc_high = tl.full((BLOCKS * 64, TILE), 0.0, tl.float32)
    at = tl.arange(0, CHUNK)[:, None] * COLUMNS + column[None, :]
    for channel in range(0, WIDTH, CHUNK):
        right = tl.load(weight + channel * COLUMNS + at, mask=real[None, :], other=0)
        low, high = _load_vectors(
            words, words_high, scales, zeros, first, exists, channel,
            WIDTH, BITS, GROUP, BLOCKS, CHUNK, DTYPE, ARITHMETIC,
        )  # fmt: skip
        acc_low = tl.dot(low, right, acc_low, input_precision=PRECISION)
        acc_high = tl.dot(high, right, acc_high, input_precision=PRECISION)
    token = tl.cast(first, tl.int64) * 128 + (tl.arange(0, BLOCKS * 64) // 64) * 128 + tl.arange(0, BLOCKS * 64) % 64
    there = tl.reshape(tl.broadcast_to(exists[:, None], (BLOCKS, 64)), (BLOCKS * 64,))
    mask = there[:, None] & real[None, :]
    at = token[:, None] * COLUMNS + column[None, :]
    tl.store(out + at, acc_low.to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + 64 * COLUMNS, acc_high.to(out.dtype.element_ty), mask=mask)
