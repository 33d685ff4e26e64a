"""`generate` and `stream`: prompts in, tokens and text out, over one compiled program (`generation.decoding`)."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import Cache, CacheBytes, allocate, cache_bytes, check_room
from xquant_jax.generation.decoding import Decoding, advance
from xquant_jax.generation.request import (
    STOP_STRING_STEPS,
    Completion,
    Prompt,
    Seed,
    _tokenize,
    answer_room,
    bucket_length,
    check_length,
    check_max_new_tokens,
    checked_seeds,
    checked_stops,
    padded_stop_ids,
)
from xquant_jax.generation.sampling import Sampling
from xquant_jax.generation.transcript import Transcript
from xquant_jax.model.loading import Model

STEPS = 256
"""The same without stop strings: while a program runs, nobody can interrupt it."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns. Times are wall-clock seconds; compiling is not part of prefill or decode.

    `implementation`: what decoding read the quantized history with, `xla` or the name of a kernel backend.
    """

    results: list[Completion]
    cache_bytes: CacheBytes
    implementation: str
    compile_s: float
    prefill_s: float
    decode_s: float

    def to_json(self) -> dict[str, Any]:
        sizes = dataclasses.asdict(self.cache_bytes) | {"total": self.cache_bytes.total}
        return dataclasses.asdict(self) | {"cache_bytes": sizes}


@dataclasses.dataclass(frozen=True)
class StreamedToken:
    """One token of one prompt, `index` in the list of prompts. `text` is what became certain with it, often a word."""

    index: int
    token: int
    logprob: float
    text: str
    finish_reason: str | None


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    cache: str | CacheConfig = "xquant:4",
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    seed: Seed = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    prefill_chunk: int | None = 512,
    cache_tokens: int | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continues every prompt (a text, or token ids taken as they are).

    cache: how the cache is stored, see `CacheConfig.parse`
    seed: one for all prompts, or one for each; an answer depends on its prompt and seed, not on the rest of the batch
    stop: strings that end an answer; they are not part of its text
    stop_ids: token ids that end an answer, by default the model's own; `[]` for none
    prefill_chunk: prompt tokens processed at once. Tokens of a chunk see each other exactly and earlier chunks
        through the cache, as the new tokens will; None takes the whole prompt at once and exactly
    cache_tokens: tokens per sequence that the cache holds, by default as many as the longest prompt and answer of
        the bucket can need: calls that share a program share its size
    mesh: devices to spread cache and work over (`make_mesh`), by default those that the model was loaded on; in a job
        of several processes each of them makes the same call and gets all results

    Raises `PromptError` for an empty prompt or a token id out of range, `CacheFullError` if `cache_tokens` is too
    small, `ConfigError` for an option that cannot be honoured.
    """
    batch = _Batch.prepare(
        model,
        prompts,
        cache=cache,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        stop_ids=stop_ids,
        prefill_chunk=prefill_chunk,
        cache_tokens=cache_tokens,
        mesh=mesh,
    )
    compile_s = batch.compile()
    start = time.perf_counter()
    batch.run(1)
    prefill_s = time.perf_counter() - start
    start = time.perf_counter()
    step = STOP_STRING_STEPS if stop else STEPS
    while batch.unfinished:
        batch.run(min(batch.step + step, max_new_tokens))
    decode_s = time.perf_counter() - start
    return Generation(
        batch.completions(), cache_bytes(batch.cache), batch.implementation, compile_s, prefill_s, decode_s
    )


