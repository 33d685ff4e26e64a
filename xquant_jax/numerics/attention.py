"""Attention in parts that are merged exactly.

A part is softmax attention over some of the keys, with the log-sum-exp of its scores; any split of the keys gives
the same result after `merge` (Dao et al. 2022, arXiv 2205.14135). History, window and new tokens are parts, and so
are tiles of the history.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from xquant_jax.numerics import rope
from xquant_jax.numerics.quantization import Leaf

LOWEST = float(jnp.finfo(jnp.float32).min)


class Part(NamedTuple):
    """Attention over a subset of keys: `out` is normalized within the subset, `lse` weighs it against others."""

    out: Float[Array, "B T H C"]
    lse: Float[Array, "B T H"]


def merge(*parts: Part) -> Part:
    """Attention over the union of the parts' keys. A row without any key stays zero."""
    top = jnp.maximum(jnp.max(jnp.stack([part.lse for part in parts]), axis=0), LOWEST)
    weights = [jnp.exp(part.lse - top) for part in parts]
    total = jnp.sum(jnp.stack(weights), axis=0)
    out = sum((p.out * w[..., None] for p, w in zip(parts, weights, strict=True)), start=jnp.float32(0))
    return Part(out / jnp.where(total > 0, total, 1.0)[..., None], top + jnp.log(total))


@struct.dataclass
class Geometry:
    """What relates queries to keys besides their content.

    positions: int32 [B, T], of the queries, from the start of each sequence
    sliding_window: int32 [], keys a query may look back at, itself included (a very large number: all)
    frequencies: float32 [d/2], of RoPE, radians per position
    scale: factor on the scores
    rotated: whether queries and keys are rotated already
    """

    positions: Leaf
    sliding_window: Leaf
    frequencies: Leaf
    scale: float = struct.field(pytree_node=False)
    rotated: bool = struct.field(pytree_node=False, default=False)


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S heads C"],
    geometry: Geometry,
    *,
    origin: Int[Array, " B"],
    first: Int[Array, ""] | int = 0,
    count: Int[Array, " #B"] | int,
) -> Part:
    """Attends to keys at positions origin, origin + 1, ...; only those numbered `first` <= i < `count` exist.

    Query head h reads key head h // (H/K). `v` has one set of values per kv head, or one for all heads. Keys are
    rotated by their number and queries by their distance from the origin, so the keys' tables are constants.
    """
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    number = jnp.arange(keys)[None]
    relative = geometry.positions - origin[:, None]
    if not geometry.rotated:
        q = rope.rotate_heads(q, relative, geometry.frequencies)
        k = rope.rotate_heads(k, number, geometry.frequencies)
    distance = relative[:, :, None] - number[:, None]  # [B, T, S]
    exists = (number >= first) & (number < jnp.asarray(count).reshape(-1, 1))
    mask = (distance >= 0) & (distance < geometry.sliding_window) & exists[:, None]

    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    score = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    score = jnp.where(mask[:, None, None], score * geometry.scale, -jnp.inf)
    top = jnp.maximum(score.max(axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp(score - top)
    total = jnp.moveaxis(weights.sum(axis=-1), 3, 1)  # [B, T, K, G]
    sets = v.shape[2]  # of values: one for each kv head, or one that all query heads share
    shared = weights.astype(v.dtype).reshape(batch, sets, heads // sets, length, keys)
    out = jnp.einsum("bkgts,bskc->btkgc", shared, v, preferred_element_type=jnp.float32).reshape(*total.shape, -1)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.moveaxis(top[..., 0], 3, 1) + jnp.log(total)
    return Part(out.reshape(batch, length, heads, -1), lse.reshape(batch, length, heads))
