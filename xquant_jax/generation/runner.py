"""What lies on the device for an engine: a cache of slots, what they share, and the compiled programs that run."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from xquant_jax import sharding
from xquant_jax.cache.rows import clear_rows
from xquant_jax.cache.shared import whole_blocks_alone, window_alone
from xquant_jax.cache.state import Cache, Shared, allocate, check_room
from xquant_jax.generation.buckets import bucket_length, rows_at_once
from xquant_jax.generation.decode import advance
from xquant_jax.generation.found import Found
from xquant_jax.generation.prefill import admit, feed
from xquant_jax.generation.prefix import check_alone, check_prefix, check_sharing, quantum, usable
from xquant_jax.generation.request import CheckedRequest, Options
from xquant_jax.generation.sampling import Chosen
from xquant_jax.generation.sharing import Sharing, own_tokens
from xquant_jax.generation.slots import Arrivals, Places, Slots
from xquant_jax.model.loading import Model
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.speculation import Speculation

STOP_IDS = 8
"""Stop ids come in multiples of so many, so that another number of them compiles nothing."""


@dataclasses.dataclass(frozen=True)
class Arrival:
    """Requests with the same prompt, and where they go.

    slots: one for each of them
    row: of the shared rows, where there are such
    kept: tokens that are stored already
    load: numbers of the found blocks that are among them
    """

    requests: Sequence[CheckedRequest]
    slots: Sequence[int]
    row: int = 0
    kept: int = 0
    load: Sequence[int] = ()


class Runner:
    """A cache of `slots` rows of up to `tokens` tokens each, beside those that they share; see `Engine`."""

    def __init__(
        self, model: Model, options: Options, *, slots: int, tokens: int, in_place: bool, sharing: Sharing
    ) -> None:
        self.model, self.in_place, self.sharing = model, in_place, sharing
        self.cache_config, self.prefill_chunk = options.cache_config, options.prefill_chunk
        self.speculation = Speculation.parse(options.speculate)
        self.size = slots
        self.prefix: Cache | None = None
        self.found: Found | None = None
        if sharing.prefix is not None:
            check_prefix(sharing.prefix, model, options)
            self.prefix = usable(sharing.prefix, options, sharing.shortest)
        self.method_params = model.method_params(self.cache_config)
        self.store = None
        if sharing.found:
            check_sharing(model, options)
            self.found = Found(sharing.found, quantum(options), self.origin)
            self.store = dataclasses.replace(whole_blocks_alone(self._allocate(sharing.found, BLOCK)), running_sum=None)
        with sharding.using(model.mesh):
            self.cache = self._allocate(slots, tokens)
        if sharing.samples > 1:
            check_alone(model, options)
            if tokens < BLOCK:
                self.cache = window_alone(self.cache, tokens)
            rows = whole_blocks_alone(self._allocate(sharing.prompts, sharing.tokens))
            self.cache = dataclasses.replace(
                self.cache, shared=Shared(rows, np.full(slots, -1, np.int32), sharing.samples)
            )
        self.implementation = model.transformer.implementation_of(self.cache, self.method_params, model.dtype)
        self._stops = STOP_IDS
        looked_up = self.speculation is not None and self.speculation.kind == "lookup"
        needed = looked_up or self.prefix is not None or self.found is not None
        self._text = self.origin + self._of_prompt + self.cache.capacity + 1 if needed else 0
        self.slots = Slots.free(slots, model.config.vocab_size, self._stops, self._text)
        self._buckets: dict[int, int] = {}  # prompt tokens per chunk -> padded length, a program for each

    @property
    def origin(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else int(self.prefix.lengths[0])

    @property
    def _of_prompt(self) -> int:
        """Tokens of a prompt that shared rows hold, at most."""
        return self.cache.shared.cache.capacity if self.cache.shared is not None else 0

    def own_tokens(self, request: CheckedRequest) -> int:
        """Tokens of a request that its own slot must hold."""
        return own_tokens(request, self.origin, self.sharing.samples)

    def fits(self, request: CheckedRequest) -> bool:
        """Whether the cache can hold it, and a program that there is already can feed it."""
        if len(request.tokens) <= self.origin or self.own_tokens(request) > self.cache.capacity:
            return False
        if self.cache.shared is not None and len(request.tokens) - self.origin > self._of_prompt:
            return False
        return self._chunk_for(len(request.tokens) - self.origin) is not None

    def check_room(self, request: CheckedRequest) -> None:
        """Raises `CacheFullError` for a request that the cache cannot hold."""
        check_room(self.cache.capacity, self.own_tokens(request))
        if self.cache.shared is not None:
            check_room(self._of_prompt, len(request.tokens) - self.origin)

    def at_once(self, chunk: int) -> int:
        """Prompts that one program feeds."""
        return self.size if self.in_place else rows_at_once(chunk, self.model.mesh)

    def reserve(self, request: CheckedRequest, *, kept: int | None = None, own: bool = False) -> int:
        """Sees to it that there is a program for a request less the tokens that are kept, one for its own bucket if
        told so. Returns its chunk."""
        size = len(request.tokens) - (self.origin if kept is None else kept)
        length, bucket = bucket_length(size, self.prefill_chunk)
        chunk = bucket if own else self._chunk_for(size)
        if chunk is None or own:
            chunk = bucket
            self._buckets[chunk] = max(length, self._buckets.get(chunk, 0))
        stops = sharding.round_up(max(len(request.stop_ids), 1), STOP_IDS)
        if stops > self._stops:
            asked, more = self.slots.asked, ((0, 0), (0, stops - self._stops))
            wider = dataclasses.replace(asked, stop_ids=np.pad(asked.stop_ids, more, constant_values=-1))
            self.slots, self._stops = dataclasses.replace(self.slots, asked=wider), stops
        return chunk

    def compile(self, requests: Iterable[CheckedRequest]) -> None:
        """Compiles what these requests need, unless it was before, by running it on none."""
        for request in sorted(requests, key=lambda r: len(r.tokens), reverse=True):
            self.reserve(request, own=not self.in_place)
        for chunk in self._buckets:
            self.feed([], chunk, np.zeros(self.size, bool))
        self.advance(np.zeros(self.size, bool), steps=0, waiting=False)
        jax.block_until_ready(self.cache)

    def feed(self, arrivals: Sequence[Arrival], chunk: int, live: np.ndarray) -> Chosen:
        """Feeds prompts, and makes the first token of each answer: that in slot `b` is column `columns(arrivals)[b]`.

        live: slots that are taken, those of the arrivals included
        """
        if self.in_place:
            rows: list[Arrival | None] = [None] * self.size
            for arrival in arrivals:
                rows[arrival.slots[0]] = arrival
        else:
            rows = [*arrivals, *[None] * (self.at_once(chunk) - len(arrivals))]
        samples = self.sharing.samples
        groups: list[list[CheckedRequest | None]] = [
            [*(arrival.requests if arrival else ()), *[None] * (samples - len(arrival.requests if arrival else ()))]
            for arrival in rows
        ]
        kept = [self.origin if arrival is None else max(arrival.kept, self.origin) for arrival in rows]
        there = Arrivals.of(groups, self._buckets[chunk], self._stops, kept, self._text)
        if self.in_place:
            return self._launch(feed, (there, live), {"chunk": chunk})
        return self._launch(admit, (there, self._places(rows)), self._sizes(there, chunk), store=True)

    def columns(self, arrivals: Sequence[Arrival]) -> dict[int, int]:
        """The column of each slot's first token, of what `feed` makes."""
        if self.in_place:
            return {slot: slot for arrival in arrivals for slot in arrival.slots}
        samples = self.sharing.samples
        return {slot: samples * i + j for i, arrival in enumerate(arrivals) for j, slot in enumerate(arrival.slots)}

    def advance(self, live: np.ndarray, *, steps: int, waiting: bool) -> Chosen:
        """Moves the sequences of live slots on."""
        return self._launch(advance, (live, np.int32(steps), np.bool_(waiting)), {"speculation": self.speculation})

    def clear(self, rows: np.ndarray) -> None:
        """Clears what these slots have stored."""
        with sharding.using(self.model.mesh):
            self.cache = clear_rows(self.cache, sharding.place(rows, sharding.P(), self.model.mesh))

    def _allocate(self, batch: int, tokens: int) -> Cache:
        implementation = self.model.implementation
        return allocate(self.cache_config, self.model.config, batch=batch, tokens=tokens, implementation=implementation)

    def _chunk_for(self, size: int) -> int | None:
        """Tokens per chunk of the program that feeds a prompt: its own, or a larger one that takes it all at once."""
        own = bucket_length(size, self.prefill_chunk)[1]
        fitting = [c for c, length in self._buckets.items() if size <= (length if c == own else c)]
        return min(fitting, default=None)

    def _sizes(self, there: Arrivals, chunk: int) -> dict[str, Any]:
        """The sizes of the small cache that prompts are fed into: on a mesh as long as the cache, so that every device
        copies blocks of its own; with room for what is found."""
        most = self._of_prompt or self.cache.capacity
        whole = self.model.mesh is not None or self.found is not None
        tokens = most if whole else min(there.prompts.shape[1], most)
        return {"cache_config": self.cache_config, "chunk": chunk, "tokens": tokens}

    def _places(self, rows: Sequence[Arrival | None]) -> Places:
        samples, shared = self.sharing.samples, self.cache.shared
        slots = np.full((len(rows), samples), self.size, np.int32)
        for own, arrival in zip(slots, rows, strict=True):
            if arrival is not None:
                own[: len(arrival.slots)] = arrival.slots
        places = Places(slots.reshape(-1))
        if shared is not None:
            nowhere = len(shared.cache.lengths)
            places = dataclasses.replace(
                places, rows=np.asarray([nowhere if a is None else a.row for a in rows], np.int32)
            )
        if self.found is None:
            return places
        blocks = (self._of_prompt or self.cache.capacity) // BLOCK
        load, save = (np.full((len(rows), blocks), fill, np.int32) for fill in (0, self.found.size))
        for i, arrival in enumerate(rows):
            if arrival is not None:
                load[i, : len(arrival.load)] = arrival.load
                numbers = self.found.save(arrival.requests[0].tokens, blocks)
                save[np.isin(save, numbers)] = self.found.size  # where one of those before it was to be written
                save[i, : len(numbers)] = numbers
        return dataclasses.replace(places, load=load, save=save)

    def _launch(self, program: Any, inputs: tuple[Any, ...], sizes: dict[str, Any], *, store: bool = False) -> Chosen:
        """Runs a program that takes the slots and the cache and gives them back."""
        model = self.model
        slots, *inputs_there = sharding.place((self.slots, *inputs), sharding.P(), model.mesh)
        parts = (model.transformer, model.params, self.method_params, self.prefix)
        stored = (slots, self.cache, *((self.store,) if store else ()))
        with sharding.using(model.mesh):
            self.slots, self.cache, *rest, chosen = program(*parts, *stored, *inputs_there, **sizes)
        if store:
            (self.store,) = rest
        return chosen
