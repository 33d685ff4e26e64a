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
from jaxtyping import Array, Bool, Float

from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush
from xquant_jax.cache.partition import constrain_cache
from xquant_jax.cache.rows import copy_rows, load_blocks, save_blocks, share_rows
from xquant_jax.cache.shared import whole_blocks_alone, with_prefix, without_prefix
from xquant_jax.cache.state import Cache, allocate
from xquant_jax.generation.sampling import Chosen, Seen
from xquant_jax.generation.slots import Arrivals, Places, Slots, if_penalized, keep, take, written
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.packing import BLOCK


@partial(jax.jit, static_argnames=("model", "cache_config", "chunk", "tokens"))
def store(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    arrivals: Arrivals,
    *,
    cache_config: CacheConfig,
    chunk: int,
    tokens: int,
    implementation: str | None,
) -> tuple[Bool[Array, " R"], Cache]:
    """Feeds R beginnings of whole blocks, `tokens` at most: whether logits behind each are finite, and their blocks."""
    own = allocate(
        cache_config, model.config, batch=len(arrivals.lengths), tokens=tokens, implementation=implementation
    )
    logits, own = _prefill(model, params, method_params, arrivals, own, None, chunk=chunk)
    return jnp.isfinite(logits).all(axis=1), dataclasses.replace(whole_blocks_alone(own), running_sum=None)


@partial(
    jax.jit, static_argnames=("model", "cache_config", "chunk", "tokens"), donate_argnames=("slots", "cache", "found")
)
def admit(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    prefix: Cache | None,
    slots: Slots,
    cache: Cache,
    found: Cache | None,
    arrivals: Arrivals,
    places: Places,
    *,
    cache_config: CacheConfig,
    chunk: int,
    tokens: int,
) -> tuple[Slots, Cache, Cache | None, Chosen]:
    """Feeds R prompts, takes the first token of each of S answers, S/R to a prompt one after another, and puts them
    into slots. The prompts' blocks go there too, or, where the cache has shared rows, once into one of these.

    tokens: of a prompt beside its prefix, at most

    Returns slots, cache and found, then the first tokens [1, S].
    """
    own = allocate(
        cache_config, model.config, batch=len(arrivals.lengths), tokens=tokens, implementation=cache.implementation
    )
    origin = 0 if prefix is None else prefix.lengths[0]
    kept = jnp.where(arrivals.lengths > 0, arrivals.kept, 0)
    origins = jnp.minimum(kept, origin)
    own = dataclasses.replace(own, lengths=kept, origins=origins, history_blocks=(kept - origins) // BLOCK)
    if found is not None:
        own = load_blocks(own, found, places.load)
    logits, own = _prefill(model, params, method_params, arrivals, own, prefix, chunk=chunk)
    if found is not None:
        finite = jnp.isfinite(logits).all(axis=1)[:, None]
        found = save_blocks(found, own, jnp.where(finite, places.save, len(found.lengths)))
    new, chosen = _first_token(arrivals, Seen.nothing(*logits.shape), logits)
    slots = jax.tree.map(lambda whole, part: whole.at[places.slots].set(part, mode="drop"), slots, new)
    slots, chosen = sharding.constrain_as((slots, chosen), sharding.P())
    if cache.shared is None:
        cache = copy_rows(cache, own, places.slots)
    else:
        cache = share_rows(cache, own, places.rows, places.slots)
    return slots, cache, found, jax.tree.map(lambda a: a[None], chosen)


@partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("slots", "cache"))
def feed(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    prefix: Cache | None,
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
    fed = arrivals.lengths > 0
    origins = jnp.zeros_like(cache.origins) if prefix is None else jnp.where(fed, prefix.lengths[0], 0)
    kept = fed & (arrivals.kept > origins)
    slots, begins = dataclasses.replace(slots, live=live & ~fed), fed & ~kept
    cache = keep(cache, slots.live | kept)
    begun = {name: jnp.where(begins, origins, getattr(cache, name)) for name in ("lengths", "origins")}
    logits, cache = _prefill(
        model, params, method_params, arrivals, dataclasses.replace(cache, **begun), prefix, chunk=chunk
    )
    seen = Seen(slots.seen.anywhere & kept[:, None], jnp.zeros_like(slots.seen.answered))
    begun, chosen = _first_token(arrivals, seen, logits)

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(jnp.expand_dims(fed, tuple(range(1, old.ndim))), new, old)

    slots, chosen = sharding.constrain_as((jax.tree.map(pick, begun, slots), chosen), sharding.P())
    return slots, constrain_cache(cache), jax.tree.map(lambda a: a[None], chosen)


def _first_token(arrivals: Arrivals, kept: Seen, logits: Float[Array, "R V"]) -> tuple[Slots, Chosen]:
    """The slots of S answers with the first token of each. `kept`: what was seen in the tokens that are kept."""
    answers = len(arrivals.asked.limit) // len(arrivals.lengths)
    ends = jnp.repeat(arrivals.kept + arrivals.lengths, answers)
    begun, chosen = take(_begun(arrivals, kept, answers), jnp.repeat(logits, answers, axis=0))
    return dataclasses.replace(begun, text=written(begun.text, ends, chosen.tokens, begun.made > 0)), chosen


def _begun(arrivals: Arrivals, kept: Seen, answers: int) -> Slots:
    """The slots of arrivals that have made no token yet, so many to each."""
    known = arrivals.texts.shape[1]
    tokens = arrivals.texts if known else arrivals.prompts
    lengths = arrivals.lengths + (arrivals.kept if known else 0)

    def with_prompts(seen: Seen) -> Seen:
        inside = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        return dataclasses.replace(
            seen, anywhere=seen.anywhere.at[jnp.arange(len(tokens))[:, None], tokens].max(inside)
        )

    seen, live, text = jax.tree.map(
        lambda a: jnp.repeat(a, answers, axis=0),
        (if_penalized(arrivals.asked, with_prompts, kept), arrivals.lengths > 0, arrivals.texts),
    )
    none, no = jnp.zeros(len(live), jnp.int32), jnp.zeros(len(live), bool)
    return Slots(
        arrivals.asked,
        last=none,
        made=none,
        live=live,
        failed=no,
        seen=seen,
        text=text,
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
    prefix: Cache | None,
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
        logits, cache = forward(model, params, tokens, with_prefix(cache, prefix), method_params, counts)
        ends_here = (counts > 0) & (fed + counts == lengths)
        cache = constrain_cache(flush(without_prefix(cache, prefix), method_params))
        return fed + chunk, cache, jnp.where(ends_here[:, None], logits, last)

    nothing = jnp.zeros((prompts.shape[0], model.config.vocab_size), jnp.float32)
    _, cache, logits = lax.while_loop(
        lambda carry: carry[0] < lengths.max(), feed_chunk, (jnp.int32(0), cache, nothing)
    )
    return logits, cache
