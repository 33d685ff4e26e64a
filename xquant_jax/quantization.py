"""Asymmetric uniform quantization of blocks of 128 tokens, and what one stored stream looks like.

For every group, in float32: zero = min rounded down to bfloat16, scale = (max - zero) / (2^b - 1) rounded up, so that
every value lies inside the grid and |x^ - x| <= scale / 2 (plus float32 rounding) for finite inputs below 1e38.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32

from xquant_jax.errors import ConfigError
from xquant_jax.packing import BLOCK, PLANES, pack, unpack

UNQUANTIZED = 16
"""`StreamSpec.bits` of a stream that is stored as it is."""

Leaf = Any
"""An array in a pytree; transformations put tracers, shapes and other things in its place, so it is not checked."""

SMALLEST_NORMAL = float(jnp.finfo(jnp.bfloat16).smallest_normal)


def default_group(width: int) -> int:
    """The largest divisor of the width that is not above 128."""
    return max(g for g in range(1, BLOCK + 1) if width % g == 0)


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """How one stream is stored: its width, bits per value, and the axis along which a group runs.

    `axis="token"`: `group` consecutive channels of one token (0: `default_group`).
    `axis="channel"`: the 128 tokens of a block.
    `dtype` is the type of the window, and of the history where bits is `UNQUANTIZED`.
    """

    width: int
    bits: int
    axis: Literal["token", "channel"] = "token"
    group: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.bits != UNQUANTIZED and self.bits not in PLANES:
            raise ConfigError(f"bits={self.bits} is not supported; choose 2, 3, 4 or 8")
        if not self.group:
            object.__setattr__(self, "group", default_group(self.width))
        if self.group < 1 or self.width % self.group:
            fitting = [g for g in range(1, self.width + 1) if self.width % g == 0]
            raise ConfigError(
                f"group={self.group} does not divide the stream's width {self.width}; these do: {fitting}"
            )


@struct.dataclass
class Blocks:
    """Whole blocks of a stream, packed.

    words: one uint32 array [*rest, 4p, C] per plane; the values themselves [*rest, 128, C] if unquantized
    scale, zero: bfloat16 [*rest, 1, C] along a channel, [*rest, 128, C/G] along a token; None if unquantized
    """

    words: tuple[Leaf, ...]
    scale: Leaf
    zero: Leaf
    spec: StreamSpec = struct.field(pytree_node=False)


def quantize(x: Float[Array, "*rest 128 C"], spec: StreamSpec) -> Blocks:
    """Quantizes and packs; every leading axis is kept."""
    if spec.bits == UNQUANTIZED:
        return Blocks((x.astype(spec.dtype),), None, None, spec)
    grouped = _group(x.astype(jnp.float32), spec)
    axis = -1 if spec.axis == "token" else -2
    zero = _round_down(grouped.min(axis=axis, keepdims=True))
    span = grouped.max(axis=axis, keepdims=True) - zero.astype(jnp.float32)
    # a divisor that XLA can see is constant becomes a product with its rounded reciprocal; this one it cannot see
    levels = jnp.where(span >= 0, jnp.float32(2**spec.bits - 1), 1.0)
    scale = jnp.maximum(_round_up(span / levels), jnp.bfloat16(SMALLEST_NORMAL))
    codes = jnp.round((grouped - zero.astype(jnp.float32)) / scale.astype(jnp.float32))
    codes = jnp.clip(codes, 0, 2**spec.bits - 1).astype(jnp.uint32).reshape(x.shape)
    if spec.axis == "token":
        scale, zero = scale[..., 0], zero[..., 0]
    return Blocks(pack(codes, spec.bits), scale, zero, spec)


def dequantize(blocks: Blocks) -> Float[Array, "*rest 128 C"]:
    """The stored values: float32, or as stored if unquantized."""
    spec = blocks.spec
    if spec.bits == UNQUANTIZED:
        return blocks.words[0]
    codes = unpack(blocks.words, spec.bits).astype(jnp.float32)
    scale, zero = blocks.scale.astype(jnp.float32), blocks.zero.astype(jnp.float32)
    if spec.axis == "token":
        scale, zero = scale[..., None], zero[..., None]
    return (_group(codes, spec) * scale + zero).reshape(codes.shape)


def allocate_blocks(spec: StreamSpec, leading: tuple[int, ...]) -> Blocks:
    """Zeros for `leading` blocks."""
    abstract = jax.eval_shape(lambda: quantize(jnp.zeros((*leading, BLOCK, spec.width)), spec))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)


def _group(x: Float32[Array, "*rest 128 C"], spec: StreamSpec) -> Float32[Array, "..."]:
    """Token: [*rest, 128, C/G, G]. Channel: unchanged, the group is the token axis."""
    if spec.axis == "channel":
        return x
    return x.reshape(*x.shape[:-1], spec.width // spec.group, spec.group)


def _round_down(x: Float32[Array, "..."]) -> BFloat16[Array, "..."]:
    return _round_away(x, x < 0)


def _round_up(x: Float32[Array, "..."]) -> BFloat16[Array, "..."]:
    return _round_away(x, x > 0)


def _round_away(x: Float32[Array, "..."], away: Array) -> BFloat16[Array, "..."]:
    """Truncates float32 to bfloat16 by its bits; where `away`, an inexact value moves one step from zero."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    inexact = (bits & 0xFFFF) != 0
    high = (bits >> 16) + (inexact & away)
    return lax.bitcast_convert_type(high.astype(np.uint16), jnp.bfloat16)
