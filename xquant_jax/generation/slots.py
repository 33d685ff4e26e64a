"""What is known of the sequences of a batch, a row each: what their requests ask for, and how far they are.

Everything a request asks for lies in arrays: requests come and go, whatever their options, without another shape, and
nothing is compiled again.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xquant_jax.cache.state import Cache
from xquant_jax.generation.request import CheckedRequest
from xquant_jax.generation.sampling import Chosen, Sampling, SamplingRows, Seen, sample
from xquant_jax.numerics.quantization import Leaf


@struct.dataclass
class Asked:
    """What the requests of a batch ask for, a row each. Token i of an answer depends on its own `key` and i only."""

    limit: Leaf  # int32 [B], new tokens at most
    least: Leaf  # int32 [B], new tokens before a stop id may be chosen
    key: Leaf  # uint32 [B, 2]
    sampling: SamplingRows
    stop_ids: Leaf  # int32 [B, n], padded with -1
    top: Leaf  # int32 [B], likeliest tokens told with every token
    drafted: Leaf  # bool [B], whether tokens may be drafted

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
        drafted = column("speculate").astype(bool)
        return cls(*limits, keys.reshape(-1, 2), sampling, stop_ids, column("logprobs"), drafted)


@struct.dataclass
class Slots:
    """What is known of every slot's sequence, but for its cache.

    last: its newest token, which the cache has not seen yet
    made: new tokens so far
    live: whether there is more to come; the slot of a sequence that is not live is free
    failed: whether it ended because its logits were not finite, after `made` tokens
    seen: tokens of prompt and answer; means something only for those that have a penalty
    text: the tokens themselves, the newest at the place that is the cache's length, where drafts are looked up in them;
        else no places
    steps: in which tokens of a draft were checked, or could have been
    drafted: tokens that were checked
    accepted: tokens of drafts that were right
    """

    asked: Asked
    last: Leaf  # int32 [B]
    made: Leaf  # int32 [B]
    live: Leaf  # bool [B]
    failed: Leaf  # bool [B]
    seen: Seen
    text: Leaf  # int32 [B, N]
    steps: Leaf  # int32 [B]
    drafted: Leaf  # int32 [B]
    accepted: Leaf  # int32 [B]

    @classmethod
    def free(cls, size: int, vocabulary: int, stops: int, text: int = 0) -> "Slots":
        """`size` free slots, for stop ids up to `stops` and texts of up to `text` tokens."""

        def none(*shape: int) -> np.ndarray:
            return np.zeros((size, *shape), np.int32)

        asked, live, failed = Asked.of([None] * size, stops), np.zeros(size, bool), np.zeros(size, bool)
        seen = Seen.nothing(size, vocabulary, np)
        return cls(asked, none(), none(), live, failed, seen, none(text), none(), none(), none())


@struct.dataclass
class Arrivals:
    """Prompts that are to be fed, and what is asked of the answers to them, as many to each. A row of length 0 holds
    none."""

    asked: Asked  # of the answers, those to one prompt after another
    prompts: Leaf  # int32 [R, P], what is to be fed, padded on the right
    lengths: Leaf  # int32 [R]
    kept: Leaf  # int32 [R], tokens before it that are stored already, in the row's cache or where it begins
    texts: Leaf  # int32 [R, N], all tokens, where something asks for them

    @classmethod
    def of(
        cls,
        groups: Sequence[Sequence[CheckedRequest | None]],
        length: int,
        stops: int,
        kept: Sequence[int] | None = None,
        text: int = 0,
    ) -> "Arrivals":
        """One row for each group of requests with the same prompt, prompts padded to `length`, each less its first
        tokens that are kept, and texts of up to `text` tokens. The first of a group is None only if all are."""
        size = len(groups)
        prompts, texts, lengths = (np.zeros(shape, np.int32) for shape in ((size, length), (size, text), size))
        before = np.zeros(size, np.int32) if kept is None else np.asarray(kept, np.int32)
        for i, (request, *_) in enumerate(groups):
            if request is not None:
                new, known = request.tokens[before[i] :], request.tokens[:text]
                lengths[i] = len(new)
                prompts[i, : len(new)] = new
                texts[i, : len(known)] = known
        asked = Asked.of([request for group in groups for request in group], stops)
        return cls(asked, prompts, lengths, before, texts)


@struct.dataclass
class Places:
    """Where the prompts that are fed go, and their answers. A place that does not exist: nowhere."""

    slots: Leaf  # int32 [S]
    rows: Leaf = None  # int32 [R], of the cache's shared ones, if it has such
    load: Leaf = None  # int32 [R, N], blocks that were found, where the cache has a store of them
    save: Leaf = None  # int32 [R, N], blocks of that store that each prompt's blocks are written to


def take(slots: Slots, logits: Float[Array, "B V"]) -> tuple[Slots, Chosen]:
    """The next token of every live slot whose logits are finite; the others fail."""
    asked, finite = slots.asked, jnp.isfinite(logits).all(axis=1)
    live = slots.live & finite
    held = (slots.made < asked.least)[:, None]
    forbidden = jnp.where(held, asked.stop_ids, -1)
    chosen = sample(logits, asked.sampling, asked.key, slots.made, slots.seen, forbidden, asked.top)
    made = slots.made + live.astype(jnp.int32)
    ended = ((chosen.tokens[:, None] == asked.stop_ids) & ~held).any(axis=1) | (made >= asked.limit)
    return dataclasses.replace(
        slots,
        last=jnp.where(live, chosen.tokens, slots.last),
        made=made,
        live=live & ~ended,
        failed=slots.failed | (slots.live & ~finite),
        seen=if_penalized(asked, lambda seen: seen.with_answers(chosen.tokens, live), slots.seen),
    ), chosen


def if_penalized(asked: Asked, more: Callable[[Seen], Seen], seen: Seen) -> Seen:
    """`more(seen)` if a sequence has a penalty; else nobody asks what was seen."""
    return lax.cond(asked.sampling.counting, more, lambda seen: seen, seen)


def written(
    text: Int[Array, "B N"], places: Int[Array, " B"], tokens: Int[Array, " B"], rows: Bool[Array, " B"]
) -> Int[Array, "B N"]:
    """The texts with one token more in these rows."""
    size = text.shape[1]
    return text.at[jnp.arange(len(text)), jnp.where(rows, places, size)].set(tokens, mode="drop") if size else text


def keep(cache: Cache, kept: Bool[Array, " B"]) -> Cache:
    """The cache with only these rows filled."""
    names = ("lengths", "origins", "history_blocks", "lost")
    counts = {name: jnp.where(kept, getattr(cache, name), 0) for name in names}
    shared = cache.shared
    if shared is not None and shared.rows is not None:
        shared = dataclasses.replace(shared, rows=jnp.where(kept, shared.rows, -1))
    return dataclasses.replace(cache, shared=shared, **counts)
