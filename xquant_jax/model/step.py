"""One step of a loop of one's own, safe in compiled code."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xquant_jax.cache.flush import flush, flush_when_due
from xquant_jax.cache.partition import constrain_cache
from xquant_jax.cache.state import Cache
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.packing import BLOCK


def step(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    cache: Cache,
    method_params: tuple[Any, ...],
    counts: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits of each sequence's last new token, and the cache with the new tokens in it and whole blocks flushed.

    This is `forward` and then `flush`. The first `counts` of the T tokens of each sequence are new (None: all of them),
    the rest is padding.

    Outside of compiled code a cache that is full raises `CacheFullError`. In compiled code nothing can be raised: what
    does not fit is not stored, the logits of that sequence are NaN from then on, and `check_nothing_lost` raises when
    it is given the cache after the loop.
    """
    length = tokens.shape[1]
    if counts is None:
        counts = jnp.full(tokens.shape[:1], length, jnp.int32)
    logits, cache = forward(model, params, tokens, cache, method_params, counts)
    flush_whole_blocks = flush if length >= BLOCK else flush_when_due
    cache = constrain_cache(flush_whole_blocks(cache, method_params))
    return jnp.where(cache.lost[:, None] > 0, jnp.nan, logits), cache
