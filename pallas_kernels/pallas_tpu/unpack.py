"""Codes out of bit planes, inside a kernel: two tokens at a time, in the order that costs nothing.

Tokens t and t + 64 of a block lie 16 bits apart in every plane (`numerics.packing`). A 32-bit word of the two codes,
read as two bfloat16, gives adjacent rows: row 2r + i of what is unpacked is token r + 64 i. Everything that meets
these rows (tables of RoPE, scales along the token) is put into the same order beforehand: `interleaved`.

Likewise tokens t, t + 32, t + 64 and t + 96 lie 8 bits apart, and a word of four codes read as int8 gives row 4r + i =
token r + 32 i.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import target
from pallas_kernels.pallas_tpu.streams import LANES
from xquant_jax.numerics.packing import BLOCK, PLANES

PAIRS = BLOCK // 2
"""Pairs of tokens in a block."""

ONE_HUNDRED_TWENTY_EIGHT = 0x43004300
"""Two bfloat16 128.0; a code or-ed into the last bits of the mantissa is added to it exactly."""

QUADS = BLOCK // 4
"""Fours of tokens in a block."""

SIGN_BITS = 0x80808080
"""Flipped in four bytes, they take 128 from each: int8 numbers."""


def interleaved(ways: int = 2) -> np.ndarray:
    """The token of each row where so many tokens share a word, int32 [128]."""
    return np.asarray(token_of(np.arange(BLOCK), ways), np.int32)


def token_of(row: Any, ways: int) -> Any:
    """The token of a row where 2 or 4 tokens share a word; integers of any kind."""
    return (row >> (ways // 2)) + BLOCK // ways * (row & (ways - 1))


def pairs(planes: list[Array], bits: int) -> Array:
    """Codes of tokens t and t + 64 in the halves of 32-bit words: planes uint32 [4p, W] -> uint32 [64, W]."""
    return _together(planes, bits, 2)


def quads(planes: list[Array], bits: int) -> Array:
    """Codes of tokens t, t + 32, t + 64 and t + 96 in the bytes of 32-bit words, less `quads_offset`:
    planes uint32 [4p, W] -> uint32 [32, W]."""
    codes = _together(planes, bits, 4)
    return codes ^ jnp.uint32(SIGN_BITS) if bits == 8 else codes


def quads_offset(bits: int) -> int:
    """What is taken from codes so that they fit int8."""
    return 128 if bits == 8 else 0


def _together(planes: list[Array], bits: int, ways: int) -> Array:
    """Codes of `ways` tokens in a word, each in the lowest bits of its share of it."""
    low, total = 0, None
    for p, words in zip(PLANES[bits], planes, strict=True):
        part = _fields(words, p, low, ways)
        total = part if total is None else total | part
        low += p
    assert total is not None
    return total


def _fields(words: Array, p: int, low: int, ways: int) -> Array:
    """One plane's fields, each shifted to the bits from `low` of its share of a word."""
    share = 32 // ways
    mask = jnp.uint32(sum((2**p - 1) << at + low for at in range(0, 32, share)))
    if p == 1:  # its rows are half a sublane tile: two fields at once, the upper four rows shifted by one more
        words = jnp.concatenate([words, words], axis=0)
        words = words >> (lax.broadcasted_iota(jnp.uint32, words.shape, 0) >> 2)
    step = max(p, 2)
    return jnp.concatenate([_shifted(words, field * step - low) & mask for field in range(share // step)], axis=0)


def _shifted(words: Array, by: int) -> Array:
    return words >> jnp.uint32(by) if by > 0 else words << jnp.uint32(-by) if by < 0 else words


def offset(bits: int) -> float:
    """What `numbers` adds to the codes."""
    return 128.0 if bits <= 4 else 0.0


def numbers(planes: list[Array], bits: int) -> Array:
    """Codes plus `offset` as bfloat16 [128, W], exactly; rows interleaved."""
    codes = pairs(planes, bits)
    if bits <= 4:
        return pltpu.bitcast(codes | jnp.uint32(ONE_HUNDRED_TWENTY_EIGHT), jnp.bfloat16)
    return _packed(*halves(codes, bits))


def halves(codes: Array, bits: int) -> tuple[Array, Array]:
    """Codes plus `offset` of tokens 0 to 63 and of tokens 64 to 127 as float32 [64, W], exactly."""
    if bits <= 4:
        both = codes | jnp.uint32(ONE_HUNDRED_TWENTY_EIGHT)
        return pltpu.bitcast(both << 16, jnp.float32), pltpu.bitcast(both & jnp.uint32(0xFFFF0000), jnp.float32)
    magic = jnp.uint32(0x4B000000)  # 2^23: the last bits of the mantissa count ones
    low, high = codes & jnp.uint32(0xFFFF), codes >> 16
    return pltpu.bitcast(low | magic, jnp.float32) - 2.0**23, pltpu.bitcast(high | magic, jnp.float32) - 2.0**23


def scaled_along_channels(planes: list[Array], bits: int, scale: Array, zero: Array, *, bf16_alu: bool) -> Array:
    """q scale + zero as bfloat16 [128, W], rows interleaved; scale and zero float32 [1, W], bfloat16 in value."""
    codes = pairs(planes, bits)
    if bf16_alu and bits <= 4:
        plus = pltpu.bitcast(codes | jnp.uint32(ONE_HUNDRED_TWENTY_EIGHT), jnp.bfloat16)
        rows = (8, scale.shape[1])
        scale, zero = (pltpu.bitcast(jnp.broadcast_to(_twice(x), rows), jnp.bfloat16) for x in (scale, zero))
        scale, zero = (jnp.concatenate([x] * (BLOCK // 16), axis=0) for x in (scale, zero))
        return (plus - jnp.bfloat16(128)) * scale + zero
    shift = zero - offset(bits) * scale
    return _packed(*(half * scale + shift for half in halves(codes, bits)))


def scaled_along_tokens(planes: list[Array], bits: int, scales: list[tuple[Array, Array]]) -> Array:
    """The same with the scale and zero of each group of channels, from `columns`."""
    codes = halves(pairs(planes, bits), bits)
    size = planes[0].shape[1] // len(scales)
    scaled = []
    for half, number in enumerate(codes):
        groups = []
        for g, of_group in enumerate(scales):
            s, z = (jnp.concatenate([x[half * PAIRS : (half + 1) * PAIRS]] * (size // LANES), axis=1) for x in of_group)
            groups.append((number[:, g * size : (g + 1) * size] - offset(bits)) * s + z)
        scaled.append(jnp.concatenate(groups, axis=1))
    return _packed(*scaled)


def columns(scale: Array, zero: Array) -> tuple[Array, Array]:
    """Rows of 128 tokens [1, 128], float32 that bfloat16 can hold, to columns [128, 128], the same in all lanes: turned
    around together, two in a word."""
    return apart(turned(together(scale, zero)))


def together(low: Array, high: Array) -> Array:
    """Two float32 arrays that bfloat16 can hold as the halves of 32-bit words."""
    return pltpu.bitcast(low, jnp.uint32) >> 16 | pltpu.bitcast(high, jnp.uint32)


def apart(words: Array) -> tuple[Array, Array]:
    """The two arrays of `together`."""
    return pltpu.bitcast(words << 16, jnp.float32), pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32)


def turned(row: Array) -> Array:
    """[1, 128] -> [128, 128], the same in all lanes."""
    return jnp.broadcast_to(row, (BLOCK, LANES)).T


def in_order(planes: list[Array], bits: int, scale: Array, zero: Array) -> Array:
    """q scale + zero as bfloat16 [128, W], tokens in their own order; scale and zero float32 [1, W] or [128, 1]."""
    scaled = []
    for half, number in enumerate(halves(pairs(planes, bits), bits)):
        s, z = (x[half * PAIRS : (half + 1) * PAIRS] if x.shape[0] == BLOCK else x for x in (scale, zero))
        scaled.append((number - offset(bits)) * s + z)
    return jnp.concatenate(scaled, axis=0).astype(jnp.bfloat16)


def _packed(low: Array, high: Array) -> Array:
    """Two float32 arrays as bfloat16 in alternating rows."""
    if target.current().interpret:  # which knows no pack_elementwise
        low, high = (pltpu.bitcast(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32) for x in (low, high))
        return pltpu.bitcast((low >> 16) | high, jnp.bfloat16)
    return pltpu.bitcast(pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16), jnp.bfloat16)


def _twice(x: Array) -> Array:
    """Float32 that bfloat16 can hold, as that number in both halves of 32-bit words."""
    bits = pltpu.bitcast(x, jnp.uint32)
    return bits | (bits >> 16)
