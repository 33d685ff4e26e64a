"""Codes of 2, 3, 4 or 8 bits as bit planes in 32-bit words (the byte layout other programs may read).

A code of b bits is split into planes of 1, 2 or 4 bits, low bits first. In a plane of p bits, a block's 128 tokens
of one channel fill 4p words: token f*4p + r sits in word r, bits [f*p, (f+1)*p). One shift and one mask of all words
therefore yield 4p whole token rows, in order.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt, UInt32

BLOCK = 128
"""Tokens in a block."""

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (4, 4)}
"""Widths in bits of the planes of a code, low bits first."""


def pack(codes: UInt[Array, "*rest 128 C"], bits: int) -> tuple[UInt32[Array, "..."], ...]:
    """One array [*rest, 4p, C] per plane of p bits. `codes` must be below 2**bits."""
    planes, low = [], 0
    for p in PLANES[bits]:
        plane = (codes.astype(jnp.uint32) >> low) & (2**p - 1)
        fields = plane.reshape(*codes.shape[:-2], 32 // p, 4 * p, codes.shape[-1])
        fields = fields << _shifts(p, fields.ndim)
        planes.append(jnp.sum(fields, axis=-3, dtype=jnp.uint32))  # they do not overlap: sum is or
        low += p
    return tuple(planes)


def unpack(planes: tuple[UInt32[Array, "..."], ...], bits: int) -> UInt32[Array, "*rest 128 C"]:
    """The codes that `pack` was given."""
    codes, low = jnp.uint32(0), 0
    for p, words in zip(PLANES[bits], planes, strict=True):
        fields = (words[..., None, :, :] >> _shifts(p, words.ndim + 1)) & (2**p - 1)
        codes = codes | (fields.reshape(*words.shape[:-2], BLOCK, words.shape[-1]) << low)
        low += p
    return codes


def _shifts(p: int, ndim: int) -> UInt32[Array, "*ones f 1 1"]:
    """How far up in a word each of its fields of p bits lies."""
    return p * lax.broadcasted_iota(jnp.uint32, (1,) * (ndim - 3) + (32 // p, 1, 1), ndim - 3)
