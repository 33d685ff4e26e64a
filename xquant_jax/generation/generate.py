"""`generate` and `stream`: prompts in, tokens and text out, over one compiled program (`xquant_jax.generation.decoding`)."""

import dataclasses
import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import Cache, CacheBytes, allocate, cache_bytes, check_room
from xquant_jax.errors import ConfigError, PromptError
from xquant_jax.generation.decoding import Decoding, advance
from xquant_jax.generation.sampling import Sampling
from xquant_jax.generation.transcript import Transcript
from xquant_jax.model.loading import Model

Prompt = str | Sequence[int] | np.ndarray | jax.Array
Seed = int | np.integer | Sequence[int]

STOP_STRING_STEPS = 16
"""Tokens decoded on the device between two looks for stop strings on the host."""

STEPS = 256
"""The same without stop strings: while a program runs, nobody can interrupt it."""

SMALLEST_BUCKET = 16
"""Tokens that the shortest prompts are padded to."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt's answer. `tokens` are the new ones, `logprobs` theirs under the model itself (natural log)."""

    prompt: str | list[int]
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop": a stop token or string; "length": max_new_tokens


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
            kv = allocate(cache_config, model.config, batch=size, tokens=cache_tokens or bucket + room)
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
        factors = model.factors(cache_config)
        arrays = jax.tree.map(np.float32, sampling)
        ends_array = padded_stop_ids(ends)

        def program(state: Decoding, cache: Cache, limit: int) -> tuple[Decoding, Cache]:
            state, options = sharding.place((state, (arrays, ends_array, np.int32(limit))), sharding.P(), model.mesh)
            with sharding.using(model.mesh):
                return advance(model.transformer, model.params, factors, state, cache, *options, chunk=chunk)

        transcripts = [Transcript(model.tokenizer, ids, frozenset(ends), stop, max_new_tokens) for ids in tokens]
        implementation = model.transformer.implementation_of(kv, factors, model.dtype)
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


def bucket_length(longest: int, prefill_chunk: int | None) -> tuple[int, int]:
    """Length that prompts are padded to, and prompt tokens per chunk; the chunk divides the length.

    Powers of two up to the chunk, then eight steps per doubling: few programs to compile, little cache wasted.
    """
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ConfigError(f"prefill_chunk={prefill_chunk} is not possible; choose 1 or more, or None for no chunks")
    power = max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
    if prefill_chunk is None or power <= prefill_chunk:
        return power, power
    chunks = -(-longest // prefill_chunk)
    step = max(1, (1 << (chunks - 1).bit_length()) // 16)
    return -(-chunks // step) * step * prefill_chunk, prefill_chunk


def answer_room(max_new_tokens: int) -> int:
    """Places for new tokens: a power of two, at least 16, up to 512, then whole 512s."""
    if max_new_tokens > 512:
        return -(-max_new_tokens // 512) * 512
    return max(16, 1 << (max_new_tokens - 1).bit_length())


def _tokenize(model: Model, prompts: Prompt | Sequence[Prompt]) -> tuple[list[str | list[int]], list[list[int]]]:
    """The prompts as they were asked, ids as plain numbers, and all of them as token ids."""
    if isinstance(prompts, bytes) or any(isinstance(prompt, bytes) for prompt in prompts):
        raise PromptError("a prompt is bytes; decode it to text, or give token ids")
    if isinstance(prompts, jax.Array):
        prompts = np.asarray(prompts)  # pyright: ignore[reportAssignmentType]
    alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], numbers.Integral))
    if alone:
        prompts = [prompts]  # pyright: ignore[reportAssignmentType]
    if not len(prompts):
        raise PromptError("there is no prompt; give at least one")
    asked, tokens = [], []
    for i, prompt in enumerate(prompts):
        prompt = np.asarray(prompt) if isinstance(prompt, jax.Array) else prompt
        ids = prompt_tokens(model, f"prompt {i}", prompt)  # pyright: ignore[reportArgumentType]
        asked.append(prompt if isinstance(prompt, str) else ids)
        tokens.append(ids)
    return asked, tokens


def prompt_tokens(model: Model, name: str, prompt: Prompt) -> list[int]:
    """A prompt as token ids. Raises `PromptError`, which calls it by its name, if that cannot be."""
    ids = _encode(model, name, prompt) if isinstance(prompt, str) else _token_ids(model, name, prompt)
    if not ids:
        raise PromptError(f"{name} is empty; give at least one token")
    return ids


def _encode(model: Model, name: str, prompt: str) -> list[int]:
    if model.tokenizer is None:
        raise PromptError("this model has no tokenizer.json; give prompts as token ids")
    if not prompt:
        raise PromptError(f"{name} is empty; give at least one character")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{name} is not valid Unicode: {error.reason}") from error
    return _token_ids(model, name, model.tokenizer.encode(prompt))  # a tokenizer may have more tokens than the model


def _token_ids(model: Model, what: str, ids: Sequence[int] | np.ndarray | jax.Array) -> list[int]:
    """Plain numbers; PromptError for what is not a token id of the model."""
    size, plain = model.config.vocab_size, []
    for token in ids:
        if not isinstance(token, numbers.Integral):
            raise PromptError(f"{what} holds {token!r}, which is not a whole number")
        plain.append(int(token))
        if not 0 <= plain[-1] < size:
            raise PromptError(f"{what} holds token id {token}; the model's ids are 0 to {size - 1}")
    return plain


LONGEST = 2**24
"""Tokens of a sequence: positions are exact in float32 up to here."""


def check_length(tokens: int) -> None:
    """Raises `ConfigError` for a sequence, prompt and answer, that no cache is made for."""
    if tokens > LONGEST:
        raise ConfigError(f"prompt and answer may take {tokens:,} tokens; shorten them to {LONGEST:,}")


def check_max_new_tokens(max_new_tokens: int) -> None:
    """Raises `ConfigError` unless at least one token is asked for."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not possible; choose 1 or more")


def checked_stops(model: Model, stop: Sequence[str], stop_ids: Sequence[int] | None) -> tuple[int, ...]:
    """The token ids that end an answer, the model's own for None. Raises for stops that cannot be honoured."""
    if isinstance(stop, str) or not all(stop):
        raise ConfigError("stop must be a list of strings that are not empty")
    if stop and model.tokenizer is None:
        raise ConfigError("stop strings need a tokenizer, and this model has none; use stop_ids")
    return model.stop_ids if stop_ids is None else tuple(_token_ids(model, "stop_ids", stop_ids))


def padded_stop_ids(ids: Sequence[int]) -> Int[np.ndarray, " stops"]:
    """As an array, padded with -1, so that another number of them compiles nothing."""
    padded = np.full(-(-max(len(ids), 1) // 8) * 8, -1, np.int32)
    padded[: len(ids)] = ids
    return padded


def checked_seeds(seed: Seed, size: int) -> list[int]:
    """One seed for each of `size` prompts. Raises `ConfigError` for another number of them, or one out of range."""
    seeds = [int(seed)] * size if isinstance(seed, numbers.Integral) else [int(s) for s in seed]  # pyright: ignore[reportGeneralTypeIssues]
    if len(seeds) != size:
        raise ConfigError(f"{len(seeds)} seeds given for {size} prompts; give one for all or one for each")
    for s in seeds:
        if not -(2**31) <= s < 2**31:
            raise ConfigError(f"seed={s} is not possible; choose from -2^31 to 2^31 - 1")
    return seeds
