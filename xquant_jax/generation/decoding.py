"""The compiled program behind `generate` and `stream`: prefill and the decode loop in one jit.

`advance` first feeds what is left of the prompts, chunk by chunk, and then decodes until `limit` new tokens: called
once it generates everything, called with rising limits it streams, always the same compiled program.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Int

from xquant_jax import sharding
from xquant_jax.cache.flush import flush_when_due
from xquant_jax.cache.partition import constrain_cache
from xquant_jax.cache.state import Cache
from xquant_jax.generation.programs import feed, token_keys
from xquant_jax.generation.sampling import Sampling, sample
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.quantization import Leaf


@struct.dataclass
class Decoding:
    """A batch on its way, but for its cache: prompts [B, P] padded on the right, answers [B, N] so far.

    prompt_lengths: tokens of each prompt
    fed: prompt tokens per sequence that the cache has seen (the same for all: chunk by chunk)
    step: new tokens of the sequences that are not done
    counts: new tokens of each sequence; a stop token is counted
    done: sequences that met a stop token, or that the caller ended
    seeds: one per sequence; token i of a sequence depends on its own seed and i only
    seen: tokens of prompt and answer, if a repetition penalty needs them
    """

    prompts: Leaf  # int32 [B, P]
    prompt_lengths: Leaf  # int32 [B]
    fed: Leaf  # int32
    step: Leaf  # int32
    tokens: Leaf  # int32 [B, N]
    logprobs: Leaf  # float32 [B, N]
    counts: Leaf  # int32 [B]
    done: Leaf  # bool [B]
    seeds: Leaf  # int32 [B]
    seen: Leaf | None  # bool [B, V]


@partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("state", "cache"))
def advance(
    model: Transformer,
    params: Any,
    method_params: tuple[Any, ...],
    state: Decoding,
    cache: Cache,
    sampling: Sampling,
    stop_ids: Int[Array, " stops"],
    limit: Int[Array, ""],
    *,
    chunk: int,
) -> tuple[Decoding, Cache]:
    """Feeds the rest of the prompts, then decodes until every sequence is done or has `limit` new tokens.

    `chunk`: prompt tokens fed at a time; it divides the padded prompt length.
    """
    rows = jnp.arange(state.prompts.shape[0])

    def choose(s: Decoding, logits: Array) -> Decoding:
        keys = token_keys(s.seeds, jnp.full_like(s.seeds, s.step))
        tokens, logprobs = sample(logits, sampling, keys, s.seen)
        live = ~s.done
        return dataclasses.replace(
            s,
            tokens=s.tokens.at[:, s.step].set(jnp.where(live, tokens, 0)),
            logprobs=s.logprobs.at[:, s.step].set(jnp.where(live, logprobs, 0.0)),
            counts=s.counts + live,
            done=s.done | jnp.isin(tokens, stop_ids),
            seen=None if s.seen is None else s.seen.at[rows, tokens].max(live),
            step=s.step + 1,
        )

    def decode_step(carry: tuple[Decoding, Cache]) -> tuple[Decoding, Cache]:
        s, cache = carry
        token = lax.dynamic_index_in_dim(s.tokens, s.step - 1, axis=1)
        logits, cache = forward(model, params, token, cache, method_params, (~s.done).astype(jnp.int32))
        return choose(s, logits), constrain_cache(flush_when_due(cache, method_params))

    prompts = (state.prompts, state.prompt_lengths, state.fed)
    logits, cache, fed = feed(model, params, method_params, *prompts, cache, chunk=chunk)
    state = dataclasses.replace(state, fed=fed)
    state = lax.cond(state.step == 0, choose, lambda s, _: s, state, logits)
    state, cache = lax.while_loop(
        lambda carry: (carry[0].step < limit) & ~carry[0].done.all(), decode_step, (state, cache)
    )
    state = sharding.constrain_as(state, sharding.P())  # small, and every host reads it
    return state, constrain_cache(cache)
