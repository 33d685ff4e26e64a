"""What the four warps of a warpgroup do in registers: each thread loads its own codes, and warps multiply by them.

Tokens t and t + 64 of a block lie 16 bits apart in a word (`numerics.packing`), and row r of a 64-row operand stands
for such a pair. Row 8 s + 2 c + e of warp w is token 32 s + 16 e + 4 w + c: what lies in a word of 4-bit codes belongs
to one warp, and in planes of every width the pairs of s and e lie 8 s + 4 e bits apart.

Channels are contracted in any order; `by_thread` is the one in which a thread loads eight neighbours at once.

Registers are those of the PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16" and "Matrix Fragments for
mma.m16n8k16": lane 4 g + c of a warp holds rows g and g + 8. Pallas has neither these loads nor products of single
warps; its interpreter runs the definitions in `warpgroup` instead.
"""

from collections.abc import Sequence
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.pallas_gpu.registers import (
    Lane,
    as_pair,
    assembly,
    extract,
    float_pair,
    multiply,
    pair_of,
    permute,
    select_bits,
    splat,
    transpose,
    two_of,
    widen,
)
from xquant_jax.numerics.packing import PLANES

ROWS = 64
"""Of an operand: half of a block's tokens."""

QUERIES = 8
"""Columns of a product of one warp."""


def by_row(tokens: Any) -> Any:
    """64 tokens of the leading axis in the order of an operand's rows."""
    a = tokens.reshape(2, 2, 4, 4, *tokens.shape[1:])  # s, e, w, c
    return a.transpose(2, 0, 3, 1, *range(4, a.ndim)).reshape(tokens.shape)


def by_thread(channels: Any) -> Any:
    """The last axis in the order of operands: channel 8 c + 2 j + i of each 32 stands at 8 j + 2 c + i."""
    a = channels.reshape(*channels.shape[:-1], -1, 4, 4, 2)
    return a.swapaxes(-3, -2).reshape(channels.shape)


def by_channel(sums: Any) -> Any:
    """The leading axis of what `weigh` adds up, 64 rows for 16 channels, as [4 warps, channels]."""
    a = sums.reshape(-1, 2, 4, 2, 4, 2, *sums.shape[1:])
    return a.transpose(2, 0, 5, 4, 1, 3, *range(6, a.ndim)).reshape(4, -1, *sums.shape[1:])


def by_channel_inverse(sums: Any) -> Any:
    """[4 warps, channels] as `by_channel` reads it."""
    a = sums.reshape(4, -1, 2, 4, 2, 2, *sums.shape[2:])  # w, channel // 32, g % 2, g // 2, m, row
    return a.transpose(1, 4, 0, 5, 3, 2, *range(6, a.ndim)).reshape(-1, *sums.shape[2:])


def shifted(lane: Lane, planes: Sequence[Any], shifts: Sequence[Any], bits: int) -> list[Any]:
    """Words of one channel with the planes' fields at bits 0, 4, ... 28; one word but for 8 bits."""
    words = [lane.number("shr", word, shift) for word, shift in zip(planes, shifts, strict=True)]
    if bits != 3:
        return words
    turns = lane.number("sub", 2, shifts[1])
    upper = lane.number("and", llvm.intr_fshl(planes[1], planes[1], turns), 0x44444444)
    return [select_bits(words[0], 0x33333333, upper)]


def numbers(fields: Sequence[Any], bits: int) -> Any:
    """Two bfloat16 numbers from two codes, whose fields end at bits 0 and 16: 128 + code, of 8 bits the code."""

    def number(field: Any, width: int, power: int) -> Any:  # 2^power + field * 2^(power - 7)
        return as_pair(select_bits(field, ((1 << width) - 1) * 0x10001, ((power + 127) << 7) * 0x10001))

    if bits < 8:
        return number(fields[0], bits, 7)
    low, high = number(fields[0], 4, 7), number(fields[1], 4, 11)  # a bfloat16 has 8 bits: all of this is exact
    return arith.addf(arith.addf(high, splat(-(2.0**11 + 2.0**7))), low)


