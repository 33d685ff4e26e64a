"""The one loop from requests to answers: `generate`, `stream` and `batch` run on it.

An engine has a cache of slots. Requests are submitted at any time, wait in a queue, take a slot when one is free, and
are moved on by `step`; their answers are told as they grow. It knows nothing of memory, order and files.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from xquant_jax import sharding
from xquant_jax.cache.rows import clear_rows
from xquant_jax.cache.state import allocate, check_room
from xquant_jax.errors import ConfigError
from xquant_jax.generation.answer import Drafted
from xquant_jax.generation.buckets import bucket_length, rows_at_once
from xquant_jax.generation.decode import STEPS, advance
from xquant_jax.generation.prefill import admit, feed
from xquant_jax.generation.request import CheckedRequest, Options, Request, checked
from xquant_jax.generation.sampling import Chosen
from xquant_jax.generation.sequence import Progress, Sequence
from xquant_jax.generation.slots import Arrivals, Slots
from xquant_jax.generation.transcript import Transcript
from xquant_jax.model.loading import Model
from xquant_jax.speculation import Speculation

STOP_STRING_STEPS = 16
"""Tokens decoded on the device between two looks for stop strings on the host."""

STOP_IDS = 8
"""Stop ids come in multiples of so many, so that another number of them compiles nothing."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """A program that ran, and what it made, not taken down yet: token number i of the sequence in `slot` is that of
    row i - `origin` and column `column` of `chosen`."""

    chosen: Chosen
    slots: Slots  # after it
    columns: list[tuple[int, Sequence, int, int]]  # slot, sequence, column, origin


class Engine:
    """Requests in, answers out, `slots` at a time, each sequence of up to `tokens` tokens.

    An answer depends on its request only, not on what runs beside it (but for rounding: with a quantized cache a code
    on the edge can round otherwise). It holds no state beside its own: several may run in threads of their own, each
    called from one of them.

    in_place: prompts are fed straight into the rows of their slots, all that wait at once; else into a small cache of
        their own, which pays where slots are refilled one by one
    keep: a prompt that begins with all that its slot still holds of the sequence before goes on from there, as the
        turns of a conversation do; needs `in_place`

    Raises `ConfigError` for options that cannot be honoured.
    """

    def __init__(
        self, model: Model, options: Options, *, slots: int, tokens: int, in_place: bool = False, keep: bool = False
    ) -> None:
        options = options.checked()
        self.model = model = model.on(options.mesh)
        self.cache_config, self.prefill_chunk, self.in_place = options.cache_config, options.prefill_chunk, in_place
        self.speculation = Speculation.parse(options.speculate)
        if model.mesh is not None:
            sharding.check_batch(slots, model.mesh, "prompts" if in_place else "slots")
        self.method_params = model.method_params(self.cache_config)
        with sharding.using(model.mesh):
            self.cache = allocate(
                self.cache_config, model.config, batch=slots, tokens=tokens, implementation=model.implementation
            )
        self.implementation = model.transformer.implementation_of(self.cache, self.method_params, model.dtype)
        self._stops = STOP_IDS
        looks_up = self.speculation is not None and self.speculation.kind == "lookup"
        self._text = self.cache.capacity + 1 if looks_up else 0  # tokens of a sequence, the last of them not stored
        self._slots = Slots.free(slots, model.config.vocab_size, self._stops, self._text)
        self._rows: list[Sequence | None] = [None] * slots
        self._queue: deque[Sequence] = deque()
        self._keep = keep and in_place
        self._kept: dict[int, list[int]] = {}  # slot -> tokens that its cache holds of a sequence that is finished
        self._buckets: dict[int, int] = {}  # prompt tokens per chunk -> padded length, a program for each
        self._run: _Run | None = None
        self._news: dict[int, Progress] = {}
        self._ids = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or on its way."""
        return bool(self._queue) or any(row is not None for row in self._rows)

    @property
    def free_slots(self) -> int:
        """Slots that nobody has, less the requests that wait for one."""
        return self._rows.count(None) - len(self._queue)

    def running(self) -> list[CheckedRequest]:
        """The requests that are waiting or on their way."""
        return [s.request for s in (*self._rows, *self._queue) if s is not None]

    def fits(self, request: CheckedRequest) -> bool:
        """Whether the cache can hold it, and a program that there is already can feed it."""
        return request.capacity <= self.cache.capacity and self._chunk_for(len(request.tokens)) is not None

    def compile(self, requests: Iterable[CheckedRequest]) -> None:
        """Compiles what these requests need, unless it was before, by running it on none. Others may come as well, and
        compile what they need when their turn comes."""
        for request in sorted(requests, key=lambda r: len(r.tokens), reverse=True):
            self._reserve(request, own=not self.in_place)
        for chunk in self._buckets:
            self._feed([], chunk)
        self._advance(steps=0)
        self._run = None
        jax.block_until_ready(self.cache)

    def submit(self, request: Request | CheckedRequest) -> int:
        """Queues a request for one answer; returns the id that its progress is told under, counting from 0.

        Raises `PromptError` or `ConfigError` for what cannot be honoured, `CacheFullError` for a sequence that the
        cache cannot hold.
        """
        if isinstance(request, Request):
            request = checked(self.model, request)
        if request.n != 1:
            raise ConfigError(f"n={request.n}: an engine gives one answer to a request; submit those of `Repeats.of`")
        check_room(self.cache.capacity, request.capacity)
        sequence = Sequence(next(self._ids), request, Transcript(self.model.tokenizer, request))
        self._queue.append(sequence)
        return sequence.id

    def cancel(self, id: int) -> bool:
        """Ends a request without an answer; its slot is free at the next step. False if it is not on its way."""
        self._take_down()
        self._news.pop(id, None)
        for row, sequence in enumerate(self._rows):
            if sequence is not None and sequence.id == id:
                self._free(row, sequence)
                return True
        before = len(self._queue)
        self._queue = deque(sequence for sequence in self._queue if sequence.id != id)
        return len(self._queue) < before

    def step(self, limit: int | None = None, *, hurry: bool = False) -> list[Progress]:
        """Feeds those who wait into free slots, then decodes at most `limit` tokens for every request.

        Decoding stops early when a slot is freed that somebody waits for, in the queue or, to `hurry`, elsewhere. How
        much is decoded at most is bounded anyway (`STEPS`), so that one step never takes long.

        If it is interrupted (Ctrl-C) while it waits for the device, the next step goes on where it was.
        """
        self._take_down()
        stops = any(request.stop for request in self.running())
        steps = min(STOP_STRING_STEPS if stops else STEPS, STEPS if limit is None else limit)
        arrivals, chunk = self._next()
        steps -= bool(arrivals)
        while arrivals:
            self._feed(arrivals, chunk)
            self._take_down()
            if hurry and any(progress.completion for progress in self._news.values()):
                steps = 0
            arrivals, chunk = self._next()
        if steps and any(row is not None for row in self._rows):
            self._advance(steps=steps, hurry=hurry)
            self._take_down()
        news, self._news = self._news, {}
        return list(news.values())

    def _chunk_for(self, size: int) -> int | None:
        """Tokens per chunk of the program that feeds a prompt: its own, or a larger one that takes it all at once."""
        own = bucket_length(size, self.prefill_chunk)[1]
        fitting = [c for c, length in self._buckets.items() if size <= (length if c == own else c)]
        return min(fitting, default=None)

    def _reserve(self, request: CheckedRequest, *, kept: int = 0, own: bool = False) -> int:
        """Sees to it that there is a program for a request less the tokens that are kept, one for its own bucket if
        told so. Returns its chunk."""
        size = len(request.tokens) - kept
        length, bucket = bucket_length(size, self.prefill_chunk)
        chunk = bucket if own else self._chunk_for(size)
        if chunk is None or own:
            chunk = bucket
            self._buckets[chunk] = max(length, self._buckets.get(chunk, 0))
        stops = sharding.round_up(max(len(request.stop_ids), 1), STOP_IDS)
        if stops > self._stops:
            asked, more = self._slots.asked, ((0, 0), (0, stops - self._stops))
            wider = dataclasses.replace(asked, stop_ids=np.pad(asked.stop_ids, more, constant_values=-1))
            self._slots, self._stops = dataclasses.replace(self._slots, asked=wider), stops
        return chunk

    def _next(self) -> tuple[list[tuple[int, Sequence]], int]:
        """Who is fed next and into which slots, as many of the queue as one program takes; and its chunk."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        if not free or not self._queue:
            return [], 0
        waiting = list(itertools.islice(self._queue, len(free)))
        if self.in_place:
            arrivals = list(zip(free, waiting, strict=False))
            return arrivals, max(self._reserve(s.request, kept=self._kept_of(slot, s)) for slot, s in arrivals)
        chunk = self._reserve(waiting[0].request)
        alike = itertools.takewhile(lambda s: self._reserve(s.request) == chunk, waiting)
        return list(zip(free, alike, strict=False))[: rows_at_once(chunk, self.model.mesh)], chunk

    def _kept_of(self, slot: int, sequence: Sequence) -> int:
        """Tokens of the prompt that a slot still holds: all that it holds, or none."""
        kept, tokens = self._kept.get(slot, []), sequence.request.tokens
        return len(kept) if len(kept) < len(tokens) and tokens[: len(kept)] == kept else 0

    def _feed(self, arrivals: list[tuple[int, Sequence]], chunk: int) -> None:
        """Feeds them into the rows of their slots, or into a small cache and from there into their slots."""
        fed, nowhere = dict(arrivals), len(self._rows)
        if self.in_place:
            targets = list(range(nowhere))
        else:
            targets = [*fed, *[nowhere] * (rows_at_once(chunk, self.model.mesh) - len(fed))]
        requests = [fed[slot].request if slot in fed else None for slot in targets]
        kept = [self._kept_of(slot, fed[slot]) if slot in fed else 0 for slot in targets]
        there = Arrivals.of(requests, self._buckets[chunk], self._stops, kept, self._text)
        columns = [(slot, fed[slot], column, 0) for column, slot in enumerate(targets) if slot in fed]
        if self.in_place:
            live = np.asarray([row is not None or slot in fed for slot, row in enumerate(self._rows)])
            self._kept = {}  # rows that take no part give up what they hold
            self._launch(feed, (there, live), {"chunk": chunk}, columns)
        else:
            sizes = {"cache_config": self.cache_config, "chunk": chunk}
            self._launch(admit, (there, np.asarray(targets, np.int32)), sizes, columns)

    def _advance(self, *, steps: int, hurry: bool = False) -> None:
        """Moves all sequences on."""
        live, waiting = np.asarray([row is not None for row in self._rows]), hurry or bool(self._queue)
        columns = [
            (slot, row, slot, len(row.transcript.tokens)) for slot, row in enumerate(self._rows) if row is not None
        ]
        self._kept = {}  # rows that take no part give up what they hold
        inputs = live, np.int32(steps), np.bool_(waiting)
        self._launch(advance, inputs, {"speculation": self.speculation}, columns)

    def _launch(self, program: Any, inputs: tuple[Any, ...], sizes: dict[str, Any], columns: list[Any]) -> None:
        """Runs a program that takes the slots and the cache and gives them back."""
        model = self.model
        slots, *inputs_there = sharding.place((self._slots, *inputs), sharding.P(), model.mesh)
        parts = (model.transformer, model.params, self.method_params)
        with sharding.using(model.mesh):
            self._slots, self.cache, chosen = program(*parts, slots, self.cache, *inputs_there, **sizes)
        self._run = _Run(chosen, self._slots, columns)

    def _take_down(self) -> None:
        """Takes down what the last program made. Done twice, or interrupted and done again, it changes nothing more."""
        if self._run is None:
            return
        run, chosen, columns = self._run, self._run.chosen, self._run.columns
        top_asked = any(sequence.request.logprobs for _, sequence, *_ in columns)
        top = (chosen.top_tokens, chosen.top_logprobs) if top_asked else None
        slots = run.slots
        counters = slots.made, slots.failed, slots.steps, slots.drafted, slots.accepted
        (made, failed, *drafted), tokens, logprobs, top = jax.device_get(
            (counters, chosen.tokens, chosen.logprobs, top)
        )
        for slot, sequence, column, origin in columns:
            if sequence in self._queue:
                self._rows[slot] = sequence
                self._queue.remove(sequence)
            if self._rows[slot] is not sequence:  # cancelled
                continue
            transcript, news = sequence.transcript, self._news.setdefault(sequence.id, Progress(sequence.id))
            for number in range(len(transcript.tokens), made[slot]):
                at = number - origin, column
                text = transcript.push(int(tokens[at]), float(logprobs[at]), _pairs(top, at, sequence.request))
                news.texts.append(text)
                news.tokens.append(int(tokens[at]))
                news.logprobs.append(float(logprobs[at]))
                if transcript.finish_reason is not None:  # a stop string; the device knows only of stop ids
                    break
            if failed[slot] and transcript.finish_reason is None:
                news.rest = transcript.fail(sequence.not_finite(self.model.dtype))
            if transcript.finish_reason is not None:
                counts = None if self.speculation is None else Drafted(*(int(count[slot]) for count in drafted))
                news.completion = sequence.completion(counts)
                self._free(slot, sequence, whole=bool(len(transcript.tokens) == made[slot] and not failed[slot]))
        if failed.any():
            with sharding.using(self.model.mesh):
                self.cache = clear_rows(self.cache, sharding.place(failed, sharding.P(), self.model.mesh))
        self._run = None

    def _free(self, slot: int, sequence: Sequence, *, whole: bool = True) -> None:
        """Gives a slot up. `whole`: its cache holds what the sequence says, no less and no more."""
        self._rows[slot] = None
        if self._keep and whole and sequence.transcript.tokens:
            self._kept[slot] = sequence.stored


def _pairs(top: Any, at: tuple[int, int], request: CheckedRequest) -> list[tuple[int, float]] | None:
    """As many of the likeliest tokens as a request asks for, with their log-probabilities."""
    if not request.logprobs:
        return None
    tokens, logprobs = (a[at][: request.logprobs].tolist() for a in top)
    return list(zip(tokens, logprobs, strict=True))
