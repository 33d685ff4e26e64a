"""The compiled programs behind every answer: a cache of slots, each with a sequence of its own.

`advance` moves all live slots on, after feeding prompts straight into their rows if there are any. `admit` feeds
prompts into a small cache of their own and copies its rows into free slots. What a request asks for lies in arrays, a
row for each slot: requests come and go, whatever their options, without another shape, and nothing is compiled again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush, flush_when_due
from xquant_jax.cache.partition import constrain_cache
from xquant_jax.cache.rows import copy_rows
from xquant_jax.cache.state import Cache, allocate
from xquant_jax.generation.request import CheckedRequest
from xquant_jax.generation.sampling import Chosen, Sampling, SamplingRows, sample
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.quantization import Leaf

STEPS = 64
"""Tokens of every slot that one run of a program makes at most: while it runs, nobody can interrupt it."""


@struct.dataclass
class Asked:
    """What the requests of a batch ask for, a row each. Token i of an answer depends on its own `seed` and i only."""

    limit: Leaf  # int32 [B], new tokens at most
    seed: Leaf  # int32 [B]
    sampling: SamplingRows
    stop_ids: Leaf  # int32 [B, n], padded with -1
    top: Leaf  # int32 [B], likeliest tokens told with every token

    @classmethod
    def of(cls, requests: Sequence[CheckedRequest | None], stops: int) -> "Asked":
        """One row for each of these, with room for `stops` stop ids; None asks for nothing."""
        stop_ids = np.full((len(requests), stops), -1, np.int32)
        for row, request in zip(stop_ids, requests, strict=True):
            if request is not None:
                row[: len(request.stop_ids)] = request.stop_ids

        def column(name: str) -> np.ndarray:
            return np.asarray([0 if request is None else getattr(request, name) for request in requests], np.int32)

        sampling = SamplingRows.of([Sampling() if request is None else request.sampling for request in requests])
        return cls(column("max_new_tokens"), column("seed"), sampling, stop_ids, column("logprobs"))


@struct.dataclass
class Slots:
    """What is known of every slot's sequence, but for its cache.

    last: its newest token, which the cache has not seen yet
    made: new tokens so far
    live: whether there is more to come; the slot of a sequence that is not live is free
    seen: tokens of prompt and answer; means something only for those that have a repetition penalty
    """

    asked: Asked
    last: Leaf  # int32 [B]
    made: Leaf  # int32 [B]
    live: Leaf  # bool [B]
    seen: Leaf  # bool [B, V]

    @classmethod
    def free(cls, size: int, vocabulary: int, stops: int) -> "Slots":
        """`size` free slots, for stop ids up to `stops`."""
        none = np.zeros(size, np.int32)
        asked = Asked.of([None] * size, stops)
        return cls(asked, none, none.copy(), np.zeros(size, bool), np.zeros((size, vocabulary), bool))


@struct.dataclass
class Arrivals:
    """Requests that are to be fed. A row of length 0 holds none."""

    asked: Asked
    prompts: Leaf  # int32 [R, P], padded on the right
    lengths: Leaf  # int32 [R]

    @classmethod
    def of(cls, requests: Sequence[CheckedRequest | None], length: int, stops: int) -> "Arrivals":
        """One row for each of these, prompts padded to `length`."""
        prompts, lengths = np.zeros((len(requests), length), np.int32), np.zeros(len(requests), np.int32)
        for i, request in enumerate(requests):
            if request is not None:
                lengths[i] = len(request.tokens)
                prompts[i, : lengths[i]] = request.tokens
        return cls(Asked.of(requests, stops), prompts, lengths)


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
    logits, own = _feed(model, params, method_params, arrivals, own, chunk=chunk)
    new, chosen = _take(_begun(arrivals, logits.shape[1]), logits)
    slots = jax.tree.map(lambda whole, part: whole.at[targets].set(part, mode="drop"), slots, new)
    slots, chosen = sharding.constrain_as((slots, chosen), sharding.P())
    return slots, copy_rows(cache, own, targets), jax.tree.map(lambda a: a[None], chosen)


@partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("slots", "cache"))
def advance(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    slots: Slots,
    cache: Cache,
    live: Bool[Array, " B"],
    steps: Int[Array, ""],
    waiting: Bool[Array, ""],
    arrivals: Arrivals | None = None,
    *,
    chunk: int = 0,
) -> tuple[Slots, Cache, Chosen]:
    """Feeds the arrivals into their own rows (R = B), then decodes up to `steps` tokens for every live slot.

    Without arrivals (None, not merely rows of length 0) there is no feeding part in the program. While prompts are fed
    the other rows take no part. Decoding ends sooner if no slot is live, or if one is freed and a request `waiting`.

    live: the caller's view, which knows of stop strings; arrivals are live. A slot that is not gives up what it stored.

    Returns slots and cache, then tokens [1 + STEPS, B]: first those that end the feeding of a row, then the decoded
    ones. As many of a column mean something as its slot has made more.
    """
    vocabulary = model.config.vocab_size
    chosen = Chosen.nothing(1 + STEPS, len(live), vocabulary=vocabulary)
    fed = jnp.zeros_like(live) if arrivals is None else arrivals.lengths > 0
    slots = dataclasses.replace(slots, live=live & ~fed)
    cache = _keep(cache, slots.live)
    if arrivals is not None:

        def begin(logits: Array, slots: Slots) -> tuple[Slots, Chosen]:
            begun, first = _take(_begun(arrivals, vocabulary), logits)

            def pick(new: Array, old: Array) -> Array:
                return jnp.where(jnp.expand_dims(fed, tuple(range(1, old.ndim))), new, old)

            return jax.tree.map(pick, begun, slots), _record(chosen, 0, first)

        logits, cache = _feed(model, params, method_params, arrivals, cache, chunk=chunk)
        slots, chosen = lax.cond(fed.any(), begin, lambda logits, slots: (slots, chosen), logits, slots)

    def goes_on(carry: tuple[Array, Slots, Cache, Chosen]) -> Array:
        i, slots = carry[:2]
        return (i < steps) & slots.live.any() & ~(waiting & (live & ~slots.live).any())

    def step(carry: tuple[Array, Slots, Cache, Chosen]) -> tuple[Array, Slots, Cache, Chosen]:
        i, slots, cache, chosen = carry
        counts = slots.live.astype(jnp.int32)
        logits, cache = forward(model, params, slots.last[:, None], cache, method_params, counts)
        slots, new = _take(slots, logits)
        cache = constrain_cache(flush_when_due(cache, method_params))
        return i + 1, slots, cache, _record(chosen, i + 1, new)

    _, slots, cache, chosen = lax.while_loop(goes_on, step, (jnp.int32(0), slots, cache, chosen))
    slots, chosen = sharding.constrain_as((slots, chosen), sharding.P())  # every host reads them
    return slots, constrain_cache(cache), chosen


def _keep(cache: Cache, kept: Bool[Array, " B"]) -> Cache:
    """The cache with only these rows filled."""
    names = ("lengths", "history_blocks", "lost")
    return dataclasses.replace(cache, **{name: jnp.where(kept, getattr(cache, name), 0) for name in names})


def _begun(arrivals: Arrivals, vocabulary: int) -> Slots:
    """The slots of arrivals that have made no token yet."""
    rows, length = arrivals.prompts.shape

    def with_prompts(seen: Bool[Array, "R V"]) -> Bool[Array, "R V"]:
        inside = jnp.arange(length)[None] < arrivals.lengths[:, None]
        return seen.at[jnp.arange(rows)[:, None], arrivals.prompts].max(inside)

    seen = _if_penalized(arrivals.asked, with_prompts, jnp.zeros((rows, vocabulary), bool))
    none = jnp.zeros(rows, jnp.int32)
    return Slots(arrivals.asked, last=none, made=none, live=arrivals.lengths > 0, seen=seen)


def _if_penalized(asked: Asked, more: Callable[[Array], Array], seen: Bool[Array, "B V"]) -> Bool[Array, "B V"]:
    """`more(seen)` if a sequence has a repetition penalty; else nobody asks what was seen."""
    return lax.cond(jnp.any(asked.sampling.repetition_penalty != 1), more, lambda seen: seen, seen)


def _take(slots: Slots, logits: Float[Array, "B V"]) -> tuple[Slots, Chosen]:
    """The next token of every live slot."""
    asked, live = slots.asked, slots.live
    chosen = sample(logits, asked.sampling, asked.seed, slots.made, slots.seen, asked.top)
    made = slots.made + live.astype(jnp.int32)
    ended = (chosen.tokens[:, None] == asked.stop_ids).any(axis=1) | (made >= asked.limit)
    return Slots(
        asked=asked,
        last=jnp.where(live, chosen.tokens, slots.last),
        made=made,
        live=live & ~ended,
        seen=_if_penalized(asked, lambda seen: seen.at[jnp.arange(len(made)), chosen.tokens].max(live), slots.seen),
    ), chosen


def _record(chosen: Chosen, at: Any, new: Chosen) -> Chosen:
    """The tokens [N, B] with new ones [B] written at number `at`."""
    return jax.tree.map(lambda all_of_them, a: all_of_them.at[at].set(a), chosen, new)


def _feed(
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
