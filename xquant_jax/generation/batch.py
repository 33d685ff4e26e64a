"""Offline batches: many requests through engines whose slots are kept full.

What is decided here is order and memory. All requests are read first if they are a list or a memory is given: longer
sequences then come first, and with a budget of memory shorter ones get an engine with more and smaller slots. From an
iterator requests are read as slots are freed. Files are the business of `xquant_jax.generation.batch_files`.
"""

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence

import jax

from xquant_jax import sharding
from xquant_jax.cache.state import allocate, cache_bytes, check_room
from xquant_jax.errors import XQuantError
from xquant_jax.generation.answer import Answer, Completion
from xquant_jax.generation.buckets import bucket_length, rows_at_once
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.prefix import Prefix, check_begins, check_prefix, quantum
from xquant_jax.generation.request import CheckedRequest, Options, Repeats, Request, checked
from xquant_jax.generation.sharing import Plan, plan_sharing
from xquant_jax.model.loading import Model
from xquant_jax.numerics.packing import BLOCK

DEFAULT_SLOTS = 8

SMALL = 512
"""Tokens of a sequence up to which slots are not made smaller: most of one is its window and its last block."""


def prepare(model: Model, options: Options = Options(), prefix: Prefix | None = None) -> "Batch":
    """A batch with these options; `Batch.answers` runs it.

    It has 8 slots if neither their number nor a memory is given. Without a mesh what prompts have in common is stored
    once: all their blocks where several answers are asked for, and beginnings of `quantum` tokens and more that a later
    prompt has too.

    prefix: what all prompts begin with, stored by `prefill`; the prompts are given whole

    Raises `ConfigError` for an option that cannot be honoured.
    """
    options = options.checked()
    model = model.on(options.mesh)
    if model.mesh is not None and options.slots is not None:
        sharding.check_batch(options.slots, model.mesh, "slots")
    model.method_params(options.cache_config)  # raises here for what the model lacks
    if prefix is not None:
        check_prefix(prefix, model, options)
    return Batch(model, options, prefix)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A model and the options of a run, checked; see `prepare`."""

    model: Model
    options: Options
    prefix: Prefix | None = None

    def answers(self, requests: Iterable[Request], *, answered: Collection[int] = ()) -> Iterator[Answer]:
        """Answers every request, in the order in which they finish, but for those `answered`, by their number from 0.

        An answer is the one that `generate` gives to the same request, whatever runs beside it (but for rounding: with
        a quantized cache a code on the edge can round otherwise). A request that cannot be honoured (an empty prompt, a
        token id out of range, a sequence that the memory cannot hold) gets an `Answer` with an error.

        Every process of a `jax.distributed` job may run this with the same arguments: what is admitted when depends on
        nothing else.
        """
        return _Run(self, requests, answered).answers()


class _Run:
    """The requests of one call: those that are still to be read, and those that wait for an engine."""

    def __init__(self, batch: Batch, requests: Iterable[Request], answered: Collection[int]) -> None:
        model, options = batch.model, batch.options
        self.model, self.options, self.prefix, self.answered = model, options, batch.prefix, answered
        self.parts = sharding.batch_parts(model.mesh)
        self.slots = options.slots or sharding.round_up(DEFAULT_SLOTS, self.parts)
        self.source = enumerate(requests)
        self.reads_all = isinstance(requests, Sequence) or options.memory is not None
        self.waiting: deque[tuple[int, CheckedRequest]] = deque()  # one for every answer
        self.repeats = Repeats()
        self.open: dict[int, dict[int, Completion | None]] = {}  # of a request, by repeat

    def answers(self) -> Iterator[Answer]:
        while True:
            yield from self.read()
            if not self.waiting:
                return
            self.waiting = deque(sorted(self.waiting, key=lambda entry: entry[1].capacity, reverse=True))
            longest = self.waiting[0][1].capacity
            shorter, slots = 0, self.slots
            if self.options.memory is not None and longest > SMALL:  # half as long: smaller slots, and more of them
                shorter = 2 ** (longest.bit_length() - 1) - 1
            expected = [request for _, request in self.waiting if request.capacity > shorter]
            if self.options.memory is not None:
                slots = self.slots_within(self.options.memory, expected)
            if slots:
                yield from self.drain(self.engine(slots, expected), shorter)
            else:
                yield self.too_large(expected)

    def read(self) -> Iterator[Answer]:
        """Reads requests, as many as there are slots if not all, and answers those that cannot be honoured."""
        while self.reads_all or len(self.waiting) < self.slots:
            index, request = next(self.source, (None, None))
            if index is None or request is None:
                return
            try:
                checked_request, tokens = checked(self.model, request), self.options.cache_tokens
                if self.prefix is not None:
                    check_begins(self.prefix, checked_request)
                if tokens is not None:
                    check_room(tokens, checked_request.capacity)
                several = self.repeats.of(checked_request)
                if index not in self.answered:
                    self.open[index] = dict.fromkeys(one.repeat for one in several)
                    self.waiting += [(index, one) for one in several]
            except XQuantError as error:
                if index not in self.answered:
                    yield Answer(index, error=str(error))

    def engine(self, slots: int, expected: Sequence[CheckedRequest]) -> Engine:
        """An engine that the expected requests fit, with its programs compiled."""
        size = min(slots, sharding.round_up(len(expected), self.parts))
        plan = self.plan(size, expected)
        sharing = dataclasses.replace(plan.sharing, found=self.found_within(self.options.memory, size, expected))
        engine = Engine(self.model, self.options, slots=size, tokens=plan.tokens, sharing=sharing)
        engine.compile(expected)
        return engine

    def drain(self, engine: Engine, shorter: int) -> Iterator[Answer]:
        """Answers the requests at the front that need more than `shorter` tokens.

        Others are taken only to keep slots busy for as long as one of those is on its way.
        """
        sent: dict[int, tuple[int, int]] = {}
        while True:
            while engine.free_slots > 0:
                yield from self.read()
                if not self.waiting or not engine.fits(self.waiting[0][1]):
                    break
                if self.waiting[0][1].capacity <= shorter >= max((r.capacity for r in engine.running()), default=0):
                    break
                index = self.waiting[0][0]
                while self.waiting and self.waiting[0][0] == index:  # all answers to it, which share what they can
                    _, request = self.waiting.popleft()
                    sent[engine.submit(request)] = index, request.repeat
            if not engine.busy:
                return
            for progress in engine.step(hurry=bool(self.waiting)):
                if progress.completion is not None:
                    yield from self.finished(*sent.pop(progress.id), progress.completion)

    def finished(self, index: int, repeat: int, completion: Completion) -> Iterator[Answer]:
        """Takes one completion; the answer to its request, once it has all of them."""
        several = self.open[index]
        several[repeat] = completion
        whole = tuple(one for one in several.values() if one is not None)
        if len(whole) == len(several):
            del self.open[index]
            yield Answer(index, whole)

    def too_large(self, expected: Sequence[CheckedRequest]) -> Answer:
        """The answer to the request at the front, which is taken away: no engine can be made for it."""
        need, (index, request) = self.bytes_of(1, expected), self.waiting[0]
        self.waiting = deque(entry for entry in self.waiting if entry[0] != index)
        return Answer(
            index,
            error=f"{request.capacity} tokens take a cache of {need} bytes, and memory={self.options.memory} is all "
            f"there is; raise it, or shorten the prompt or max_new_tokens",
        )

    def plan(self, slots: int, expected: Sequence[CheckedRequest]) -> Plan:
        """How these requests lie in an engine of so many slots."""
        return plan_sharing(expected, slots, self.options, self.prefix, alone=self.model.mesh is None)

    def slots_within(self, memory: int, expected: Sequence[CheckedRequest]) -> int:
        """Slots for these requests that the memory holds."""
        one, two = (self.bytes_of(slots * self.parts, expected) for slots in (1, 2))
        slots = max(0, 1 + (memory - one) // max(1, two - one))
        while slots and self.bytes_of(slots * self.parts, expected) > memory:  # what is shared does not grow evenly
            slots -= 1
        return self.parts * slots

    def found_within(self, memory: int | None, slots: int, expected: Sequence[CheckedRequest]) -> int:
        """Blocks that are kept for later prompts: as many as help, or as these slots leave memory for."""
        wanted = self.plan(slots, expected).sharing.found
        if memory is None or not wanted:
            return wanted
        one, two = (self.bytes_of(slots, expected, blocks) for blocks in (1, 2))
        blocks = min(wanted, 1 + (memory - one) // (two - one))
        return blocks if blocks * BLOCK >= quantum(self.options) else 0

    def bytes_of(self, slots: int, expected: Sequence[CheckedRequest], found: int = 0) -> int:
        """Bytes of so many slots for these requests, of what they share, of blocks that are kept for later ones, and of
        the largest small cache that prompts are fed into."""
        plan = self.plan(slots, expected)
        sharing, longest = plan.sharing, max(plan.tokens, plan.sharing.tokens)
        whole = self.model.mesh is not None or found > 0
        buckets = {bucket_length(len(r.tokens) - plan.origin, self.options.prefill_chunk) for r in expected}
        feeding = max(
            self.bytes_of_cache(rows_at_once(chunk, self.model.mesh), longest if whole else length)
            for length, chunk in buckets
        )
        shared = self.bytes_of_cache(sharing.prompts, sharing.tokens) if sharing.prompts else 0
        kept = self.bytes_of_cache(found, BLOCK) if found else 0
        return feeding + self.bytes_of_cache(slots, plan.tokens) + shared + kept

    def bytes_of_cache(self, batch: int, tokens: int) -> int:
        with sharding.using(self.model.mesh):
            shapes = jax.eval_shape(
                lambda: allocate(self.options.cache_config, self.model.config, batch=batch, tokens=tokens)
            )
        return cache_bytes(shapes).total
