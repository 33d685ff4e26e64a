"""Drafts of what a sequence says next: from its own text, or by the model itself on less of its cache."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from xquant_jax.cache.newest import newest
from xquant_jax.cache.state import Cache
from xquant_jax.speculation import Speculation


def from_text(
    text: Int[Array, "B N"], last: Int[Array, " B"], speculation: Speculation
) -> tuple[Int[Array, "B n"], Int[Array, " B"]]:
    """What followed the longest match of a text's end earlier in it, the latest of several, and how many tokens that
    is: all or none. A match that reaches into the draft goes on with the draft itself.

    last: the place of the newest token of each text; what lies behind it means nothing
    """
    size = text.shape[1]
    places, rows = jnp.arange(size)[None], jnp.arange(len(text))[:, None]
    matched, alike = jnp.zeros(text.shape, jnp.int32), jnp.ones(text.shape, bool)
    for back in range(speculation.max):
        end = jnp.take_along_axis(text, jnp.maximum(last[:, None] - back, 0), axis=1)
        alike &= (jnp.roll(text, back, axis=1) == end) & (places >= back)
        matched += alike.astype(jnp.int32)
    matched = jnp.where(places < last[:, None], matched, 0)
    best = jnp.argmax(matched * size + places, axis=1)  # the longest, then the latest
    found = jnp.take_along_axis(matched, best[:, None], axis=1)[:, 0] >= speculation.min
    period = jnp.maximum(last - best, 1)[:, None]
    ahead = best[:, None] + 1 + jnp.arange(speculation.tokens)[None] % period
    return text[rows, jnp.minimum(ahead, size - 1)], jnp.where(found, speculation.tokens, 0)


def from_window(
    cache: Cache, slots: Any, one_token: Callable[[Any, Cache], tuple[Any, Cache, Array]], speculation: Speculation
) -> Int[Array, "B n"]:
    """What the model says next when it attends to the first tokens and the newest ones only.

    one_token: slots and cache -> those after one token more, and the token; the draws are those of the answer itself
    """

    def step(i: Array, carry: tuple[Any, Cache, Array]) -> tuple[Any, Cache, Array]:
        slots, cache, drafts = carry
        slots, cache, token = one_token(slots, cache)
        return slots, cache, drafts.at[:, i].set(token)

    none = jnp.zeros((len(cache.lengths), speculation.tokens), jnp.int32)
    return lax.fori_loop(0, speculation.tokens, step, (slots, newest(cache, speculation.blocks), none))[2]
