"""The latents that xquant-cl sums up: their basis, how they are predicted from the layer below, and the way back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64
from threadpoolctl import threadpool_limits

from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.config import ModelConfig
from xquant_jax.numerics import bases

WEAKEST = 0.1
"""Singular values of per-head bases, relative to the largest, below which their pseudoinverse leaves them out: they
would amplify what quantization added (measured: docs/accuracy.md)."""


def stored_width(config: ModelConfig, basis: str | None) -> int:
    """Of X where K = H, or of the latents: at most as many as X has channels."""
    if config.is_multi_head:
        return config.width
    if basis == "per_head":
        return 2 * config.num_kv_heads * min(config.width, config.head_dim)
    return min(config.width, 2 * config.kv_width)


def latent_basis(source: FactorSource, basis: str, *, folded: bool, number: int | None = None) -> Float[Array, "L D C"]:
    """A of the first `number` layers: U_kv (`joint`), or the key heads' and then the value heads' own directions
    (`per_head`)."""
    if basis == "joint":
        found = source.svd("kv", folded=folded, number=number)["basis"]
        return found if number in (None, len(found)) else found[:number]
    method_params = source.svd("per_head", folded=folded, number=number)
    sides = [method_params[side]["project"][:number] for side in ("key", "value")]  # [L, D, K, e]
    return jnp.concatenate([side.reshape(*side.shape[:2], -1) for side in sides], axis=-1)


@jax.jit
def latents(
    basis: Float[Array, "L D C"],
    predict: tuple[Float[Array, "L _n _m"], ...],
    weights: dict[str, Float[Array, "L D R"]],
    variance: Float[Array, "L C"] | None,
) -> tuple[Float[Array, "L D C"], tuple[Float[Array, "L _n _m"], ...], dict[str, Float[Array, "L C R"]]]:
    """Basis, prediction and rebuild matrices of the latents that are stored, float32.

    basis: U_kv, orthonormal; predict: matrices in it, multiplied one after the other
    variance: of what is stored, in every direction of U_kv; with it basis and all are balanced and rotated
    """
    times = partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def rebuild(own: tuple[Array, dict[str, Array]]) -> dict[str, Array]:
        up, by_side = own
        return {side: times(up.astype(jnp.float32).T, w.astype(jnp.float32)) for side, w in by_side.items()}

    back = lax.map(rebuild, (basis, weights))
    predict = tuple(part.astype(jnp.float32) for part in predict)
    if variance is None:
        return basis.astype(jnp.float32), predict, back
    gain = jnp.stack([jnp.square(matrix).sum(axis=-1) for matrix in back.values()]).sum(axis=0)
    weight = bases.balance(gain, variance)
    below = jnp.concatenate([weight[:1], weight[:-1]])
    first = lax.map(lambda own: bases.inverse(*own), (predict[0], below))
    *middle, last = (first, *predict[1:])
    return (
        lax.map(lambda own: bases.basis(*own), (basis, weight)),
        (*middle, lax.map(lambda own: bases.basis(*own), (last, weight))),
        {side: lax.map(lambda own: bases.inverse(*own), (matrix, weight)) for side, matrix in back.items()},
    )


def prediction(basis: Float[Array, "L D C"], orthonormal: bool) -> Float64[np.ndarray, "L C C"]:
    """M = A_below^+ A of every layer; of layer 0, which nothing is below, with itself."""
    wide = np.asarray(basis, np.float64)
    below = np.concatenate([wide[:1], wide[:-1]])
    if orthonormal:
        return np.swapaxes(below, 1, 2) @ wide
    with threadpool_limits(1, user_api="blas"):  # BLAS threads spin while they wait
        return np.stack([np.linalg.lstsq(b, a, WEAKEST)[0] for b, a in zip(below, wide, strict=True)])
