"""The kernel of `quantize` for TPU, and the rounding and packing in registers that `accumulate` shares with it."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.pallas_tpu import unpack
from pallas_kernels.pallas_tpu.streams import LANES, SUBLANES
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import SMALLEST_NORMAL, StreamSpec, clipped

UNROLL = {"channel": 2, "token": 4}
"""Groups at once: transposes take long to begin."""

MAGIC = 2.0**23
"""Added to a number below it, rounds it to the nearest integer, which the last bits of the mantissa then are."""


def kernel(spec: StreamSpec, tile: int, x: Any, *refs: Any) -> None:
    *words, scale_out, zero_out, scales, zeros = refs
    along_tokens = spec.axis == "token"
    strips = spec.group // LANES if along_tokens else 1  # of a group
    groups = x.shape[-1] // LANES // strips

    def group(number: Array, _: None) -> None:
        block, g = lax.div(number, jnp.int32(groups)), lax.rem(number, jnp.int32(groups))

        def strip(s: Array | int) -> tuple[Array, Any]:
            lanes = pl.ds(pl.multiple_of((g * strips + s) * LANES, LANES), LANES)
            return x[block, :, lanes].astype(jnp.float32), lanes

        def widen(s: Array | int, extremes: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = lowest_highest(strip(s)[0], along_tokens=along_tokens)
            return jnp.minimum(extremes[0], low), jnp.maximum(extremes[1], high)

        extremes = lowest_highest(strip(0)[0], along_tokens=along_tokens)
        low, high = lax.fori_loop(1, strips, widen, extremes)
        if spec.clip:
            low, high = clipped(low, high, spec.bits)
        scale, zero = grid_of(low, high, spec.bits)
        at = (block, pl.ds(g, 1)) if along_tokens else (g, pl.ds(block, 1))
        scales[at], zeros[at] = scale, zero
        to_units = by_token(scale, zero) if along_tokens else (1 / scale, zero)

        def pack(s: Array | int, _: None) -> None:
            values, lanes = strip(s)
            for ref, plane in zip(words, packed(values, *to_units, spec.bits, beyond=spec.clip), strict=True):
                ref[block, :, lanes] = plane

        lax.fori_loop(0, strips, pack, None)

    lax.fori_loop(0, tile * groups, group, None, unroll=math.gcd(UNROLL[spec.axis], tile * groups))
    for out, kept in ((scale_out, scales), (zero_out, zeros)):
        if along_tokens:
            out[...] = kept[...].astype(jnp.bfloat16)
        else:
            for g in range(groups):
                out[:, g * LANES : (g + 1) * LANES] = kept[g].astype(jnp.bfloat16)


def lowest_highest(x: Array, *, along_tokens: bool) -> tuple[Array, Array]:
    """Of 128 channels of a block [128, 128]: rows [1, 128], along the tokens with a token in each lane."""
    by_lane = x.T if along_tokens else x
    return by_lane.min(axis=0, keepdims=True), by_lane.max(axis=0, keepdims=True)


def grid_of(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """Scale and zero as `xquant_jax.numerics.quantization.quantize` chooses them: float32 that bfloat16 can hold."""
    zero = _round_down(low)
    shy = (1 - 2.0**-22) / (2**bits - 1)  # the product shall not exceed the quotient, or a scale on the grid moves up
    scale = _round_up((high - zero) * shy)
    return jnp.maximum(scale, SMALLEST_NORMAL), zero


def packed(x: Array, inverse: Array, zero: Array, bits: int, *, beyond: bool = False) -> list[Array]:
    """Planes of codes uint32 [4p, 128] of float32 [128, 128], tokens in their own order.

    beyond: whether values may lie beyond the first and the last level, which they then take
    """
    units = (x - zero) * inverse
    if beyond:
        units = jnp.clip(units, 0, 2**bits - 1)
    codes = pltpu.bitcast(units + MAGIC, jnp.uint32)
    planes, low = [], 0
    for p in PLANES[bits]:
        planes.append(_plane(codes >> low if low else codes, p))
        low += p
    return planes


def _plane(codes: Array, p: int) -> Array:
    """The last p bits of every code: uint32 [128, W] -> [4p, W]. Half a sublane tile of words for p = 1: two fields at
    once, the upper rows moved by one more at the end."""
    rows = max(4 * p, SUBLANES)
    fields = [codes[row : row + rows] & jnp.uint32(2**p - 1) for row in range(0, BLOCK, rows)]
    words = fields[0]
    for field, more in enumerate(fields[1:], start=1):
        words = words | more << (field * rows // 4)
    return words if p > 1 else words[:4] | words[4:] << 1


def by_token(scale: Array, zero: Array) -> tuple[Array, Array]:
    """1 / scale and zero, of rows with a token in each lane, as `packed` takes them."""
    zero = unpack.turned(zero)  # which is known first
    return unpack.turned(1 / scale), zero


def _round_up(x: Array) -> Array:
    """Float32 away from zero to the next number that bfloat16 can hold."""
    return pltpu.bitcast(pltpu.bitcast(x, jnp.uint32) + jnp.uint32(0xFFFF) & jnp.uint32(0xFFFF0000), jnp.float32)


def _round_down(x: Array) -> Array:
    """Downwards: towards zero if that is below."""
    towards_zero = pltpu.bitcast(pltpu.bitcast(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(x < 0, _round_up(x), towards_zero)
