"""The compiled programs behind every answer: a cache of slots, each with a sequence of its own.

`feed` takes prompts straight into the rows of their slots, `admit` through a small cache of their own whose rows are
copied into free slots; both make the first token of each answer. `advance` moves all live slots on. What a request asks
for lies in arrays, a row for each slot: requests come and go, whatever their options, without another shape, and
nothing is compiled again.
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
from xquant_jax.generation.sampling import Chosen, Sampling, SamplingRows, Seen, sample
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.quantization import Leaf

STEPS = 64
"""Tokens of every slot that one run of a program makes at most: while it runs, nobody can interrupt it."""


@struct.dataclass
class Asked:
    """What the requests of a batch ask for, a row each. Token i of an answer depends on its own `key` and i only."""

    limit: Leaf  # int32 [B], new tokens at most
    least: Leaf  # int32 [B], new tokens before a stop id may be chosen
    key: Leaf  # uint32 [B, 2]
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
        keys = np.asarray([(0, 0) if request is None else request.key for request in requests], np.uint32)
        limits = column("max_new_tokens"), column("min_tokens")
        return cls(*limits, keys.reshape(-1, 2), sampling, stop_ids, column("logprobs"))


@struct.dataclass
class Slots:
    """What is known of every slot's sequence, but for its cache.

    last: its newest token, which the cache has not seen yet
    made: new tokens so far
    live: whether there is more to come; the slot of a sequence that is not live is free
    failed: whether it ended because its logits were not finite, after `made` tokens
    seen: tokens of prompt and answer; means something only for those that have a penalty
    """

    asked: Asked
    last: Leaf  # int32 [B]
    made: Leaf  # int32 [B]
    live: Leaf  # bool [B]
    failed: Leaf  # bool [B]
    seen: Seen

    @classmethod
    def free(cls, size: int, vocabulary: int, stops: int) -> "Slots":
        """`size` free slots, for stop ids up to `stops`."""
        none = np.zeros(size, np.int32)
        asked, no = Asked.of([None] * size, stops), np.zeros(size, bool)
        return cls(asked, none, none.copy(), no, no.copy(), Seen.nothing(size, vocabulary, np))


@struct.dataclass
class Arrivals:
    """Requests that are to be fed. A row of length 0 holds none."""

    asked: Asked
    prompts: Leaf  # int32 [R, P], what is to be fed, padded on the right
    lengths: Leaf  # int32 [R]
    kept: Leaf  # int32 [R], tokens before it that the row's cache holds already

    @classmethod
    def of(
        cls, requests: Sequence[CheckedRequest | None], length: int, stops: int, kept: Sequence[int] | None = None
    ) -> "Arrivals":
        """One row for each of these, prompts padded to `length`, each less its first tokens that are kept."""
        prompts, lengths = np.zeros((len(requests), length), np.int32), np.zeros(len(requests), np.int32)
        before = np.zeros(len(requests), np.int32) if kept is None else np.asarray(kept, np.int32)
        for i, request in enumerate(requests):
            if request is not None:
                new = request.tokens[before[i] :]
                lengths[i] = len(new)
                prompts[i, : lengths[i]] = new
        return cls(Asked.of(requests, stops), prompts, lengths, before)


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
    new, chosen = _take(_begun(arrivals, Seen.nothing(rows, logits.shape[1])), logits)
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
    logits, cache = _prefill(model, params, method_params, arrivals, _keep(cache, slots.live | kept), chunk=chunk)
    seen = Seen(slots.seen.anywhere & kept[:, None], jnp.zeros_like(slots.seen.answered))
    begun, chosen = _take(_begun(arrivals, seen), logits)

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(jnp.expand_dims(fed, tuple(range(1, old.ndim))), new, old)

    slots, chosen = sharding.constrain_as((jax.tree.map(pick, begun, slots), chosen), sharding.P())
    return slots, constrain_cache(cache), jax.tree.map(lambda a: a[None], chosen)


@partial(jax.jit, static_argnames="model", donate_argnames=("slots", "cache"))
def advance(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    slots: Slots,
    cache: Cache,
    live: Bool[Array, " B"],
    steps: Int[Array, ""],
    waiting: Bool[Array, ""],
) -> tuple[Slots, Cache, Chosen]:
    """Decodes up to `steps` tokens for every live slot; fewer if none is live, or one is freed and a request `waiting`.

    live: the caller's view, which knows of stop strings. A slot that is not gives up what it stored.

    Returns slots and cache, then the tokens [STEPS, B]. As many of a column mean something as its slot has made more.
    """
    slots = dataclasses.replace(slots, live=live)

    def goes_on(carry: tuple[Array, Slots, Cache, Chosen]) -> Array:
        i, slots = carry[:2]
        return (i < steps) & slots.live.any() & ~(waiting & (live & ~slots.live).any())

    def step(carry: tuple[Array, Slots, Cache, Chosen]) -> tuple[Array, Slots, Cache, Chosen]:
        i, slots, cache, chosen = carry
        counts = slots.live.astype(jnp.int32)
        logits, cache = forward(model, params, slots.last[:, None], cache, method_params, counts)
        slots, new = _take(slots, logits)
        cache = constrain_cache(flush_when_due(cache, method_params))
        return i + 1, slots, cache, jax.tree.map(lambda all_of_them, a: all_of_them.at[i].set(a), chosen, new)

    chosen = Chosen.nothing(STEPS, len(live), vocabulary=model.config.vocab_size)
    _, slots, cache, chosen = lax.while_loop(goes_on, step, (jnp.int32(0), slots, _keep(cache, live), chosen))
    slots, chosen = sharding.constrain_as((slots, chosen), sharding.P())  # every host reads them
    return slots, constrain_cache(cache), chosen


def _keep(cache: Cache, kept: Bool[Array, " B"]) -> Cache:
    """The cache with only these rows filled."""
    names = ("lengths", "history_blocks", "lost")
    return dataclasses.replace(cache, **{name: jnp.where(kept, getattr(cache, name), 0) for name in names})


def _begun(arrivals: Arrivals, kept: Seen) -> Slots:
    """The slots of arrivals that have made no token yet. `kept`: what was seen in the tokens that are kept."""
    rows, length = arrivals.prompts.shape

    def with_prompts(seen: Seen) -> Seen:
        inside = jnp.arange(length)[None] < arrivals.lengths[:, None]
        return dataclasses.replace(
            seen, anywhere=seen.anywhere.at[jnp.arange(rows)[:, None], arrivals.prompts].max(inside)
        )

    seen = _if_penalized(arrivals.asked, with_prompts, kept)
    none, no = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    return Slots(arrivals.asked, last=none, made=none, live=arrivals.lengths > 0, failed=no, seen=seen)


def _if_penalized(asked: Asked, more: Callable[[Seen], Seen], seen: Seen) -> Seen:
    """`more(seen)` if a sequence has a penalty; else nobody asks what was seen."""
    return lax.cond(asked.sampling.counting, more, lambda seen: seen, seen)


def _take(slots: Slots, logits: Float[Array, "B V"]) -> tuple[Slots, Chosen]:
    """The next token of every live slot whose logits are finite; the others fail."""
    asked, finite = slots.asked, jnp.isfinite(logits).all(axis=1)
    live = slots.live & finite
    held = (slots.made < asked.least)[:, None]
    forbidden = jnp.where(held, asked.stop_ids, -1)
    chosen = sample(logits, asked.sampling, asked.key, slots.made, slots.seen, forbidden, asked.top)
    made = slots.made + live.astype(jnp.int32)
    ended = ((chosen.tokens[:, None] == asked.stop_ids) & ~held).any(axis=1) | (made >= asked.limit)
    return Slots(
        asked=asked,
        last=jnp.where(live, chosen.tokens, slots.last),
        made=made,
        live=live & ~ended,
        failed=slots.failed | (slots.live & ~finite),
        seen=_if_penalized(asked, lambda seen: seen.with_answers(chosen.tokens, live), slots.seen),
    ), chosen


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
