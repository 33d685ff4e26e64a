"""The compiled programs behind an offline batch: a cache of slots, each with a sequence of its own.

`admit` feeds new prompts into a small cache and copies its rows into free slots; `decode` moves all live slots on until
one is free. Slots come and go without another shape, so nothing is compiled again.
"""

import dataclasses
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
from xquant_jax.generation.sampling import Sampling, sample
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.quantization import Leaf


@struct.dataclass
class Slots:
    """What is known of every slot's sequence, but for its cache.

    last: its newest token, which the cache has not seen yet
    made: new tokens so far
    limit: new tokens at most
    live: whether there is more to come; the slot of a sequence that is not live is free
    seed: token i of a sequence depends on its own seed and i only
    seen: tokens of prompt and answer, if a repetition penalty needs them
    """

    last: Leaf  # int32 [B]
    made: Leaf  # int32 [B]
    limit: Leaf  # int32 [B]
    live: Leaf  # bool [B]
    seed: Leaf  # int32 [B]
    seen: Leaf | None  # bool [B, V]

    @classmethod
    def free(cls, size: int, vocabulary: int | None) -> "Slots":
        """`size` free slots. `vocabulary`: its size, if a repetition penalty needs `seen`."""

        def zeros() -> np.ndarray:
            return np.zeros(size, np.int32)

        seen = None if vocabulary is None else np.zeros((size, vocabulary), bool)
        return cls(zeros(), zeros(), zeros(), np.zeros(size, bool), zeros(), seen)


@partial(jax.jit, static_argnames=("model", "cache_config", "chunk"), donate_argnames=("slots", "cache"))
def admit(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    slots: Slots,
    cache: Cache,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, " R"],
    arrivals: Slots,
    targets: Int[Array, " R"],
    sampling: Sampling,
    stop_ids: Int[Array, " stops"],
    *,
    cache_config: CacheConfig,
    chunk: int,
) -> tuple[Slots, Cache, Slots, Float[Array, " R"]]:
    """Feeds R prompts, takes the first token of each answer, and puts them into the slots `targets` (B: nowhere).

    Returns slots and cache, then what became of the arrivals and the log-probabilities of their first tokens.
    """
    rows, length = prompts.shape
    # on a mesh as long as the cache, so that every device copies blocks of its own
    tokens = cache.capacity if sharding.active() else min(length, cache.capacity)
    own = allocate(cache_config, model.config, batch=rows, tokens=tokens, implementation=cache.implementation)
    logits, own, _ = feed(model, params, method_params, prompts, lengths, jnp.int32(0), own, chunk=chunk)
    arrivals, logprobs = _take(arrivals, logits, sampling, stop_ids)

    def put(whole: Array, part: Array) -> Array:
        return whole.at[targets].set(part, mode="drop")

    slots = jax.tree.map(put, slots, arrivals)
    slots, arrivals, logprobs = sharding.constrain_as((slots, arrivals, logprobs), sharding.P())
    return slots, copy_rows(cache, own, targets), arrivals, logprobs


@partial(jax.jit, static_argnames=("model", "steps"), donate_argnames=("slots", "cache"))
def decode(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    slots: Slots,
    cache: Cache,
    live: Bool[Array, " B"],
    waiting: Bool[Array, ""],
    sampling: Sampling,
    stop_ids: Int[Array, " stops"],
    *,
    steps: int,
) -> tuple[Slots, Cache, Int[Array, "steps B"], Float[Array, "steps B"]]:
    """Up to `steps` tokens for every live slot. Ends sooner if none is live, or if one is freed and a prompt `waiting`.

    live: the caller's view, which knows of stop strings. A slot that is not live gives up what it stored.

    Returns slots and cache, then tokens and log-probabilities: the first of a column are those that its slot made.
    """
    slots = dataclasses.replace(slots, live=live)
    held = {"lengths": jnp.where(live, cache.lengths, 0), "flushed": jnp.where(live, cache.history_blocks, 0)}
    shape = (steps, live.shape[0])

    def goes_on(carry: tuple[Array, Slots, Cache, Array, Array]) -> Array:
        i, s = carry[:2]
        return (i < steps) & s.live.any() & ~(waiting & (live & ~s.live).any())

    def step(carry: tuple[Array, Slots, Cache, Array, Array]) -> tuple[Array, Slots, Cache, Array, Array]:
        i, s, cache, tokens, logprobs = carry
        logits, cache = forward(model, params, s.last[:, None], cache, method_params, s.live.astype(jnp.int32))
        s, logprob = _take(s, logits, sampling, stop_ids)
        cache = constrain_cache(flush_when_due(cache, method_params))
        return i + 1, s, cache, tokens.at[i].set(s.last), logprobs.at[i].set(logprob)

    start = (jnp.int32(0), slots, dataclasses.replace(cache, **held), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    _, slots, cache, *made = lax.while_loop(goes_on, step, start)
    slots, (tokens, logprobs) = sharding.constrain_as((slots, made), sharding.P())  # every host reads them
    return slots, constrain_cache(cache), tokens, logprobs


def _take(
    slots: Slots, logits: Float[Array, "B V"], sampling: Sampling, stop_ids: Int[Array, " stops"]
) -> tuple[Slots, Float[Array, " B"]]:
    """The next token of every live slot, and its log-probability."""
    tokens, logprobs = sample(logits, sampling, token_keys(slots.seed, slots.made), slots.seen)
    rows, live = jnp.arange(tokens.shape[0]), slots.live
    made = slots.made + live
    return Slots(
        last=jnp.where(live, tokens, slots.last),
        made=made,
        limit=slots.limit,
        live=live & ~jnp.isin(tokens, stop_ids) & (made < slots.limit),
        seed=slots.seed,
        seen=None if slots.seen is None else slots.seen.at[rows, tokens].max(live),
    ), logprobs


def feed(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    fed: Int[Array, ""],
    cache: Cache,
    *,
    chunk: int,
) -> tuple[Float[Array, "B V"], Cache, Int[Array, ""]]:
    """Feeds the prompts from token `fed` on, `chunk` tokens at a time, up to the longest.

    Returns the logits of the last token of every prompt that ends here (zeros for others), and how much is fed now.
    """

    def feed_chunk(carry: tuple[Array, Cache, Array]) -> tuple[Array, Cache, Array]:
        fed, cache, last = carry
        tokens = lax.dynamic_slice_in_dim(prompts, fed, chunk, axis=1)
        counts = jnp.clip(lengths - fed, 0, chunk)
        logits, cache = forward(model, params, tokens, cache, method_params, counts)
        ends_here = (counts > 0) & (fed + counts == lengths)
        cache = constrain_cache(flush(cache, method_params))
        return fed + chunk, cache, jnp.where(ends_here[:, None], logits, last)

    nothing = jnp.zeros((prompts.shape[0], model.config.vocab_size), jnp.float32)
    fed, cache, logits = lax.while_loop(lambda carry: carry[0] < lengths.max(), feed_chunk, (fed, cache, nothing))
    return logits, cache, fed


def token_keys(seeds: Int[Array, " B"], numbers: Int[Array, " B"]) -> Any:
    """The random key that token `numbers` of each answer is drawn with: it depends on seed and number only."""
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)
