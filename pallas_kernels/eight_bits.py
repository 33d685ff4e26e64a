"""Key rebuild matrices in 8 bits: symmetric, with one scale for each output channel.

Codes of a stream that is quantized along the token are integers, with a scale s and a zero z for every token and group
g of channels. So K = x^ W = sum over g of s_g (q_g W_g) + z_g (1 W_g), where a matrix unit for 8 bits takes q_g W_g
exactly, in int8 or, for codes of up to 4 bits, in e4m3. Only W is rounded.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from xquant_jax.numerics.quantization import E4M3, E4M3_LARGEST, SMALLEST_NORMAL, StreamSpec


class MatrixType(NamedTuple):
    """A type of 8 bits, the largest number of it that is used, and bits of the codes that it holds exactly."""

    dtype: Any
    largest: float
    code_bits: int


TYPES = {"int8": MatrixType(jnp.int8, 127.0, 8), "fp8": MatrixType(E4M3, E4M3_LARGEST, 4)}
"""By the name that users type."""


def name_of(dtype: Any) -> str | None:
    """The name of a type; None if it is none of these."""
    return next((name for name, known in TYPES.items() if dtype == known.dtype), None)


def refuse_keys(name: str, spec: StreamSpec) -> str | None:
    """Why codes of this stream cannot be multiplied with a matrix of that type; None if they can."""
    if spec.axis == "channel":
        return f"keys quantized along the channel are not rebuilt in {name}; those along the token are"
    if spec.bits > TYPES[name].code_bits:
        return f"keys of {spec.bits} bits are not rebuilt in {name}, which holds codes of up to {TYPES[name].code_bits}"
    return None


@functools.partial(jax.jit, static_argnames=("name", "group"))
def quantize_matrix(matrix: Float[Array, "L C R"], name: str, group: int) -> dict[str, Array]:
    """Dense matrices of `L` layers as the fields of `KeyRebuild`: matrix [L, C, R], scale [L, R], sums [L, C/G, R].

    |W - matrix * scale| is at most scale / 2 (int8), or |W| / 16 or scale / 1024, whichever is more (fp8).
    """
    dtype, largest, _ = TYPES[name]

    def layer(w: Float[Array, "C R"]) -> dict[str, Array]:
        wide = w.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(wide).max(axis=0) / largest, SMALLEST_NORMAL)
        unit = jnp.clip(wide / scale[None], -largest, largest)
        small = (jnp.round(unit) if name == "int8" else unit).astype(dtype)
        sums = small.astype(jnp.float32).reshape(-1, group, w.shape[1]).sum(axis=1)
        return {"matrix": small, "scale": scale, "sums": sums}

    return lax.map(layer, matrix)  # layer by layer: float32 of one at a time
