"""The compiled programs that feed prompts, and make the first token of each answer.

`feed` takes prompts straight into the rows of their slots, `admit` through a small cache of their own whose rows are
copied into free slots. `xquant_jax.generation.decode` has the program that goes on from there.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush
from xquant_jax.cache.partition import constrain_cache
from xquant_jax.cache.rows import copy_rows
from xquant_jax.cache.state import Cache, allocate
from xquant_jax.generation.sampling import Chosen, Seen
from xquant_jax.generation.slots import Arrivals, Slots, if_penalized, keep, take, written
from xquant_jax.model.transformer import Transformer, forward


@partial(jax.jit, static_argnames=("model", "cache_config", "chunk"), donate_argnames=("slots", "cache"))
def admit(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    slots: Slots,
    cache: Cache,
    arrivals: Arrivals,
    targets: Int[Array, " R"],
    *,
    cache_config: CacheConfig,
    chunk: int,
) -> tuple[Slots, Cache, Chosen]:
    """Feeds R prompts, takes the first token of each answer, and puts them into the slots `targets` (B: nowhere).

    Returns slots and cache, then the first tokens [1, R].
    """
    rows, length = arrivals.prompts.shape
    # on a mesh as long as the cache, so that every device copies blocks of its own
    tokens = cache.capacity if sharding.active() else min(length, cache.capacity)
    own = allocate(cache_config, model.config, batch=rows, tokens=tokens, implementation=cache.implementation)
    logits, own = _prefill(model, params, method_params, arrivals, own, chunk=chunk)
    new, chosen = _first_token(arrivals, Seen.nothing(rows, logits.shape[1]), logits)
    slots = jax.tree.map(lambda whole, part: whole.at[targets].set(part, mode="drop"), slots, new)
    slots, chosen = sharding.constrain_as((slots, chosen), sharding.P())
    return slots, copy_rows(cache, own, targets), jax.tree.map(lambda a: a[None], chosen)


@partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("slots", "cache"))
def feed(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    slots: Slots,
    cache: Cache,
    arrivals: Arrivals,
    live: Bool[Array, " B"],
    *,
    chunk: int,
) -> tuple[Slots, Cache, Chosen]:
    """Feeds the arrivals into their own rows (R = B) and takes the first token of each answer.

    live: the caller's view, which knows of stop strings; arrivals are live. Other live rows take no part; the rest give
        up what they stored, but for what arrivals keep

    Returns slots and cache, then the first tokens [1, B].
    """
    fed, kept = arrivals.lengths > 0, arrivals.kept > 0
    slots = dataclasses.replace(slots, live=live & ~fed)
    logits, cache = _prefill(model, params, method_params, arrivals, keep(cache, slots.live | kept), chunk=chunk)
    seen = Seen(slots.seen.anywhere & kept[:, None], jnp.zeros_like(slots.seen.answered))
    begun, chosen = _first_token(arrivals, seen, logits)

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(jnp.expand_dims(fed, tuple(range(1, old.ndim))), new, old)

    slots, chosen = sharding.constrain_as((jax.tree.map(pick, begun, slots), chosen), sharding.P())
    return slots, constrain_cache(cache), jax.tree.map(lambda a: a[None], chosen)


def _first_token(arrivals: Arrivals, kept: Seen, logits: Float[Array, "R V"]) -> tuple[Slots, Chosen]:
    """The slots of arrivals with the first token of each answer."""
    begun, chosen = take(_begun(arrivals, kept), logits)
    ends = arrivals.kept + arrivals.lengths
    return dataclasses.replace(begun, text=written(begun.text, ends, chosen.tokens, arrivals.lengths > 0)), chosen


def _begun(arrivals: Arrivals, kept: Seen) -> Slots:
    """The slots of arrivals that have made no token yet. `kept`: what was seen in the tokens that are kept."""
    rows, length = arrivals.prompts.shape

    def with_prompts(seen: Seen) -> Seen:
        inside = jnp.arange(length)[None] < arrivals.lengths[:, None]
        return dataclasses.replace(
            seen, anywhere=seen.anywhere.at[jnp.arange(rows)[:, None], arrivals.prompts].max(inside)
        )

    none, no = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    return Slots(
        arrivals.asked,
        last=none,
        made=none,
        live=arrivals.lengths > 0,
        failed=no,
        seen=if_penalized(arrivals.asked, with_prompts, kept),
        text=arrivals.texts,
        steps=none,
        drafted=none,
        accepted=none,
    )


def _prefill(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    arrivals: Arrivals,
    cache: Cache,
    *,
    chunk: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """Feeds the prompts, `chunk` tokens at a time (it divides their padded length), up to the longest.

    Returns the logits of the last token of every prompt; zeros for rows that hold none.
    """
    prompts, lengths = arrivals.prompts, arrivals.lengths

    def feed_chunk(carry: tuple[Array, Cache, Array]) -> tuple[Array, Cache, Array]:
        fed, cache, last = carry
        tokens = lax.dynamic_slice_in_dim(prompts, fed, chunk, axis=1)
        counts = jnp.clip(lengths - fed, 0, chunk)
        logits, cache = forward(model, params, tokens, cache, method_params, counts)
        ends_here = (counts > 0) & (fed + counts == lengths)
        cache = constrain_cache(flush(cache, method_params))
        return fed + chunk, cache, jnp.where(ends_here[:, None], logits, last)

    nothing = jnp.zeros((prompts.shape[0], model.config.vocab_size), jnp.float32)
    _, cache, logits = lax.while_loop(
        lambda carry: carry[0] < lengths.max(), feed_chunk, (jnp.int32(0), cache, nothing)
    )
    return logits, cache
