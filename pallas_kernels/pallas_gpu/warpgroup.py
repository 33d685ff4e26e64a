"""`fragments` as operations of Pallas kernels, each beside the definition that the interpreter runs."""

# Pallas annotates neither its transforms nor what its decorators return as they are.
# pyright: reportAbstractUsage=false, reportCallIssue=false

from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.pallas_gpu import fragments
from pallas_kernels.pallas_gpu.fragments import QUERIES, ROWS
from xquant_jax.numerics.packing import PLANES

LAYOUT = plgpu.Layout.WGMMA


def swizzled(rows: int, columns: int) -> tuple[Any, ...]:
    """Tiles in shared memory whose rows are 128 bytes, pieces of 16 bytes swapped by row: threads of different rows
    read from different banks."""
    return plgpu.TilingTransform((rows, columns)), plgpu.SwizzleTransform(128)


def words_transforms(p: int) -> tuple[Any, ...]:
    """How the words of a plane of p bits lie in shared memory."""
    return swizzled(min(8, 4 * p), 32)


def keys(
    words: Sequence[Any], scale: Any, zero: Any, bits: int, axis: str, group: Any, interpret: bool
) -> tuple[BFloat16[Array, "64 C"], BFloat16[Array, "64 C"]]:
    """Vectors of both halves of a block, dequantized: rows in the order of `by_row`, channels of `by_thread`.

    words: references to shared memory [4p, C], one for each plane
    scale, zero: likewise [1, C] along a channel; along a token [n, m], 128 tokens' groups, all C in number `group`
    """
    width = words[0].shape[-1]
    if interpret:
        if axis == "channel":
            scales, zeros = scale[...], zero[...]
        else:
            scales, zeros = (jnp.take(a[...].reshape(2 * ROWS, -1), group, axis=1)[:, None] for a in (scale, zero))
        codes = _codes(words, bits).astype(jnp.float32)
        z = (codes * scales.astype(jnp.float32) + zeros.astype(jnp.float32)).astype(jnp.bfloat16)
        low, high = (fragments.by_thread(fragments.by_row(half)) for half in (z[:ROWS], z[ROWS:]))
        return low, high
    planes = [plgpu.RefType(words_transforms(p)) for p in PLANES[bits]]

    @plgpu.inline_mgpu(
        arg_types=(planes, plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=(_matrix(ROWS, width, jnp.bfloat16),) * 2,
    )
    def load(_: Any, words: Any, scale: Any, zero: Any, group: Any) -> Any:
        return fragments.load_keys(words, scale, zero, bits, axis, group.registers.item())

    return load(list(words), scale, zero, group)


def tokens(numbers: Any, group: Any, interpret: bool) -> tuple[Float[Array, "64 8"], Float[Array, "64 8"]]:
    """Scales or zeros [n, m] of the groups of 128 tokens: those in number `group`, of both halves, for every query."""
    if interpret:
        column = jnp.take(numbers[...].reshape(2 * ROWS, -1), group, axis=1).astype(jnp.float32)
        low, high = (jnp.tile(fragments.by_row(a)[:, None], (1, QUERIES)) for a in (column[:ROWS], column[ROWS:]))
        return low, high

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=(_matrix(ROWS, QUERIES, jnp.float32),) * 2
    )
    def load(_: Any, numbers: Any, group: Any) -> Any:
        return fragments.load_tokens(numbers, group.registers.item())

    return load(numbers, group)


def score(
    first: BFloat16[Array, "64 half"], second: BFloat16[Array, "64 half"], queries: Any, interpret: bool
) -> Float[Array, "64 8"]:
    """Products of keys' halves, columns in the order of `by_thread`, with those of queries [2, d / 64 * 8, 32]."""
    if interpret:
        halves = queries[...].astype(jnp.float32).reshape(2, -1, QUERIES, 32).swapaxes(1, 2).reshape(2, QUERIES, -1)
        wide = (first.astype(jnp.float32), second.astype(jnp.float32))
        left, right = (k @ fragments.by_thread(q).T for k, q in zip(wide, halves, strict=True))
        return left + right

    @plgpu.inline_mgpu(arg_types=(LAYOUT, LAYOUT, plgpu.RefType()), return_type=_matrix(ROWS, QUERIES, jnp.float32))
    def multiply(_: Any, first: Any, second: Any, queries: Any) -> Any:
        return fragments.score(first, second, queries)

    return multiply(first, second, queries)


