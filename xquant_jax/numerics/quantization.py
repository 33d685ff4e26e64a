"""Quantization of blocks of 128 tokens - uniform, by a codebook, or to e4m3 - and what one stored stream looks like.

Uniform: for every group, in float32, zero = min rounded down to bfloat16, scale = (max - zero) / (2^b - 1) rounded up,
so that every value lies inside the grid and |x^ - x| <= scale / 2 (plus float32 rounding) for finite inputs below 1e38.

e4m3: scale = max |x| / 448 rounded up to bfloat16, and x / scale as 8-bit floating-point numbers (4 bits of exponent, 3
of mantissa, 448 the largest). |x^ - x| <= |x| / 16, or scale / 1024 where that is more.

Codebook: zero as above, scale = max - zero rounded up, and x^ = codebook[q] * scale + zero for the nearest of 2^b
levels between 0 and 1 (KVQuant, Hooper et al. 2024, arXiv 2401.18079, section 3.3).

Uniform and codebook: the `outliers` values of a group that are farthest from its median can be left out of min and max
and kept as bfloat16.

Uniform with `clip`: min and max are moved towards each other (`clipped`), and values beyond take the first or last
level; the bound holds for those between. Steps are smaller, and most values lie between: the mean squared error of 128
numbers of a normal distribution is 0.123 of their variance at 2 bits, not 0.252; 0.0349, not 0.0461, at 3; and 0.0092,
not 0.0100, at 4.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from xquant_jax.errors import ConfigError
from xquant_jax.numerics.packing import BLOCK, PLANES, pack, unpack

UNQUANTIZED = 16
"""`StreamSpec.bits` of a stream that is stored as it is."""

Leaf = Any
"""An array in a pytree; transformations put tracers, shapes and other things in its place, so it is not checked."""

E4M3 = jnp.float8_e4m3fn
E4M3_LARGEST = float(jnp.finfo(E4M3).max)

SMALLEST_NORMAL = float(jnp.finfo(jnp.bfloat16).smallest_normal)


def default_group(width: int) -> int:
    """The largest divisor of the width that is not above 128."""
    return max(g for g in range(1, BLOCK + 1) if width % g == 0)


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """How one stream is stored: its width, bits per value, and the axis along which a group runs.

    `axis="token"`: `group` consecutive channels of one token (0: `default_group`).
    `axis="channel"`: `group` consecutive tokens of one channel in a block (0: all 128).
    `format="e4m3"` stores 8-bit floating-point numbers with a scale per group and no zero.
    `format="codebook"` quantizes to levels that are given to `quantize` and `dequantize`, not stored with the blocks.
    `outliers`: values per group that are kept as they are, with their places.
    `clip` moves the ends of uniform codes' ranges inwards, for 2, 3 or 4 bits without outliers.
    `dtype` is the type of the window, and of the history where bits is `UNQUANTIZED`.
    """

    width: int
    bits: int
    axis: Literal["token", "channel"] = "token"
    group: int = 0
    dtype: str = "bfloat16"
    format: Literal["uniform", "e4m3", "codebook"] = "uniform"
    outliers: int = 0
    clip: bool = False

    def __post_init__(self) -> None:
        if self.bits != UNQUANTIZED:
            check_bits(self.bits)
        if self.format == "e4m3" and self.bits != 8:
            raise ConfigError(f"bits={self.bits} is not supported for e4m3, which has 8")
        along = self.width if self.axis == "token" else BLOCK
        if not self.group:
            object.__setattr__(self, "group", default_group(along))
        if self.group < 1 or along % self.group:
            what = "the stream's width" if self.axis == "token" else "the tokens of a block,"
            fitting = [g for g in range(1, along + 1) if along % g == 0]
            raise ConfigError(f"group={self.group} does not divide {what} {along}; these do: {fitting}")
        if not 0 <= self.outliers < self.group:
            raise ConfigError(f"outliers={self.outliers} of a group of {self.group}; choose 0 to {self.group - 1}")
        if self.outliers and (self.format == "e4m3" or self.bits == UNQUANTIZED):
            raise ConfigError(f"outliers are kept beside uniform levels or a codebook, not beside {self.format}")
        if self.clip and (self.format != "uniform" or self.bits not in (2, 3, 4) or self.outliers):
            raise ConfigError(
                f"clip=True with format={self.format}, bits={self.bits} and outliers={self.outliers} is not supported; "
                "clip uniform codes of 2, 3 or 4 bits without outliers, or choose clip=False"
            )


def check_bits(bits: int) -> None:
    """Raises `ConfigError` for a number of bits that codes are not packed with."""
    if bits not in PLANES:
        raise ConfigError(f"bits={bits} is not supported; choose 2, 3, 4 or 8")


@struct.dataclass
class Blocks:
    """Whole blocks of a stream, packed.

    planes: one uint32 array [*rest, 4p, C] per plane; the values themselves [*rest, 128, C] if unquantized; their
        bits as uint8 [*rest, 128, C] if e4m3 (where a device has no such type, XLA would convert whole caches)
    scale, zero: bfloat16 [*rest, 128/G, C] along a channel, [*rest, 128, C/G] along a token; None if unquantized,
        and e4m3 has no zero
    places, outliers: of the n values of each group that are kept, where in the group (uint8 or uint16) and what
        (bfloat16): [*rest, n 128/G, C] along a channel, [*rest, 128, n C/G] along a token; None if there are none
    """

    planes: tuple[Leaf, ...]
    scale: Leaf
    zero: Leaf
    spec: StreamSpec = struct.field(pytree_node=False)
    places: Leaf = None
    outliers: Leaf = None


class Normalized(NamedTuple):
    """Values in groups [*rest, 128/G, G, C] or [*rest, 128, C/G, G] between 0 and 1, but for outliers, which have their
    place in a group and value; scale and zero have 1 instead of G."""

    unit: Float32[Array, "..."]
    scale: BFloat16[Array, "..."]
    zero: BFloat16[Array, "..."]
    places: Int32[Array, "..."] | None
    outliers: Float32[Array, "..."] | None


def quantize(
    x: Float[Array, "*rest 128 C"], spec: StreamSpec, codebook: Float[Array, " levels"] | None = None
) -> Blocks:
    """Quantizes and packs; every leading axis is kept. `codebook`: 2^b levels, rising, for that format."""
    if spec.bits == UNQUANTIZED:
        return Blocks((x.astype(spec.dtype),), None, None, spec)
    axis = _group_axis(spec)
    if spec.format == "e4m3":
        grouped = _group(x.astype(jnp.float32), spec)
        largest = jnp.abs(grouped).max(axis=axis, keepdims=True)
        scale = _round_up(_divide(largest, E4M3_LARGEST))
        scale = jnp.maximum(scale, jnp.bfloat16(SMALLEST_NORMAL))
        values = jnp.clip(grouped / scale.astype(jnp.float32), -E4M3_LARGEST, E4M3_LARGEST).astype(E4M3)
        stored = lax.bitcast_convert_type(values.reshape(x.shape), jnp.uint8)
        return Blocks((stored,), scale.squeeze(axis), None, spec)
    unit, scale, zero, places, outliers = normalize(x, spec)
    if spec.format == "codebook":
        assert codebook is not None
        between = (codebook[1:] + codebook[:-1]) / 2
        codes = jnp.searchsorted(between.astype(jnp.float32), unit, method="compare_all")
    else:
        codes = jnp.clip(jnp.round(unit), 0, 2**spec.bits - 1)
    if outliers is not None and places is not None:
        places = _flat(places.astype(jnp.uint8 if spec.group <= 256 else jnp.uint16), spec)
        outliers = _flat(outliers.astype(jnp.bfloat16), spec)
    words = pack(codes.astype(jnp.uint32).reshape(x.shape), spec.bits)
    return Blocks(words, scale.squeeze(axis), zero.squeeze(axis), spec, places, outliers)


def normalize(x: Float[Array, "*rest 128 C"], spec: StreamSpec) -> Normalized:
    """Values in units of their group's scale: what is rounded to codes (uniform), or to a codebook's levels."""
    grouped = _group(x.astype(jnp.float32), spec)
    axis = _group_axis(spec)
    low = high = grouped
    places = outliers = None
    if spec.outliers:
        values = jnp.moveaxis(grouped, axis, -1)
        distance = jnp.abs(values - jnp.median(values, axis=-1, keepdims=True))
        places = jnp.moveaxis(lax.top_k(distance, spec.outliers)[1], -1, axis)
        outliers = jnp.take_along_axis(grouped, places, axis=axis)
        low = jnp.put_along_axis(grouped, places, jnp.inf, axis=axis, inplace=False)
        high = jnp.put_along_axis(grouped, places, -jnp.inf, axis=axis, inplace=False)
    low, high = low.min(axis=axis, keepdims=True), high.max(axis=axis, keepdims=True)
    if spec.clip:
        low, high = clipped(low, high, spec.bits)
    zero = _round_down(low)
    span = high - zero.astype(jnp.float32)
    steps = 1 if spec.format == "codebook" else 2**spec.bits - 1
    scale = jnp.maximum(_round_up(_divide(span, steps)), jnp.bfloat16(SMALLEST_NORMAL))
    unit = (grouped - zero.astype(jnp.float32)) / scale.astype(jnp.float32)
    return Normalized(unit, scale, zero, places, outliers)


def clipped(
    low: Float32[Array, "*groups"], high: Float32[Array, "*groups"], bits: int
) -> tuple[Float32[Array, "*groups"], Float32[Array, "*groups"]]:
    """Both ends of a range moved inwards, by 3 / 4^b of the distance between them.

    At 2 bits that is close to the best for groups of 128 numbers of a normal distribution. The finer the codes, the
    more a value beyond the ends costs against what smaller steps win; at 8 bits next to nothing would move. Products
    with powers of two are exact: the result has the same bits in all kernels, whether or not their compilers fuse
    products and sums.
    """
    span = high - low
    most, rest = span * 2.0 ** (1 - 2 * bits), span * 2.0 ** (-2 * bits)
    return low + most + rest, high - most - rest


def dequantize(blocks: Blocks, codebook: Float[Array, " levels"] | None = None) -> Float[Array, "*rest 128 C"]:
    """The stored values: float32, or as stored if unquantized. `codebook`: the one they were quantized with."""
    spec = blocks.spec
    if spec.bits == UNQUANTIZED:
        return blocks.planes[0]
    if spec.format == "e4m3":
        values = lax.bitcast_convert_type(blocks.planes[0], E4M3).astype(jnp.float32)
        return _scaled(values, blocks.scale, None, spec)
    codes = unpack(blocks.planes, spec.bits)
    levels = codes.astype(jnp.float32) if codebook is None else codebook.astype(jnp.float32)[codes]
    values = _scaled(levels, blocks.scale, blocks.zero, spec)
    if spec.outliers:
        places = _in_groups(blocks.places, spec).astype(jnp.int32)
        exact = _in_groups(blocks.outliers, spec).astype(jnp.float32)
        grouped = _group(values, spec)
        values = jnp.put_along_axis(grouped, places, exact, axis=_group_axis(spec), inplace=False).reshape(codes.shape)
    return values


def _scaled(
    levels: Float32[Array, "*rest 128 C"], scale: Array, zero: Array | None, spec: StreamSpec
) -> Float32[Array, "*rest 128 C"]:
    """levels * scale + zero of each value's group.

    Where a group is no power of two (96 of 192 channels), scales are repeated first so that each stands for one: a loop
    over channels that divides by 96 is not vectorized, and takes six times as long on a CPU.
    """
    axis = _group_axis(spec)
    unit = spec.group & -spec.group
    kept = [a.astype(jnp.float32) for a in (scale, zero) if a is not None]
    if unit != spec.group:
        kept = lax.optimization_barrier([jnp.repeat(a, spec.group // unit, axis=axis) for a in kept])
    values = _group(levels, dataclasses.replace(spec, group=unit, outliers=0)) * jnp.expand_dims(kept[0], axis)
    if zero is not None:
        values = values + jnp.expand_dims(kept[1], axis)
    return values.reshape(levels.shape)


def allocate_blocks(spec: StreamSpec, leading: tuple[int, ...]) -> Blocks:
    """Zeros for `leading` blocks."""
    levels = jnp.arange(2.0**spec.bits) if spec.format == "codebook" else None
    abstract = jax.eval_shape(lambda: quantize(jnp.zeros((*leading, BLOCK, spec.width)), spec, levels))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)


def as_blocks(x: Float[Array, "B S C"]) -> Float[Array, "B n 128 C"]:
    """Cuts a row of tokens, whole blocks only."""
    return x.reshape(x.shape[0], -1, BLOCK, x.shape[-1])


def as_tokens(x: Float[Array, "B n 128 C"]) -> Float[Array, "B S C"]:
    """Joins blocks to a row of tokens."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _group(x: Float32[Array, "*rest 128 C"], spec: StreamSpec) -> Float32[Array, "..."]:
    """Token: [*rest, 128, C/G, G]. Channel: [*rest, 128/G, G, C]."""
    if spec.axis == "channel":
        return x.reshape(*x.shape[:-2], BLOCK // spec.group, spec.group, spec.width)
    return x.reshape(*x.shape[:-1], spec.width // spec.group, spec.group)


def _flat(kept: Array, spec: StreamSpec) -> Array:
    """Outliers in groups to how they are stored, [*rest, n 128/G, C] or [*rest, 128, n C/G]."""
    *rest, one, two, three = kept.shape
    return kept.reshape((*rest, one * two, three) if spec.axis == "channel" else (*rest, one, two * three))


def _in_groups(kept: Array, spec: StreamSpec) -> Array:
    """The inverse of `_flat`."""
    *rest, one, two = kept.shape
    split = (-1, spec.outliers)
    return kept.reshape((*rest, *split, two) if spec.axis == "channel" else (*rest, one, *split))


def _group_axis(spec: StreamSpec) -> int:
    """The axis of `_group` that runs along a group."""
    return -1 if spec.axis == "token" else -2


def _divide(x: Float32[Array, "..."], divisor: float | int) -> Float32[Array, "..."]:
    """x / divisor for x >= 0. XLA turns a divisor that it sees is constant into a product with its rounded
    reciprocal; this one it cannot see."""
    return x / jnp.where(x >= 0, jnp.float32(divisor), 1.0)


def _round_down(x: Float32[Array, "..."]) -> BFloat16[Array, "..."]:
    return _round_away(x, x < 0)


def _round_up(x: Float32[Array, "..."]) -> BFloat16[Array, "..."]:
    return _round_away(x, x > 0)


def _round_away(x: Float32[Array, "..."], away: Array) -> BFloat16[Array, "..."]:
    """Truncates float32 to bfloat16 by its bits; where `away`, an inexact value moves one step from zero."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    inexact = (bits & 0xFFFF) != 0
    high = (bits >> 16) + (inexact & away).astype(np.uint32)
    return lax.bitcast_convert_type(high.astype(np.uint16), jnp.bfloat16)
