"""The compiled program that moves all live slots on, token by token or draft by draft."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xquant_jax import sharding
from xquant_jax.cache.append import append
from xquant_jax.cache.flush import flush_when_due
from xquant_jax.cache.partition import constrain_cache
from xquant_jax.cache.shared import with_prefix, without_prefix
from xquant_jax.cache.state import Cache
from xquant_jax.generation.drafts import from_text, from_window
from xquant_jax.generation.sampling import Chosen
from xquant_jax.generation.slots import Slots, keep, take, written
from xquant_jax.model.transformer import Transformer
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.speculation import Speculation

STEPS = 64
"""Tokens of every slot that one run of a program makes at most: while it runs, nobody can interrupt it."""


@partial(jax.jit, static_argnames=("model", "speculation"), donate_argnames=("slots", "cache"))
def advance(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    prefix: Cache | None,
    slots: Slots,
    cache: Cache,
    live: Bool[Array, " B"],
    steps: Int[Array, ""],
    waiting: Bool[Array, ""],
    *,
    speculation: Speculation | None = None,
) -> tuple[Slots, Cache, Chosen]:
    """Decodes up to `steps` tokens for every live slot, in all but the last step of drafts accepted; fewer if none is
    live, or one is freed and a request `waiting`.

    live: the caller's view, which knows of stop strings. A slot that is not gives up what it stored.

    Returns slots and cache, then the tokens [STEPS and a draft, B]. As many of a column mean something as its slot has
    made more.
    """
    slots = dataclasses.replace(slots, live=live)
    made, most = slots.made, 0 if speculation is None else speculation.tokens

    def goes_on(carry: tuple[Slots, Cache, Chosen]) -> Array:
        slots = carry[0]
        furthest = jnp.where(slots.live, slots.made - made, 0).max()
        return (furthest < steps) & slots.live.any() & ~(waiting & (live & ~slots.live).any())

    def step(carry: tuple[Slots, Cache, Chosen]) -> tuple[Slots, Cache, Chosen]:
        return _decode(model, params, method_params, prefix, *carry, made, speculation)

    chosen = Chosen.nothing(STEPS + most, len(live), vocabulary=model.config.vocab_size)
    slots, cache, chosen = lax.while_loop(goes_on, step, (slots, keep(cache, live), chosen))
    slots, chosen = sharding.constrain_as((slots, chosen), sharding.P())  # every host reads them
    return slots, constrain_cache(cache), chosen


def _decode(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    prefix: Cache | None,
    slots: Slots,
    cache: Cache,
    chosen: Chosen,
    made: Int[Array, " B"],
    speculation: Speculation | None,
) -> tuple[Slots, Cache, Chosen]:
    """The next token of every live slot, and those behind it as long as a draft was right.

    The token at every place is the one that decoding without drafts takes there: by the same logits, the same draw and
    the same penalties. A draft goes at most up to where the window's first block is whole, since later tokens see that
    block quantized. Only tokens that stay are stored.

    made: tokens of every slot at the beginning of `chosen`
    """
    whole = with_prefix(cache, prefix)
    drafts, drafted = _drafts(model, params, method_params, slots, whole, speculation)
    room = jnp.minimum(BLOCK - cache.window_lengths, slots.asked.limit - slots.made) - 1
    drafted = jnp.where(slots.live, jnp.clip(drafted, 0, room), 0)
    tokens = jnp.concatenate([slots.last[:, None], drafts], axis=1)
    logits, whole, new = _verify(model, params, tokens, whole, method_params)
    cache = without_prefix(whole, prefix)
    rows, begin = jnp.arange(len(tokens)), slots.made

    def goes_on(carry: tuple[Array, Slots, Array, Chosen]) -> Array:
        return (carry[0] < tokens.shape[1]) & carry[2].any()

    def place(carry: tuple[Array, Slots, Array, Chosen]) -> tuple[Array, Slots, Array, Chosen]:
        """One place further in the rows that are `going`."""
        i, slots, going, chosen = carry
        taken, picked = take(
            dataclasses.replace(slots, live=going), lax.dynamic_index_in_dim(logits, i, axis=1, keepdims=False)
        )
        places = jnp.where(going, slots.made - made, len(chosen.tokens))
        chosen = jax.tree.map(lambda all_of_them, a: all_of_them.at[places, rows].set(a, mode="drop"), chosen, picked)
        slots = dataclasses.replace(
            taken,
            live=jnp.where(going, taken.live, slots.live),
            text=written(slots.text, cache.lengths + 1 + i, picked.tokens, going),
        )
        right = picked.tokens == tokens.at[:, i + 1].get(mode="fill", fill_value=-1)
        return i + 1, slots, going & taken.live & (i < drafted) & right, chosen

    first = (jnp.int32(0), slots, slots.live, chosen)
    done = place(first) if speculation is None else lax.while_loop(goes_on, place, first)
    counts = jnp.where(slots.live, jnp.maximum(done[1].made - begin, 1), 0)
    after = dataclasses.replace(
        done[1],
        steps=slots.steps + slots.live.astype(jnp.int32),
        drafted=slots.drafted + drafted,
        accepted=slots.accepted + jnp.maximum(counts - 1, 0),
    )
    cache = flush_when_due(append(cache, new, counts, grow=False), method_params)
    return after, constrain_cache(cache), done[3]


def _drafts(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    slots: Slots,
    cache: Cache,
    speculation: Speculation | None,
) -> tuple[Int[Array, "B n"], Int[Array, " B"]]:
    """What every slot may say next, and how many tokens of that."""
    wanted = slots.live & slots.asked.drafted
    nothing = jnp.zeros((len(wanted), 0 if speculation is None else speculation.tokens), jnp.int32)
    if speculation is None:
        return nothing, nothing.sum(axis=1)
    if speculation.kind == "lookup":
        drafts, found = from_text(slots.text, cache.lengths, speculation)
        return drafts, jnp.where(wanted, found, 0)

    def one_token(slots: Slots, cache: Cache) -> tuple[Slots, Cache, Array]:
        logits, cache, new = _verify(model, params, slots.last[:, None], cache, method_params)
        cache = append(cache, new, slots.live.astype(jnp.int32), grow=False)
        slots, chosen = take(slots, logits[:, 0])
        return slots, cache, chosen.tokens

    drafts = lax.cond(wanted.any(), lambda: from_window(cache, slots, one_token, speculation), lambda: nothing)
    return drafts, jnp.where(wanted, speculation.tokens, 0)


def _verify(
    model: Transformer, params: Any, tokens: Int[Array, "B T"], cache: Cache, method_params: tuple[Any, ...]
) -> tuple[Float[Array, "B T V"], Cache, Any]:
    """`Transformer.verify` as a pure function."""
    verified: Any = model.apply({"params": params}, tokens, cache, method_params, method="verify")
    return verified