def warp_max(x: Float[Array, "64 8"], least: Float[Array, "64 8"], interpret: bool) -> Float[Array, "64 8"]:
    """The largest number of every column among the 16 rows of each warp and `least`, equal in all of these rows."""
    if interpret:
        return jnp.maximum(least, jnp.repeat(x.reshape(4, 16, QUERIES).max(axis=1), 16, axis=0))

    @plgpu.inline_mgpu(arg_types=(LAYOUT, LAYOUT), return_type=_matrix(ROWS, QUERIES, jnp.float32))
    def largest(_: Any, x: Any, least: Any) -> Any:
        return fragments.warp_max(x, least)

    return largest(x, least)


def weigh(
    sums: Float[Array, "rows 8"],
    shrink: Float[Array, "64 8"],
    low: BFloat16[Array, "64 8"],
    high: BFloat16[Array, "64 8"],
    words: Sequence[Any],
    bits: int,
    interpret: bool,
) -> Float[Array, "rows 8"]:
    """sums * shrink, plus codes times the weights of both halves of a block: each warp's tokens for themselves.

    Codes are 128 + code where they have less than 8 bits. Sums are 64 rows for 16 channels, as `by_channel` reads them;
    shrink is the same in all 16 rows of a warp.
    """
    if interpret:
        codes = _codes(words, bits).astype(jnp.float32) + (128 if bits < 8 else 0)
        parts = zip((codes[:ROWS], codes[ROWS:]), (low, high), strict=True)
        added = sum(
            jnp.einsum("wtc,wtq->wcq", fragments.by_row(c).reshape(4, 16, -1), w.astype(jnp.float32).reshape(4, 16, -1))
            for c, w in parts
        )
        shrink = jnp.tile(shrink.reshape(1, 4, 16, QUERIES), (sums.shape[0] // ROWS, 1, 1, 1)).reshape(sums.shape)
        return sums * shrink + fragments.by_channel_inverse(added)

    @plgpu.inline_mgpu(
        arg_types=(*[LAYOUT] * 4, [plgpu.RefType(words_transforms(p)) for p in PLANES[bits]]),
        return_type=_matrix(*sums.shape, jnp.float32),
    )
    def add(_: Any, sums: Any, shrink: Any, low: Any, high: Any, words: Any) -> Any:
        return fragments.weigh(sums, shrink, low, high, words, bits)

    return add(sums, shrink, low, high, list(words))


def rotate(
    first: BFloat16[Array, "64 half"],
    second: BFloat16[Array, "64 half"],
    cos: BFloat16[Array, "64 half"],
    sin: BFloat16[Array, "64 half"],
    interpret: bool,
) -> tuple[BFloat16[Array, "64 half"], BFloat16[Array, "64 half"]]:
    """RoPE of keys' halves: one product of each sum is rounded, and the sum."""
    if interpret:

        def add(a: Array, b: Array, c: Array, d: Array) -> Array:
            rounded = (c * d).astype(jnp.float32)
            return (a.astype(jnp.float32) * b.astype(jnp.float32) + rounded).astype(jnp.bfloat16)

        return add(first, cos, -second, sin), add(second, cos, first, sin)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,) * 4, return_type=(_matrix(*first.shape, jnp.bfloat16),) * 2)
    def turn(_: Any, *arrays: Any) -> Any:
        return fragments.rotate(*arrays)

    return turn(first, second, cos, sin)


def _matrix(rows: int, columns: int, dtype: Any) -> Any:
    return plgpu.ShapeDtypeStruct((rows, columns), jnp.dtype(dtype), layout=LAYOUT)


def _codes(words: Sequence[Any], bits: int) -> Array:
    """All codes of a block [128, C]."""
    codes, below = jnp.uint32(0), 0
    for p, plane in zip(PLANES[bits], words, strict=True):
        shifts = p * jnp.arange(32 // p, dtype=jnp.uint32)[:, None, None]
        fields = (plane[...][None] >> shifts) & jnp.uint32(2**p - 1)
        codes, below = codes | (fields.reshape(2 * ROWS, -1) << jnp.uint32(below)), below + p
    return codes
