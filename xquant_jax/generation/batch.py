"""Offline batches: many prompts through a fixed number of slots that are kept full.

A slot whose answer is finished takes the next waiting prompt at once (continuous batching), without compiling
anything. Longer sequences come first; with a budget of memory, shorter ones get a cache with more and smaller slots.
Files are the business of `xquant_jax.generation.batch_files`.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.errors import ConfigError, PromptError
from xquant_jax.generation.programs import Slots, admit, decode
from xquant_jax.generation.request import (
    STOP_STRING_STEPS,
    Answer,
    Completion,
    Prompt,
    Request,
    bucket_length,
    check_length,
    check_max_new_tokens,
    checked_seeds,
    checked_stops,
    padded_stop_ids,
    prompt_tokens,
)
from xquant_jax.generation.sampling import Sampling
from xquant_jax.generation.transcript import Transcript
from xquant_jax.model.loading import Model
from xquant_jax.numerics.packing import BLOCK

DEFAULT_SLOTS = 8

PREFILL_TOKENS = 512
"""Prompt tokens fed at once, padding included: several short prompts together, long ones alone."""

SMALL = 512
"""Tokens of a sequence up to which slots are not made smaller: most of one is its window and its last block."""

STEPS = 64
"""Tokens of every slot between two looks at them, where no stop string asks for more."""


def prepare(
    model: Model,
    *,
    cache: str | CacheConfig = "xquant:4",
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    prefill_chunk: int | None = 512,
    slots: int | None = None,
    memory: int | None = None,
    mesh: Mesh | None = None,
) -> "Batch":
    """A batch with these options, which are those of `generate`; `Batch.answers` runs it.

    slots: sequences that run at the same time (8 if `memory` is not given either)
    memory: bytes that the caches may take instead, on all devices together; as many slots as fit
    mesh: devices to spread cache and work over, by default those that the model was loaded on

    Raises `ConfigError` for an option that cannot be honoured.
    """
    if slots is not None and memory is not None:
        raise ConfigError(f"slots={slots} and memory={memory} are both given; choose one")
    for name, value in (("slots", slots), ("memory", memory)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not possible; choose 1 or more")
    check_max_new_tokens(max_new_tokens)
    checked_seeds(seed, 1)
    bucket_length(1, prefill_chunk)
    model = model.on(mesh)
    if model.mesh is not None and slots is not None:
        sharding.check_batch(slots, model.mesh, "slots")
    cache_config, sampling, ends = CacheConfig.parse(cache), sampling.checked(), checked_stops(model, stop, stop_ids)
    return Batch(
        model=model,
        cache_config=cache_config,
        method_params=model.method_params(cache_config),
        sampling=sampling,
        ends=ends,
        stop=stop,
        max_new_tokens=max_new_tokens,
        seed=seed,
        prefill_chunk=prefill_chunk,
        slots=slots or sharding.round_up(DEFAULT_SLOTS, sharding.batch_parts(model.mesh)),
        memory=memory,
    )


@dataclasses.dataclass(frozen=True)
class Batch:
    """The options of a batch, checked; see `prepare`."""

    model: Model
    cache_config: CacheConfig
    method_params: tuple[Any, ...]
    sampling: Sampling
    ends: tuple[int, ...]
    stop: Sequence[str]
    max_new_tokens: int
    seed: int
    prefill_chunk: int | None
    slots: int
    memory: int | None

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answers every request, in the order in which they finish.

        An answer is the one that `generate` gives to the same prompt and seed, whatever runs beside it (but for
        rounding: with a quantized cache a code on the edge can round otherwise). A request that cannot be honoured (an
        empty prompt, a token id out of range, a sequence that the memory cannot hold) gets an `Answer` with an error.

        Every process of a `jax.distributed` job may run this with the same arguments: what is admitted when depends on
        nothing else.
        """
        sequences = []
        for index, request in enumerate(requests):
            try:
                sequences.append(self._sequence(index, request))
            except (PromptError, ConfigError) as error:
                yield Answer(index, None, str(error))
        waiting = deque(sorted(sequences, key=lambda s: s.capacity, reverse=True))
        while waiting:
            shorter, slots = 0, self.slots
            if self.memory is not None and waiting[0].capacity > SMALL:  # half as long: smaller slots, and more of them
                shorter = 2 ** (waiting[0].capacity.bit_length() - 1) - 1
            expected = [s for s in waiting if s.capacity > shorter]
            if self.memory is not None:
                slots = self._slots_within(self.memory, expected)
            if slots:
                yield from _drain(waiting, _Table(self, slots, expected), shorter)
                continue
            need, sequence = self._bytes_of(1, expected), waiting.popleft()
            yield Answer(
                sequence.index,
                None,
                f"{sequence.capacity} tokens take a cache of {need} bytes, and memory={self.memory} is all there is; "
                f"raise it, or shorten the prompt or max_new_tokens",
            )

    def _sequence(self, index: int, request: Request) -> "_Sequence":
        limit = self.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        check_max_new_tokens(limit)
        (seed,) = checked_seeds(self.seed if request.seed is None else request.seed, 1)
        tokens = prompt_tokens(self.model, "the prompt", request.prompt)
        check_length(len(tokens) + limit)
        bucket = bucket_length(len(tokens), self.prefill_chunk)
        transcript = Transcript(self.model.tokenizer, tokens, frozenset(self.ends), self.stop, limit)
        return _Sequence(index, request.prompt, tokens, limit, seed, bucket, transcript)

    def _slots_within(self, memory: int, expected: Sequence["_Sequence"]) -> int:
        """Slots for these sequences that the memory holds."""
        parts = sharding.batch_parts(self.model.mesh)
        one, two = self._bytes_of(parts, expected), self._bytes_of(2 * parts, expected)
        return parts * max(0, 1 + (memory - one) // (two - one))

    def _bytes_of(self, slots: int, expected: Sequence["_Sequence"]) -> int:
        """Bytes of so many slots for these sequences, and of the largest small cache that prompts are fed into."""
        longest = max(s.capacity for s in expected)
        feeding = max(
            self._bytes(self.rows_at_once(chunk), length if self.model.mesh is None else longest)
            for length, chunk in {s.bucket for s in expected}
        )
        return feeding + self._bytes(slots, longest)

    def _bytes(self, batch: int, tokens: int) -> int:
        with sharding.using(self.model.mesh):
            shapes = jax.eval_shape(lambda: allocate(self.cache_config, self.model.config, batch=batch, tokens=tokens))
        return cache_bytes(shapes).total

    def rows_at_once(self, chunk: int) -> int:
        """Prompts that are fed together; a row of their cache takes at least a block."""
        return sharding.round_up(max(1, PREFILL_TOKENS // max(chunk, BLOCK)), sharding.batch_parts(self.model.mesh))


def _drain(waiting: "deque[_Sequence]", table: "_Table", shorter: int) -> Iterator[Answer]:
    """Answers the sequences at the front that need more than `shorter` tokens.

    Others are taken only to keep slots busy for as long as one of those is on its way.
    """
    while True:
        while waiting and table.takes(waiting[0]):
            if waiting[0].capacity <= shorter and not table.busy(beyond=shorter):
                break
            yield from table.admit(waiting)
        if not table.busy():
            return
        yield from table.decode(waiting=bool(waiting))


@dataclasses.dataclass
class _Sequence:
    """A request on its way. `bucket`: padded length of its prompt, and prompt tokens per chunk."""

    index: int
    prompt: Prompt
    tokens: list[int]
    limit: int
    seed: int
    bucket: tuple[int, int]
    transcript: Transcript

    @property
    def capacity(self) -> int:
        """Tokens that its cache must hold: the last one of an answer is never stored."""
        return len(self.tokens) + self.limit - 1

    def answer(self) -> Answer:
        t = self.transcript
        prompt = self.prompt if isinstance(self.prompt, str) else self.tokens
        return Answer(self.index, Completion(prompt, t.text, t.tokens, t.logprobs, t.finish_reason or ""))


class _Table:
    """The slots of one cache: the arrays on the device, and which sequence is in which slot."""

    def __init__(self, batch: Batch, slots: int, expected: Sequence[_Sequence]) -> None:
        model = batch.model
        size = min(slots, sharding.round_up(len(expected), sharding.batch_parts(model.mesh)))
        self.mesh, self.rows_at_once = model.mesh, batch.rows_at_once
        self.rows: list[_Sequence | None] = [None] * size
        self.buckets: dict[int, int] = {}  # prompt tokens per chunk -> padded length, a program for each
        for length, chunk in (s.bucket for s in expected):
            self.buckets[chunk] = max(length, self.buckets.get(chunk, 0))
        capacity = max(s.capacity for s in expected)
        self.cache_config = batch.cache_config
        with sharding.using(model.mesh):
            self.cache = allocate(
                batch.cache_config, model.config, batch=size, tokens=capacity, implementation=model.implementation
            )
        self.vocabulary = None if batch.sampling.repetition_penalty is None else model.config.vocab_size
        self.slots = Slots.free(size, self.vocabulary)
        self.parts = (model.transformer, model.params, batch.method_params)
        self.choice = (jax.tree.map(np.float32, batch.sampling), padded_stop_ids(batch.ends))
        self.steps = STOP_STRING_STEPS if batch.stop else STEPS
        for chunk in self.buckets:  # compiles
            self._feed([], chunk)
        self._advance(waiting=False)

    def busy(self, beyond: int = 0) -> bool:
        """Whether a sequence of more than so many tokens is on its way."""
        return any(row is not None and row.capacity > beyond for row in self.rows)

    def takes(self, sequence: _Sequence) -> bool:
        """Whether there is a free slot, and a program that can feed it."""
        return None in self.rows and self._chunk(sequence) is not None

    def admit(self, waiting: deque[_Sequence]) -> Iterator[Answer]:
        """Takes sequences from the front, as many as can be fed together and have a slot."""
        chunk = self._chunk(waiting[0])
        assert chunk is not None
        room = min(self.rows.count(None), self.rows_at_once(chunk))
        arrivals = []
        while waiting and len(arrivals) < room and self._chunk(waiting[0]) == chunk:
            arrivals.append(waiting.popleft())
        tokens, logprobs = self._feed(arrivals, chunk)
        for sequence, token, logprob in zip(arrivals, tokens, logprobs, strict=False):
            sequence.transcript.push(int(token), float(logprob))
        yield from self._finished()

    def decode(self, *, waiting: bool) -> Iterator[Answer]:
        """Moves all sequences on, until one is finished if another is waiting for its slot."""
        made, tokens, logprobs = self._advance(waiting=waiting)
        for slot, row in enumerate(self.rows):
            if row is None:
                continue
            for i in range(made[slot] - len(row.transcript.tokens)):
                row.transcript.push(int(tokens[i, slot]), float(logprobs[i, slot]))
                if row.transcript.finish_reason is not None:  # a stop string; the device knows only of stop ids
                    break
        yield from self._finished()

    def _finished(self) -> Iterator[Answer]:
        for slot, row in enumerate(self.rows):
            if row is not None and row.transcript.finish_reason is not None:
                self.rows[slot] = None
                yield row.answer()

    def _chunk(self, sequence: _Sequence) -> int | None:
        """Tokens per chunk of the program that feeds it: its own, or a larger one that takes all of it at once."""
        size, own = len(sequence.tokens), sequence.bucket[1]
        fitting = [c for c, length in self.buckets.items() if size <= (length if c == own else c)]
        return min(fitting, default=None)

    def _placed(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """On a mesh, whole on every device."""
        return sharding.place(arrays, sharding.P(), self.mesh)

    def _feed(self, arrivals: list[_Sequence], chunk: int) -> tuple[Any, Any]:
        """Puts them into the first free slots. Returns the first tokens of their answers and the log-probabilities."""
        rows, free = self.rows_at_once(chunk), [slot for slot, row in enumerate(self.rows) if row is None]
        prompts = np.zeros((rows, self.buckets[chunk]), np.int32)
        lengths, targets = np.zeros(rows, np.int32), np.full(rows, len(self.rows), np.int32)
        new = Slots.free(rows, self.vocabulary)
        for i, (sequence, slot) in enumerate(zip(arrivals, free, strict=False)):
            self.rows[slot] = sequence
            lengths[i], targets[i] = len(sequence.tokens), slot
            prompts[i, : lengths[i]] = sequence.tokens
            new.limit[i], new.live[i], new.seed[i] = sequence.limit, True, sequence.seed
            if new.seen is not None:
                new.seen[i, sequence.tokens] = True
        slots, *inputs = self._placed((self.slots, prompts, lengths, new, targets, *self.choice))
        with sharding.using(self.mesh):
            self.slots, self.cache, new, logprobs = admit(
                *self.parts, slots, self.cache, *inputs, cache_config=self.cache_config, chunk=chunk
            )
        return jax.device_get((new.last, logprobs))

    def _advance(self, *, waiting: bool) -> tuple[Any, Any, Any]:
        """Returns how many tokens every slot has made, then the new ones [steps, B] and their log-probabilities."""
        live = np.asarray([row is not None for row in self.rows])
        slots, *inputs = self._placed((self.slots, live, np.bool_(waiting), *self.choice))
        with sharding.using(self.mesh):
            self.slots, self.cache, tokens, logprobs = decode(*self.parts, slots, self.cache, *inputs, steps=self.steps)
        return jax.device_get((self.slots.made, tokens, logprobs))
