"""The one loop from requests to answers: `generate`, `stream` and `batch` run on it.

An engine has a cache of slots. Requests are submitted at any time, wait in a queue, take a slot when one is free, and
are moved on by `step`; their answers are told as they grow. It knows nothing of memory, order and files.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from xquant_jax import sharding
from xquant_jax.cache.state import CacheBytes, cache_bytes
from xquant_jax.errors import ConfigError
from xquant_jax.generation.answer import Drafted
from xquant_jax.generation.decode import STEPS
from xquant_jax.generation.prefix import check_begins
from xquant_jax.generation.request import CheckedRequest, Options, Request, checked
from xquant_jax.generation.runner import Arrival, Runner
from xquant_jax.generation.sampling import Chosen
from xquant_jax.generation.sequence import Progress, Sequence
from xquant_jax.generation.sharing import Sharing
from xquant_jax.generation.slots import Slots
from xquant_jax.generation.transcript import Transcript
from xquant_jax.model.loading import Model
from xquant_jax.numerics.packing import BLOCK

NOTHING = Sharing()
"""Every request has a cache of its own."""

STOP_STRING_STEPS = 16
"""Tokens decoded on the device between two looks for stop strings on the host."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """A program that ran, and what it made, not taken down yet: token number i of the sequence in `slot` is that of
    row i - `origin` and column `column` of `chosen`."""

    chosen: Chosen
    slots: Slots  # after it
    columns: list[tuple[int, Sequence, int, int]]  # slot, sequence, column, origin


class Engine:
    """Requests in, answers out, `slots` at a time, each sequence of up to `tokens` tokens beside what is shared.

    An answer depends on its request only, not on what runs beside it (but for rounding: with a quantized cache a code
    on the edge can round otherwise). It holds no state beside its own: several may run in threads of their own, each
    called from one of them.

    in_place: prompts are fed straight into the rows of their slots, all that wait at once; else into a small cache of
        their own, which pays where slots are refilled one by one
    keep: a prompt that begins with all that its slot still holds of the sequence before goes on from there, as the
        turns of a conversation do; needs `in_place`
    sharing: what is stored once for several requests; samples and what is found need prompts that are not fed in place.
        Requests with the same prompt that wait one after another are samples

    Raises `ConfigError` for options that cannot be honoured.
    """

    def __init__(
        self,
        model: Model,
        options: Options,
        *,
        slots: int,
        tokens: int,
        in_place: bool = False,
        keep: bool = False,
        sharing: Sharing = NOTHING,
    ) -> None:
        options = options.checked()
        self.model = model = model.on(options.mesh)
        if model.mesh is not None:
            sharding.check_batch(slots, model.mesh, "prompts" if in_place else "slots")
        self._runner = Runner(model, options, slots=slots, tokens=tokens, in_place=in_place, sharing=sharing)
        self._rows: list[Sequence | None] = [None] * slots
        self._shared: list[set[int]] = [set() for _ in range(sharing.prompts)]  # slots that read each shared row
        self._queue: deque[Sequence] = deque()
        self._keep = keep and in_place
        self._kept: dict[int, list[int]] = {}  # slot -> tokens that its cache holds of a sequence that is finished
        self._run: _Run | None = None
        self._news: dict[int, Progress] = {}
        self._ids = itertools.count()

    @property
    def cache_bytes(self) -> CacheBytes:
        """Allocated bytes of all that is stored."""
        runner = self._runner
        stored = (runner.cache, runner.prefix, runner.store)
        return sum((cache_bytes(one) for one in stored if one is not None), start=CacheBytes(0, 0, 0, 0))

    @property
    def implementation(self) -> str:
        """What decoding reads the quantized history with."""
        return self._runner.implementation

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
        return self._runner.fits(request)

    def compile(self, requests: Iterable[CheckedRequest]) -> None:
        """Compiles what these requests need, unless it was before, by running it on none. Others may come as well, and
        compile what they need when their turn comes."""
        self._runner.compile(requests)

    def submit(self, request: Request | CheckedRequest) -> int:
        """Queues a request for one answer; returns the id that its progress is told under, counting from 0.

        Raises `PromptError` or `ConfigError` for what cannot be honoured, `CacheFullError` for a sequence that the
        cache cannot hold.
        """
        if isinstance(request, Request):
            request = checked(self.model, request)
        if request.n != 1:
            raise ConfigError(f"n={request.n}: an engine gives one answer to a request; submit those of `Repeats.of`")
        if (prefix := self._runner.sharing.prefix) is not None:
            check_begins(prefix, request)
        self._runner.check_room(request)
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

    def _next(self) -> tuple[list[tuple[Arrival, list[Sequence]]], int]:
        """Who is fed next and into which slots, as many of the queue as one program takes; and its chunk."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        rows = [row for row, slots in enumerate(self._shared) if not slots]
        runner, arrivals, chunk, saved = self._runner, [], 0, set()
        for group in self._groups():
            first = group[0].request
            kept, load = runner.origin, []
            if runner.in_place:
                kept = max(kept, self._kept_of(free[0], group[0])) if free else kept
            elif runner.found is not None:
                load, keys = runner.found.lookup(first.tokens), list(runner.found.keys(first.tokens))
                kept += BLOCK * len(load)
                if saved & set(keys[len(load) :]):  # it finds more once those before it are stored
                    break
                saved |= set(keys)
            taken = group[: len(free)]
            waits = len(taken) < len(group) and 2 * len(taken) < len(self._rows)  # so that few feed the prompt again
            if not taken or waits or (self._shared and not rows):
                break
            own = runner.reserve(first, kept=kept)
            if runner.in_place:
                chunk = max(chunk, own)
            elif arrivals and (own != chunk or len(arrivals) == runner.at_once(chunk)):
                break
            else:
                chunk = own
            slots, free = free[: len(taken)], free[len(taken) :]
            row = rows.pop(0) if rows else 0
            arrivals.append((Arrival([s.request for s in taken], slots, row, kept, load), taken))
        return arrivals, chunk

    def _groups(self) -> Iterator[list[Sequence]]:
        """Those who wait, in order: as many with the same prompt as share its blocks together."""
        most, origin = min(self._runner.sharing.samples, len(self._rows)), self._runner.origin
        for tokens, alike in itertools.groupby(self._queue, key=lambda s: s.request.tokens):
            while group := list(itertools.islice(alike, most if len(tokens) - origin >= BLOCK else 1)):
                yield group

    def _kept_of(self, slot: int, sequence: Sequence) -> int:
        """Tokens of the prompt that a slot still holds: all that it holds, or none."""
        kept, tokens = self._kept.get(slot, []), sequence.request.tokens
        return len(kept) if len(kept) < len(tokens) and tokens[: len(kept)] == kept else 0

    def _feed(self, arrivals: list[tuple[Arrival, list[Sequence]]], chunk: int) -> None:
        """Feeds them into the rows of their slots, or into a small cache and from there into their slots."""
        fed = {slot: s for arrival, group in arrivals for slot, s in zip(arrival.slots, group, strict=True)}
        for arrival, group in arrivals:
            for sequence in group:
                sequence.cached = arrival.kept
        live = np.asarray([row is not None or slot in fed for slot, row in enumerate(self._rows)])
        self._kept = {}  # rows that take no part give up what they hold
        chosen = self._runner.feed([arrival for arrival, _ in arrivals], chunk, live)
        columns = self._runner.columns([arrival for arrival, _ in arrivals])
        self._run = _Run(chosen, self._runner.slots, [(slot, s, columns[slot], 0) for slot, s in fed.items()])
        for arrival, _ in arrivals:
            if self._shared:
                self._shared[arrival.row] = set(arrival.slots)

    def _advance(self, *, steps: int, hurry: bool = False) -> None:
        """Moves all sequences on."""
        live = np.asarray([row is not None for row in self._rows])
        columns = [
            (slot, row, slot, len(row.transcript.tokens)) for slot, row in enumerate(self._rows) if row is not None
        ]
        self._kept = {}  # rows that take no part give up what they hold
        chosen = self._runner.advance(live, steps=steps, waiting=hurry or bool(self._queue))
        self._run = _Run(chosen, self._runner.slots, columns)

    def _take_down(self) -> None:
        """Takes down what the last program made. Done twice, or interrupted and done again, it changes nothing more."""
        if self._run is None:
            return
        run, chosen, columns = self._run, self._run.chosen, self._run.columns
        top_asked = any(sequence.request.logprobs for _, sequence, *_ in columns)
        top = (chosen.top_tokens, chosen.top_logprobs) if top_asked else None
        counters = [getattr(run.slots, name) for name in ("made", "failed", "steps", "drafted", "accepted")]
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
                news.add(int(tokens[at]), float(logprobs[at]), text)
                if transcript.finish_reason is not None:  # a stop string; the device knows only of stop ids
                    break
            if failed[slot] and transcript.finish_reason is None:
                if self._runner.found is not None and not transcript.tokens:
                    self._runner.found.forget(sequence.request.tokens)
                news.rest = transcript.fail(sequence.not_finite(self.model.dtype))
            if transcript.finish_reason is not None:
                counts = None if self._runner.speculation is None else Drafted(*(int(count[slot]) for count in drafted))
                news.completion = sequence.completion(counts)
                self._free(slot, sequence, whole=bool(len(transcript.tokens) == made[slot] and not failed[slot]))
        if failed.any():
            self._runner.clear(failed)
        self._run = None

    def _free(self, slot: int, sequence: Sequence, *, whole: bool = True) -> None:
        """Gives a slot up. `whole`: its cache holds what the sequence says, no less and no more."""
        self._rows[slot] = None
        for slots in self._shared:
            slots.discard(slot)
        if self._keep and whole and sequence.transcript.tokens:
            self._kept[slot] = sequence.stored


def _pairs(top: Any, at: tuple[int, int], request: CheckedRequest) -> list[tuple[int, float]] | None:
    """As many of the likeliest tokens as a request asks for, with their log-probabilities."""
    if not request.logprobs:
        return None
    tokens, logprobs = (a[at][: request.logprobs].tolist() for a in top)
    return list(zip(tokens, logprobs, strict=True))
