"""Keys out of stored vectors, which are scaled in registers and are the left operand of the matrix unit.

RoPE turns keys by their number in the tile, with tables that are constants of the kernel; queries are turned by the
distance that is left.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.triton.kernels.codes import load_fields, load_scales, load_vectors


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
def finish_keys(
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
def rebuild(
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
    ASSEMBLY: tl.constexpr,
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
        low, high = load_vectors(
            words, words_high, scales, zeros, first, exists, channel + done,
            WIDTH, BITS, GROUP, BLOCKS, CHUNK, DTYPE, ARITHMETIC, ASSEMBLY,
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
def rebuild8(
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
    """As `rebuild`, with codes and matrix [R, C] multiplied in 8 bits.

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
        pairs = load_fields(words, first, exists, channels, WIDTH, PLANE, 0, 0, 0, BLOCKS, CHUNK, False)
        if BITS == 3:
            pairs |= load_fields(words_high, first, exists, channels, WIDTH, 1, 0, 0, 0, BLOCKS, CHUNK, False) << 2
        if BITS == 8:
            pairs |= load_fields(words_high, first, exists, channels, WIDTH, 4, 0, 0, 0, BLOCKS, CHUNK, False) << 4
            pairs = pairs ^ 0x800080
        low, high = pairs.to(tl.int8), (pairs >> 16).to(tl.int8)
        if FORM == "fp8":
            left, right = left.to(tl.float8e4nv, bitcast=True), right.to(tl.float8e4nv, bitcast=True)
            low, high = low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
        scale_low = load_scales(scales, first, exists, 0, channel, WIDTH, GROUP, BLOCKS).to(tl.float32)[:, None]
        scale_high = load_scales(scales, first, exists, 1, channel, WIDTH, GROUP, BLOCKS).to(tl.float32)[:, None]
        scale_low, scale_high = scale_low * UNIT, scale_high * UNIT
        a += tl.dot(low, left).to(tl.float32) * scale_low
        b += tl.dot(low, right).to(tl.float32) * scale_low
        c += tl.dot(high, left).to(tl.float32) * scale_high
        d += tl.dot(high, right).to(tl.float32) * scale_high
    first_scale = tl.load(column_scales + column)[None, :]
    second_scale = tl.load(column_scales + column + HALF)[None, :]
    return a * first_scale, b * second_scale, c * first_scale, d * second_scale
