"""Attention in parts that are merged exactly.

A part is softmax attention over some of the keys, with the log-sum-exp of its scores; any split of the keys gives
the same result after `merge` (Dao et al. 2022, arXiv 2205.14135). History, window and new tokens are parts, and so
are tiles of the history.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xquant_jax.numerics import rope
from xquant_jax.numerics.quantization import Leaf

LOWEST = float(jnp.finfo(jnp.float32).min)

AFTER_ALL = 2**30
"""A position behind all keys and queries."""


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

    positions: int32 [B, T], of the queries, from the start of each sequence; below 0: the query sees no key
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

    def earliest(self) -> Int[Array, " B"]:
        """The position of each sequence's first query that may see a key; `AFTER_ALL` if none may."""
        return jnp.where(self.positions < 0, AFTER_ALL, self.positions).min(axis=1)


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S heads C"],
    geometry: Geometry,
    *,
    origin: Int[Array, " B"],
    numbers: Int[Array, "#B S"] | None = None,
    exists: Bool[Array, "#B #T S"] | None = None,
) -> Part:
    """Attends to keys at positions origin + numbers, by default 0, 1, ...; only those that `exists` names are there for
    a query, by default all.

    Query head h reads key head h // (H/K). `v` has one set of values per kv head, or one for all heads. Keys are
    rotated by their number and queries by their distance from the origin, so the keys' tables are constants.
    """
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    if numbers is None:
        numbers = jnp.arange(keys)[None]
    relative = geometry.positions - origin[:, None]
    distance = relative[:, :, None] - numbers[:, None]  # [B, T, S]
    mask = (distance >= 0) & (distance < geometry.sliding_window)
    if exists is not None:
        mask = mask & exists
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))  # heads outermost, as products and loops over them want it
    if not geometry.rotated:
        first = geometry.positions[:, None, :1]
        ahead = rope.rotation(geometry.positions[:, None] - first, geometry.frequencies)  # the same for any origin
        q = rope.rotate(q, *rope.turned(ahead, rope.rotation(first - origin[:, None, None], geometry.frequencies)))
        k = rope.rotate(k, *rope.rotation(numbers[:, None], geometry.frequencies))

    grouped = q.reshape(batch, kv_heads, -1, dim)
    by_head = (((3,), (3,)), ((0, 1), (0, 1)))  # of heads and tokens as one axis: with two, XLA transposes all keys
    score = lax.dot_general(grouped, k, by_head, preferred_element_type=jnp.float32)
    score = score.reshape(batch, kv_heads, heads // kv_heads, length, keys)
    score = jnp.where(mask[:, None, None], score * geometry.scale, -jnp.inf)
    top = jnp.maximum(score.max(axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp(score - top)
    total = weights.sum(axis=-1, keepdims=True)
    sets = v.shape[1]  # of values: one for each kv head, or one that all query heads share
    shared = weights.astype(v.dtype).reshape(batch, sets, -1, keys)
    by_set = (((3,), (2,)), ((0, 1), (0, 1)))
    out = lax.dot_general(shared, v, by_set, preferred_element_type=jnp.float32).reshape(*total.shape[:-1], -1)
    out = out / jnp.where(total > 0, total, 1.0)
    lse = (top + jnp.log(total))[..., 0]

    def by_token(a: Array) -> Array:  # [B, K, G, T, ...] -> [B, T, H, ...]
        return jnp.moveaxis(a, 3, 1).reshape(batch, length, heads, *a.shape[4:])

    return Part(by_token(out), by_token(lse))
