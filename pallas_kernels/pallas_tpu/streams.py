"""Streams as the kernels take them: which ones, and in which shape their scales are handed over."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import UNQUANTIZED, StreamSpec

LANES, SUBLANES = 128, 8
"""A vector register holds 8 rows of 128 lanes, of 32 bits each."""


def refuse_stream(spec: StreamSpec) -> str | None:
    """Why a stream cannot be unpacked by the kernels; None if it can."""
    if spec.bits == UNQUANTIZED or spec.format != "uniform":
        return "is not quantized uniformly"
    if spec.width % LANES:
        return f"is {spec.width} wide, which is no multiple of 128"
    if spec.axis == "channel" and spec.group != BLOCK:
        return f"has groups of {spec.group} tokens; it takes whole blocks of 128"
    if spec.axis == "token" and spec.group % LANES:
        return f"has groups of {spec.group} channels; it takes multiples of 128"
    return None


def by_block(scale: Array, axis: Literal["token", "channel"], *, leading: int) -> Array:
    """Scale or zero as XLA lays it out on a TPU, so that nothing is moved: along the channel [leading, N, C], along the
    token [leading, N, C/G, 128]. `leading` axes come before the blocks."""
    if axis == "channel":
        return scale.reshape(*scale.shape[: leading + 1], scale.shape[-1])
    return jnp.swapaxes(scale, -1, -2)
