"""The compiled program behind `generate` and `stream`: prefill and the decode loop in one jit.

`advance` first feeds what is left of the prompts, chunk by chunk, and then decodes until `limit` new tokens: called
once it generates everything, called with rising limits it streams, always the same compiled program.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from xquant_jax.cache import Cache, flush, flush_when_due
from xquant_jax.model import Transformer
from xquant_jax.sampling import Sampling, sample

UNFINISHED, STOPPED = 0, 1


@struct.dataclass
class Decoding:
    """A batch on its way: prompts [B, P] padded on the right, answers [B, N] so far, and the cache.

    prompt_lengths: tokens of each prompt
    fed: prompt tokens per sequence that the cache has seen (the same for all: chunk by chunk)
    step: new tokens of the sequences that are not done
    counts: new tokens of each sequence; a stop token is counted
    done: sequences that met a stop token, or that the caller ended
    seeds: one per sequence; token i of a sequence depends on its own seed and i only
    seen: tokens of prompt and answer, if a repetition penalty needs them
    """

    cache: Cache
    prompts: Int32[Array, "B P"]
    prompt_lengths: Int32[Array, " B"]
    fed: Int32[Array, ""]
    step: Int32[Array, ""]
    tokens: Int32[Array, "B N"]
    logprobs: Float[Array, "B N"]
    counts: Int32[Array, " B"]
    done: Bool[Array, " B"]
    seeds: Int32[Array, " B"]
    seen: Bool[Array, "B V"] | None


@partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames="state")
def advance(
    model: Transformer,
    params: Any,
    factors: tuple[Any, ...],
    state: Decoding,
    sampling: Sampling,
    stop_ids: Int[Array, " stops"],
    limit: Int[Array, ""],
    *,
    chunk: int,
) -> Decoding:
    """Feeds the rest of the prompts, then decodes until every sequence is done or has `limit` new tokens.

    `chunk`: prompt tokens fed at a time; it divides the padded prompt length.
    """
    run = partial(model.apply, {"params": params})
    rows = jnp.arange(state.prompts.shape[0])

    def feed_chunk(carry: tuple[Array, Cache, Array]) -> tuple[Array, Cache, Array]:
        fed, cache, last = carry
        tokens = lax.dynamic_slice_in_dim(state.prompts, fed, chunk, axis=1)
        counts = jnp.clip(state.prompt_lengths - fed, 0, chunk)
        logits, cache = run(tokens, cache, factors, counts)
        ends_here = (counts > 0) & (fed + counts == state.prompt_lengths)
        return fed + chunk, flush(cache), jnp.where(ends_here[:, None], logits, last)

    def choose(logits: Array, s: Decoding) -> Decoding:
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), s.step))(s.seeds)
        tokens, logprobs = sample(logits, sampling, keys, s.seen)
        live = ~s.done
        return s.replace(
            tokens=s.tokens.at[:, s.step].set(jnp.where(live, tokens, 0)),
            logprobs=s.logprobs.at[:, s.step].set(jnp.where(live, logprobs, 0.0)),
            counts=s.counts + live,
            done=s.done | jnp.isin(tokens, stop_ids),
            seen=None if s.seen is None else s.seen.at[rows, tokens].max(live),
            step=s.step + 1,
        )

    def decode_step(s: Decoding) -> Decoding:
        token = lax.dynamic_index_in_dim(s.tokens, s.step - 1, axis=1)
        logits, cache = run(token, s.cache, factors, (~s.done).astype(jnp.int32))
        return choose(logits, s.replace(cache=flush_when_due(cache)))

    longest = state.prompt_lengths.max()
    logits = jnp.zeros((rows.size, model.config.vocab_size), jnp.float32)
    fed, cache, logits = lax.while_loop(
        lambda carry: carry[0] < longest, feed_chunk, (state.fed, state.cache, logits)
    )
    small = state.replace(cache=None)  # the cache does not pass through the branch
    small = lax.cond(state.step == 0, choose, lambda logits, s: s, logits, small)
    return lax.while_loop(
        lambda s: (s.step < limit) & ~s.done.all(), decode_step, small.replace(cache=cache, fed=fed)
    )
