"""Bases in which vectors are stored: rotated, so that no channel stands out, and balanced between both of their sides.

What is stored as z = x A and rebuilt as z A^-1 W may be stored in any invertible basis A; keys too, as they are rebuilt
before RoPE. Rounding adds noise that is alike in all channels of a group and as large as their range. With C the
covariance of what is rounded and M = W W^T, the error at equal bits is tr(A^T C A) tr(A^-1 M A^-T), shared evenly among
the channels. For diagonal C = diag(c) and M = diag(m) it is least with A = diag((m / c)^(1/4)) Q, for any rotation Q
that spreads it: a Hadamard matrix (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, rotates the same way; the balance is
what storing before the projection adds).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

FAINTEST = 1e-3
"""Of the mean, what is added to variances and gains, so that directions without any do not blow up others' noise."""


@functools.cache
def hadamard(size: int) -> Float[np.ndarray, "{size} {size}"]:
    """An orthogonal matrix whose entries are alike in size: Sylvester's Hadamard matrix for a power of two, and for
    m times a power of two its Kronecker product with the discrete Hartley transform of m (Bracewell 1983)."""
    power = size & -size
    matrix = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    turns = 2 * np.pi * np.outer(np.arange(size // power), np.arange(size // power)) / (size // power)
    matrix = np.kron(np.cos(turns) + np.sin(turns), matrix) / np.sqrt(size)
    return matrix.astype(np.float32)


def rotate(x: Float[Array, "*rest C"], group: int) -> Float[Array, "*rest C"]:
    """Every `group` consecutive channels times a Hadamard matrix."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    turned = jnp.matmul(groups, jnp.asarray(hadamard(group), x.dtype), precision=lax.Precision.HIGHEST)
    return turned.reshape(x.shape)


def rotated_rows(matrix: Float[Array, "L C N"], group: int) -> Float[Array, "L C N"]:
    """The matrix that rotated vectors are multiplied with instead: its inverse rotation comes first."""
    turned = lax.map(lambda own: rotate(own.astype(jnp.float32).T, group).T, matrix)
    return turned.astype(matrix.dtype)


@jax.jit
def balanced(
    project: Float[Array, "D *heads C"], rebuild: Float[Array, "*heads C N"]
) -> tuple[Float[Array, "D *heads C"], Float[Array, "*heads C N"]]:
    """A pair of factors, x -> x `project` -> x `project` `rebuild`, in the balanced and rotated basis of its latents,
    for latents of equal variance: U S^(1/2) Q and Q^T S^(1/2) B^T instead of U and S B^T."""
    gain = jnp.square(rebuild.astype(jnp.float32)).sum(axis=-1)
    weight = balance(gain, jnp.ones_like(gain))
    return basis(project, weight), inverse(rebuild, weight)


def balance(gain: Float[Array, "*heads C"], variance: Float[Array, "*heads C"]) -> Float[Array, "*heads C"]:
    """(m / c)^(1/4) of every direction: gain m is the squared length of the row that it is rebuilt with."""
    gain, variance = (a + FAINTEST * a.mean(axis=-1, keepdims=True) for a in (gain, variance))
    ratio = jnp.where(gain > 0, gain, 1.0) / jnp.where(variance > 0, variance, 1.0)
    return jnp.sqrt(jnp.sqrt(ratio))


def basis(project: Float[Array, "D *heads C"], weight: Float[Array, "*heads C"]) -> Float[Array, "D *heads C"]:
    """The projection to a basis: columns times their weights, and then rotated."""
    return rotate(project.astype(jnp.float32) * weight[None], project.shape[-1])


def inverse(rebuild: Float[Array, "*heads C N"], weight: Float[Array, "*heads C"]) -> Float[Array, "*heads C N"]:
    """The way back from it: what undoes the rotation and the weights before `rebuild`."""
    rows = rebuild.astype(jnp.float32) / weight[..., None]
    return jnp.swapaxes(rotate(jnp.swapaxes(rows, -1, -2), rows.shape[-2]), -1, -2)