def load_keys(
    words: Sequence[Any], scale: Any, zero: Any, bits: int, axis: str, group: Any
) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
    """Both halves of a block's vectors, dequantized, as left operands: rows `by_row`, channels `by_thread`."""
    lane, planes = Lane(), PLANES[bits]
    width = 32 * ir.MemRefType(words[0].type).shape[1]
    at = [lane.row_and_shift(p, lane.number("shr", lane.g, 1)) for p in planes]
    e = lane.number("shl", lane.number("and", lane.g, 1), 2)
    shifts = [lane.number("add", shift, e) for _, shift in at]
    bf16 = ir.BF16Type.get()
    registers = np.empty((2, width // 8, 2), object)  # half, column // 8, s
    of_tokens = [_token_numbers(lane, a, group) for a in (scale, zero)] if axis == "token" else []
    for column in range(width // 32):
        eight = lane.number("add", lane.number("shl", lane.c, 3), 32 * column)
        of_channels = [lane.load(bf16, 8, a, 0, eight) for a in (scale, zero)] if axis == "channel" else []
        for v in range(2):
            piece = lane.number("add", lane.number("shl", lane.c, 1), v)
            stored = zip(words, planes, at, strict=True)
            read = (lane.words(plane, p, row, column, piece) for plane, p, (row, _) in stored)
            four = [shifted(lane, channel, shifts, bits) for channel in zip(*read, strict=True)]
            for i, s, half in np.ndindex(2, 2, 2):
                byte = s + 2 * half
                pair = zip(four[2 * i], four[2 * i + 1], strict=True)
                codes = numbers([permute(a, b, 0x4400 + 0x1111 * byte) for a, b in pair], bits)
                if bits < 8:
                    codes = arith.addf(codes, splat(-128.0))
                scales, zeros = (
                    *(two_of(a, 2 * v + i) for a in of_channels),
                    *(pair_of(a[half][s]) for a in of_tokens),
                )
                registers[half, 4 * column + 2 * v + i, s] = llvm.intr_fma(codes, scales, zeros)
    low, high = (_fragmented(half, (ROWS, width)) for half in registers)
    return low, high


def load_tokens(memref: Any, group: Any) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
    """A group's scales or zeros of both halves of a block, in float32 and the same for all queries."""
    low, high = (
        _fragmented(np.array([pair_of(widen(x)) for x in row], object), (ROWS, QUERIES))
        for row in _token_numbers(Lane(), memref, group)
    )
    return low, high


def _token_numbers(lane: Lane, memref: Any, group: Any) -> list[list[Any]]:
    """Scales or zeros of a thread's four tokens, by half and s. `memref` [n, m] holds 128 tokens' groups."""
    rows, columns = ir.MemRefType(memref.type).shape
    groups = rows * columns // 128
    c, e = lane.number("shr", lane.g, 1), lane.number("and", lane.g, 1)
    first = lane.number("add", lane.number("shl", lane.w, 2), lane.number("add", c, lane.number("shl", e, 4)))
    found = []
    for half in range(2):
        found.append([])
        for s in range(2):
            token = lane.number("add", first, 64 * half + 32 * s)
            flat = lane.number("add", lane.number("mul", token, groups), group)
            power = columns.bit_length() - 1
            at = lane.number("shr", flat, power), lane.number("and", flat, columns - 1)
            found[-1].append(extract(lane.load(ir.BF16Type.get(), 1, memref, *at), 0))
    return found


def rotate(
    first: mgpu.FragmentedArray, second: mgpu.FragmentedArray, cos: mgpu.FragmentedArray, sin: mgpu.FragmentedArray
) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
    """first cos - second sin and second cos + first sin, in bfloat16."""
    left, right = np.empty_like(first.registers), np.empty_like(first.registers)
    # not `fma` of a negated product: the assembler makes an instruction of the negation, but a product and a
    # difference it contracts to two
    difference = "{.reg .b32 a, b; mul.bf16x2 a, $1, $3; mul.bf16x2 b, $2, $4; sub.bf16x2 $0, a, b;}"
    for at, a in np.ndenumerate(first.registers):
        b, c, s = (x.registers[at] for x in (second, cos, sin))
        left[at] = as_pair(assembly(difference, "=r,r,r,r,r", a, b, c, s))
        right[at] = llvm.intr_fma(b, c, arith.mulf(a, s))
    return _fragmented(left, first.shape), _fragmented(right, first.shape)


def score(first: mgpu.FragmentedArray, second: mgpu.FragmentedArray, queries: Any) -> mgpu.FragmentedArray:
    """Products of the halves of keys, columns `by_thread`, with those of QUERIES queries [2, d / 2 / 32 * 8, 32]."""
    lane, bf16 = Lane(), ir.BF16Type.get()
    sums = []
    for half, k in enumerate((first, second)):
        registers = k.registers.reshape(-1, 2)  # column // 8, s
        total = [utils.c(0.0, ir.F32Type.get())] * 4
        for column in range(k.shape[1] // 32):
            row = lane.number("add", lane.g, QUERIES * column)
            eight = lane.load(bf16, 8, queries, half, row, lane.number("shl", lane.c, 3))
            for v in range(2):
                left = list(registers[4 * column + 2 * v : 4 * column + 2 * v + 2].flat)
                total = multiply(left, [two_of(eight, 2 * v), two_of(eight, 2 * v + 1)], total)
        sums.append(total)
    total = [arith.addf(a, b) for a, b in zip(*sums, strict=True)]
    return _fragmented(np.array([float_pair(*total[:2]), float_pair(*total[2:])], object), (ROWS, QUERIES))


def warp_max(x: mgpu.FragmentedArray, least: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """The largest of every column in the rows of each warp, and of `least`, in which they are equal: in all of them."""
    columns = []
    for i in range(2):
        top = arith.maximumf(*(extract(register, i) for register in x.registers.flat))
        for distance in (4, 8, 16):
            top = arith.maximumf(top, utils.shfl_bfly(top, distance))
        columns.append(arith.maximumf(top, extract(least.registers.flat[0], i)))
    pair = float_pair(*columns)
    return _fragmented(np.array([pair, pair], object), (ROWS, QUERIES))


def weigh(
    sums: mgpu.FragmentedArray,
    shrink: mgpu.FragmentedArray,
    low: mgpu.FragmentedArray,
    high: mgpu.FragmentedArray,
    words: Sequence[Any],
    bits: int,
) -> mgpu.FragmentedArray:
    """sums * shrink + codes times the weights [64, QUERIES] of both halves of a block, of each warp's own tokens.

    Codes are 128 + code for less than 8 bits. Sums are [64 rows for 16 channels, QUERIES]: `by_channel`.
    """
    lane, planes = Lane(), PLANES[bits]
    width = 32 * ir.MemRefType(words[0].type).shape[1]
    right = []
    for a, b in zip(low.registers.flat, high.registers.flat, strict=True):  # s: eight rows of each half
        a, b = transpose(a), transpose(b)  # rows 2 c and 2 c + 1 of query g
        right.append([as_pair(permute(a, b, 0x5410)), as_pair(permute(a, b, 0x7632))])
    at = [lane.row_and_shift(p, lane.c) for p in planes]
    shifts = [shift for _, shift in at]
    # the lanes of a quarter of a warp have two g and four rows: their pieces must differ in the rows' last bits
    g = lane.number("or", lane.number("shr", lane.g, 1), lane.number("shl", lane.number("and", lane.g, 1), 2))
    before = sums.registers.reshape(-1, 2)
    by = list(shrink.registers.flat)
    after = np.empty_like(before)
    for column in range(width // 32):
        read = (lane.words(plane, p, row, column, g) for plane, p, (row, _) in zip(words, planes, at, strict=True))
        four = [shifted(lane, channel, shifts, bits) for channel in zip(*read, strict=True)]
        for m in range(2):
            total = [utils.c(0.0, ir.F32Type.get())] * 4
            for s in range(2):
                left = [
                    numbers([lane.number("shr", word, 8 * s + 4 * e) for word in four[2 * m + row]], bits)
                    for e in range(2)
                    for row in range(2)
                ]
                total = multiply(left, right[s], total)
            for row in range(2):
                added = float_pair(*total[2 * row : 2 * row + 2])
                after[2 * column + m, row] = llvm.intr_fma(before[2 * column + m, row], by[row], added)
    return _fragmented(after, sums.shape)


def _fragmented(registers: Any, shape: tuple[int, ...]) -> mgpu.FragmentedArray:
    layout = mgpu.WGMMA_LAYOUT
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )
