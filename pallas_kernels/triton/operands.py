"""What every launch hands to a kernel, and what no kernel takes."""

import math
from typing import Any

import jax.numpy as jnp
import triton.language as tl
from jaxtyping import Array

from pallas_kernels import gpus, target
from xquant_jax.numerics.quantization import Blocks, StreamSpec

LEAST_CHANNELS = 16
"""That are read at once: what one matrix instruction takes."""


def arrays(stream: Blocks) -> tuple[Array, ...]:
    """Words of the lower and the upper plane (or the lower one again), scales and zeros."""
    return stream.planes[0], stream.planes[-1], stream.scale, stream.zero


def stream_constants(spec: StreamSpec, prefix: str = "") -> dict[str, Any]:
    """What a kernel is compiled for; a group of 0 stands for groups along the channel."""
    group = 0 if spec.axis == "channel" else spec.group
    return {f"{prefix}WIDTH": spec.width, f"{prefix}BITS": spec.bits, f"{prefix}GROUP": group}


def channels(spec: StreamSpec, most: int) -> int:
    """Channels that are read at once: a part of `most` that has one scale and zero for each token.

    `refuse_stream` with `LEAST_CHANNELS` sees to it that there are as many at least.
    """
    return math.gcd(most, spec.width, spec.group if spec.axis == "token" else 0)


def types() -> dict[str, Any]:
    """Types to multiply and to unpack in, and whether NVIDIA's assembly may be written. The interpreter knows neither
    that nor bfloat16 arithmetic."""
    if target.current().interpret:
        return {"DTYPE": tl.float32, "ARITHMETIC": tl.float32, "PRECISION": "ieee", "ASSEMBLY": False}
    return {"DTYPE": tl.bfloat16, "ARITHMETIC": tl.bfloat16, "PRECISION": "tf32", "ASSEMBLY": not gpus.current().amd}


def operand_type() -> Any:
    """Of what the matrix unit multiplies."""
    return jnp.float32 if target.current().interpret else jnp.bfloat16


def operand(a: Array) -> Array:
    """As the matrix unit takes it."""
    return a.astype(operand_type())


def refuse_type(a: Array) -> str | None:
    if a.dtype in (jnp.bfloat16, jnp.float16) or target.current().interpret:
        return None
    return f"{a.dtype} is not taken; bfloat16 and float16 are"


def refuse_device() -> str | None:
    capability = gpus.current().capability
    if capability < 8:
        return f"a GPU of compute capability {capability} is not taken; 8.0 (Ampere) and newer are"
    return None
