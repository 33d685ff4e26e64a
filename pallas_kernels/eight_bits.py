"""Key rebuild matrices in 8 bits: symmetric, with one scale for each output channel.

Codes of a stream that is quantized along the token are integers, with a scale s and a zero z for every token and group
g of channels. So K = x^ W = sum over g of s_g (q_g W_g) + z_g (1 W_g), where a matrix unit for 8 bits takes q_g W_g
exactly, in int8 or, for codes of up to 4 bits, in e4m3. Only W is rounded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from xquant_jax.numerics.quantization import E4M3, E4M3_LARGEST, SMALLEST_NORMAL

TYPES: dict[str, tuple[Any, float]] = {"int8": (jnp.int8, 127.0), "fp8": (E4M3, E4M3_LARGEST)}
"""By the name that users type: the type, and the largest number of it that is used."""


def name_of(dtype: Any) -> str | None:
    """The name of a type; None if it is none of these."""
    return next((name for name, (known, _) in TYPES.items() if dtype == known), None)


@functools.partial(jax.jit, static_argnames=("name", "group"))
def quantize_matrix(matrix: Float[Array, "L C R"], name: str, group: int) -> dict[str, Array]:
    """Dense matrices of `L` layers as the fields of `KeyRebuild`: matrix [L, C, R], scale [L, R], sums [L, C/G, R].

    |W - matrix * scale| is at most scale / 2 (int8), or |W| / 16 or scale / 1024, whichever is more (fp8).
    """
    dtype, largest = TYPES[name]

    def layer(w: Float[Array, "C R"]) -> dict[str, Array]:
        wide = w.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(wide).max(axis=0) / largest, SMALLEST_NORMAL)
        unit = jnp.clip(wide / scale, -largest, largest)
        small = (jnp.round(unit) if name == "int8" else unit).astype(dtype)
        sums = small.astype(jnp.float32).reshape(-1, group, w.shape[1]).sum(axis=1)
        return {"matrix": small, "scale": scale, "sums": sums}

    return lax.map(layer, matrix)  # layer by layer: float32 of one at a time
