"""The registers that streams are read into, and the shape in which their scales are handed over."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

LANES, SUBLANES = 128, 8
"""A vector register holds 8 rows of 128 lanes, of 32 bits each."""


def by_block(scale: Array, axis: Literal["token", "channel"], *, leading: int) -> Array:
    """Scale or zero as XLA lays it out on a TPU, so that nothing is moved: along the channel [leading, N, C], along the
    token [leading, N, C/G, 128]. `leading` axes come before the blocks."""
    if axis == "channel":
        return scale.reshape(*scale.shape[: leading + 1], scale.shape[-1])
    return jnp.swapaxes(scale, -1, -2)