def stream(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    cache: str | CacheConfig = "xquant:4",
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    seed: Seed = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    prefill_chunk: int | None = 512,
    cache_tokens: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[StreamedToken]:
    """The same as `generate`, token by token as they come; same arguments, same tokens, same compiled program."""
    batch = _Batch.prepare(
        model,
        prompts,
        cache=cache,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        stop_ids=stop_ids,
        prefill_chunk=prefill_chunk,
        cache_tokens=cache_tokens,
        mesh=mesh,
    )
    return batch.events()


@dataclasses.dataclass
class _Batch:
    """A batch in progress: the device's state and the host's transcripts."""

    prompts: list[str | list[int]]
    transcripts: list[Transcript]
    state: Decoding
    cache: Cache
    program: Callable[[Decoding, Cache, int], tuple[Decoding, Cache]]
    implementation: str

    @classmethod
    def prepare(
        cls,
        model: Model,
        prompts: Prompt | Sequence[Prompt],
        *,
        cache: str | CacheConfig,
        max_new_tokens: int,
        sampling: Sampling,
        seed: Seed,
        stop: Sequence[str],
        stop_ids: Sequence[int] | None,
        prefill_chunk: int | None,
        cache_tokens: int | None,
        mesh: Mesh | None,
    ) -> "_Batch":
        cache_config, sampling = CacheConfig.parse(cache), sampling.checked()
        asked, tokens = _tokenize(model, prompts)
        check_max_new_tokens(max_new_tokens)
        ends = checked_stops(model, stop, stop_ids)
        longest = max(map(len, tokens))
        check_length(longest + max_new_tokens)
        bucket, chunk = bucket_length(longest, prefill_chunk)
        if cache_tokens is not None:
            check_room(cache_tokens, longest + max_new_tokens - 1)

        size = len(tokens)
        model = model.on(mesh)
        if model.mesh is not None:
            sharding.check_batch(size, model.mesh)
        padded = np.zeros((size, bucket), np.int32)
        for row, ids in zip(padded, tokens, strict=True):
            row[: len(ids)] = ids
        seen = None
        if sampling.repetition_penalty is not None:
            seen = np.zeros((size, model.config.vocab_size), bool)
            for row, ids in zip(seen, tokens, strict=True):
                row[ids] = True
        room = answer_room(max_new_tokens)
        with sharding.using(model.mesh):
            kv = allocate(
                cache_config,
                model.config,
                batch=size,
                tokens=cache_tokens or bucket + room,
                implementation=model.implementation,
            )
        state = Decoding(
            prompts=padded,
            prompt_lengths=np.asarray([len(ids) for ids in tokens], np.int32),
            fed=np.int32(0),
            step=np.int32(0),
            tokens=np.zeros((size, room), np.int32),
            logprobs=np.zeros((size, room), np.float32),
            counts=np.zeros(size, np.int32),
            done=np.zeros(size, bool),
            seeds=np.asarray(checked_seeds(seed, size), np.int32),
            seen=seen,
        )
        method_params = model.method_params(cache_config)
        arrays = jax.tree.map(np.float32, sampling)
        ends_array = padded_stop_ids(ends)

        def program(state: Decoding, cache: Cache, limit: int) -> tuple[Decoding, Cache]:
            state, options = sharding.place((state, (arrays, ends_array, np.int32(limit))), sharding.P(), model.mesh)
            with sharding.using(model.mesh):
                return advance(model.transformer, model.params, method_params, state, cache, *options, chunk=chunk)

        transcripts = [Transcript(model.tokenizer, ids, frozenset(ends), stop, max_new_tokens) for ids in tokens]
        implementation = model.transformer.implementation_of(kv, method_params, model.dtype)
        return cls(asked, transcripts, state, kv, program, implementation)

    def compile(self) -> float:
        """Compiles the program, unless it was before, by running it on no prompt at all. Returns the seconds."""
        start = time.perf_counter()
        nothing = dataclasses.replace(
            self.state,
            prompt_lengths=np.zeros_like(self.state.prompt_lengths),
            done=np.ones_like(self.state.done),
        )
        _, self.cache = jax.block_until_ready(self.program(nothing, self.cache, 0))
        return time.perf_counter() - start

    @property
    def step(self) -> int:
        return int(self.state.step)

    @property
    def unfinished(self) -> bool:
        return any(t.finish_reason is None for t in self.transcripts)

    def run(self, limit: int) -> list[StreamedToken]:
        """Decodes until `limit` new tokens in all, and takes down what came."""
        before = [len(t.tokens) for t in self.transcripts]
        self.state, self.cache = self.program(self.state, self.cache, limit)
        counts, tokens, logprobs = jax.device_get((self.state.counts, self.state.tokens, self.state.logprobs))
        events = []
        for i, transcript in enumerate(self.transcripts):
            for at in range(before[i], counts[i]):
                if transcript.finish_reason is None:
                    token, logprob = int(tokens[i, at]), float(logprobs[i, at])
                    text = transcript.push(token, logprob)
                    events.append(StreamedToken(i, token, logprob, text, transcript.finish_reason))
        if self.unfinished:  # rows that a stop string ended; the device knows only of stop ids
            done = np.asarray([t.finish_reason is not None for t in self.transcripts])
            self.state = dataclasses.replace(self.state, done=done)
        return events

    def events(self) -> Iterator[StreamedToken]:
        self.compile()
        limit = 0
        while self.unfinished:
            limit += 1
            yield from self.run(limit)

    def completions(self) -> list[Completion]:
        return [
            Completion(
                prompt if isinstance(prompt, str) else list(prompt),
                t.text,
                t.tokens,
                t.logprobs,
                t.finish_reason or "",
            )
            for prompt, t in zip(self.prompts, self.transcripts, strict=True)
        ]
