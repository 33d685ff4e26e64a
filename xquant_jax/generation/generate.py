"""`generate` and `stream`: prompts in, tokens and text out, over an `Engine` with a slot for every prompt."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jax.sharding import Mesh

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import CacheBytes, cache_bytes, check_room
from xquant_jax.errors import PromptError
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.request import (
    CheckedRequest,
    Completion,
    Options,
    Prompt,
    Request,
    Seed,
    answer_room,
    bucket_length,
    checked,
    one_by_one,
    seeds_of,
)
from xquant_jax.generation.sampling import Sampling
from xquant_jax.model.loading import Model


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
        results = [result.to_json() for result in self.results]
        return dataclasses.asdict(self) | {"cache_bytes": sizes, "results": results}


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
    max_new_tokens: SupportsIndex = 128,
    sampling: Sampling = Sampling(),
    seed: Seed = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | np.ndarray | None = None,
    prefill_chunk: SupportsIndex | None = 512,
    cache_tokens: SupportsIndex | None = None,
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
    requests = _requests(prompts, Request("", max_new_tokens, 0, sampling, stop, stop_ids), seed)
    return generate_requests(model, requests, Options(cache, prefill_chunk, cache_tokens, mesh=mesh))


def stream(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    cache: str | CacheConfig = "xquant:4",
    max_new_tokens: SupportsIndex = 128,
    sampling: Sampling = Sampling(),
    seed: Seed = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | np.ndarray | None = None,
    prefill_chunk: SupportsIndex | None = 512,
    cache_tokens: SupportsIndex | None = None,
    mesh: Mesh | None = None,
) -> Iterator[StreamedToken]:
    """The same as `generate`, token by token as they come; same arguments, same tokens, same compiled program."""
    requests = _requests(prompts, Request("", max_new_tokens, 0, sampling, stop, stop_ids), seed)
    return stream_requests(model, requests, Options(cache, prefill_chunk, cache_tokens, mesh=mesh))


def generate_requests(model: Model, requests: Sequence[Request], options: Options) -> Generation:
    """`generate` for prompts that ask for different things."""
    engine, expected = _prepared(model, requests, options)
    start = time.perf_counter()
    engine.compile(expected)
    compiled = time.perf_counter()
    news = engine.step(limit=1)
    prefilled = time.perf_counter()
    while engine.busy:
        news += engine.step()
    decoded = time.perf_counter()
    completions = {progress.id: progress.completion for progress in news if progress.completion is not None}
    return Generation(
        results=[completions[i] for i in range(len(requests))],
        cache_bytes=cache_bytes(engine.cache),
        implementation=engine.implementation,
        compile_s=compiled - start,
        prefill_s=prefilled - compiled,
        decode_s=decoded - prefilled,
    )


def stream_requests(model: Model, requests: Sequence[Request], options: Options) -> Iterator[StreamedToken]:
    """`stream` for prompts that ask for different things. What cannot be honoured raises at once."""
    return _tokens(*_prepared(model, requests, options))


def _tokens(engine: Engine, expected: Sequence[CheckedRequest]) -> Iterator[StreamedToken]:
    engine.compile(expected)
    while engine.busy:
        for progress in engine.step(limit=1):
            reason = None if progress.completion is None else progress.completion.finish_reason
            yield StreamedToken(progress.id, progress.tokens[0], progress.logprobs[0], progress.text, reason)


def _requests(prompts: Prompt | Sequence[Prompt], request: Request, seed: Seed) -> list[Request]:
    """A request like this for every prompt, each with a seed of its own."""
    several = one_by_one(prompts)
    return [
        dataclasses.replace(request, prompt=prompt, seed=own)
        for prompt, own in zip(several, seeds_of(seed, len(several)), strict=True)
    ]


def _prepared(model: Model, requests: Sequence[Request], options: Options) -> tuple[Engine, list[CheckedRequest]]:
    """An engine with these requests in its queue, and a slot for each."""
    options = options.checked()
    if not requests:
        raise PromptError("there is no prompt; give at least one")
    expected = [checked(model, request, f"prompt {i}") for i, request in enumerate(requests)]
    tokens = options.cache_tokens
    if tokens is None:
        longest, room = max(len(r.tokens) for r in expected), max(r.max_new_tokens for r in expected)
        tokens = bucket_length(longest, options.prefill_chunk)[0] + answer_room(room)
    else:
        check_room(tokens, max(r.capacity for r in expected))
    engine = Engine(model, options, slots=len(expected), tokens=tokens, in_place=True)
    for request in expected:
        engine.submit(request)
    return engine, expected
