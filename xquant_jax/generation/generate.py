"""`generate` and `stream`: prompts in, tokens and text out, over an `Engine` with a slot for every prompt."""

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
from jax.sharding import Mesh

from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import CacheBytes, check_room
from xquant_jax.errors import PromptError, XQuantWarning
from xquant_jax.generation.answer import Completion, Drafted
from xquant_jax.generation.buckets import SMALLEST_BUCKET, answer_room, bucket_length
from xquant_jax.generation.engine import Engine
from xquant_jax.generation.prefix import Prefix, check_begins, check_prefix, used
from xquant_jax.generation.prompts import Prompt, one_by_one
from xquant_jax.generation.request import CheckedRequest, Options, Repeats, Request, Seed, checked, seeds_of
from xquant_jax.generation.sampling import Sampling
from xquant_jax.generation.sequence import Progress
from xquant_jax.generation.sharing import Sharing, own_tokens
from xquant_jax.model.loading import Model
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.speculation import Speculation


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns. Times are wall-clock seconds; compiling is not part of prefill or decode.

    implementation: what decoding read the quantized history with, `xla` or the name of a kernel backend
    speculation: what became of the drafts of all answers together, in a run that drafts
    """

    results: list[Completion]
    cache_bytes: CacheBytes
    implementation: str
    compile_s: float
    prefill_s: float
    decode_s: float
    speculation: Drafted | None = None

    def to_json(self) -> dict[str, Any]:
        sizes = dataclasses.asdict(self.cache_bytes) | {"total": self.cache_bytes.total}
        results = [result.to_json() for result in self.results]
        written = dataclasses.asdict(self) | {"cache_bytes": sizes, "results": results}
        return {name: value for name, value in written.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class StreamedToken:
    """One token of one answer, `index` in the list of results. `text` is what became certain with it, often a word.

    error: what ended the answer; there is no token then
    """

    index: int
    token: int | None
    logprob: float | None
    text: str
    finish_reason: str | None
    error: str | None = None


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    cache: str | CacheConfig = "xquant:4",
    max_new_tokens: SupportsIndex = 128,
    sampling: Sampling | Literal["model"] = Sampling(),
    seed: Seed = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | np.ndarray | None = None,
    min_tokens: SupportsIndex = 0,
    n: SupportsIndex = 1,
    add_special_tokens: bool = True,
    prefill_chunk: SupportsIndex | None = 512,
    cache_tokens: SupportsIndex | None = None,
    mesh: Mesh | None = None,
    speculate: str | Speculation | None = None,
    prefix: Prefix | None = None,
) -> Generation:
    """Continues every prompt: a text, token ids taken as they are, or a `Chat`.

    cache: how the cache is stored, see `CacheConfig.parse`
    sampling: how tokens are chosen, greedy by default; "model": as the model's generation_config.json says
    seed: one for all prompts, or one for each; an answer depends on its prompt and seed, and among answers to one
        prompt on which it is, not on the rest of the batch. None draws one, which the results tell
    stop: strings that end an answer; they are not part of its text. They may hold special tokens
    stop_ids: token ids that end an answer, by default the model's own; `[]` for none
    min_tokens: tokens of an answer before any of these may end it
    n: answers to every prompt; those of a prompt follow each other in the results. Without a mesh its whole blocks are
        stored once for all of them
    add_special_tokens: whether texts get the special tokens that the tokenizer prescribes, such as a BOS, unless they
        begin with them
    prefill_chunk: prompt tokens processed at once. Tokens of a chunk see each other exactly and earlier chunks
        through the cache, as the new tokens will; None takes the whole prompt at once and exactly
    cache_tokens: tokens per sequence that the cache holds, by default as many as the longest prompt and answer of
        the bucket can need: calls that share a program share its size
    mesh: devices to spread cache and work over (`make_mesh`), by default those that the model was loaded on; in a job
        of several processes each of them makes the same call and gets all results
    speculate: drafts that the model checks several tokens of in one step, `lookup:4` or `window:4` for drafts of 4, see
        `Speculation.parse`; the answers are the same with and without (but for rounding)
    prefix: what all prompts begin with, stored by `prefill`; the prompts are given whole

    An answer that cannot go on, because logits are not finite, ends with an `error`, and a warning is given; the others
    go on.

    Raises `PromptError` for an empty prompt or a token id out of range, `CacheFullError` if `cache_tokens` is too
    small, `ConfigError` for an option that cannot be honoured.
    """
    request = Request("", max_new_tokens, 0, sampling, stop, stop_ids, min_tokens, 0, n, add_special_tokens)
    options = Options(cache, prefill_chunk, cache_tokens, mesh=mesh, speculate=speculate)
    generation = generate_requests(model, _requests(prompts, request, seed), options, prefix)
    for number, completion in enumerate(generation.results):
        if completion.error is not None:
            warnings.warn(f"result {number} ended early: {completion.error}", XQuantWarning, stacklevel=2)
    return generation


def stream(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    cache: str | CacheConfig = "xquant:4",
    max_new_tokens: SupportsIndex = 128,
    sampling: Sampling | Literal["model"] = Sampling(),
    seed: Seed = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | np.ndarray | None = None,
    min_tokens: SupportsIndex = 0,
    n: SupportsIndex = 1,
    add_special_tokens: bool = True,
    prefill_chunk: SupportsIndex | None = 512,
    cache_tokens: SupportsIndex | None = None,
    mesh: Mesh | None = None,
    speculate: str | Speculation | None = None,
    prefix: Prefix | None = None,
) -> Iterator[StreamedToken]:
    """The same as `generate`, token by token as they come; same arguments, same tokens, same compiled programs.

    An answer that cannot go on raises nothing either: its last item has an `error`, and no token.
    """
    request = Request("", max_new_tokens, 0, sampling, stop, stop_ids, min_tokens, 0, n, add_special_tokens)
    options = Options(cache, prefill_chunk, cache_tokens, mesh=mesh, speculate=speculate)
    return stream_requests(model, _requests(prompts, request, seed), options, prefix)


def generate_requests(
    model: Model, requests: Sequence[Request], options: Options, prefix: Prefix | None = None
) -> Generation:
    """`generate` for prompts that ask for different things."""
    engine, expected = _prepared(model, requests, options, prefix)
    start = time.perf_counter()
    engine.compile(expected)
    compiled = time.perf_counter()
    news = engine.step(limit=1)
    prefilled = time.perf_counter()
    while engine.busy:
        news += engine.step()
    decoded = time.perf_counter()
    completions = {progress.id: progress.completion for progress in news if progress.completion is not None}
    drafted = [one.speculation for one in completions.values() if one.speculation is not None]
    return Generation(
        results=[completions[i] for i in range(len(expected))],
        cache_bytes=engine.cache_bytes,
        implementation=engine.implementation,
        compile_s=compiled - start,
        prefill_s=prefilled - compiled,
        decode_s=decoded - prefilled,
        speculation=sum(drafted[1:], drafted[0]) if drafted else None,
    )


def stream_requests(
    model: Model, requests: Sequence[Request], options: Options, prefix: Prefix | None = None
) -> Iterator[StreamedToken]:
    """`stream` for prompts that ask for different things. What cannot be honoured raises at once."""
    return _tokens(*_prepared(model, requests, options, prefix))


def _tokens(engine: Engine, expected: Sequence[CheckedRequest]) -> Iterator[StreamedToken]:
    engine.compile(expected)
    while engine.busy:
        for progress in engine.step(limit=1):
            yield from streamed(progress)


def streamed(progress: Progress) -> list[StreamedToken]:
    """What a step made, token by token."""
    tokens = [
        StreamedToken(progress.id, *of_token, finish_reason=None)
        for of_token in zip(progress.tokens, progress.logprobs, progress.texts, strict=True)
    ]
    if (completion := progress.completion) is None:
        return tokens
    if completion.error is not None:
        tokens.append(StreamedToken(progress.id, None, None, progress.rest, None))
    tokens[-1] = dataclasses.replace(tokens[-1], finish_reason=completion.finish_reason, error=completion.error)
    return tokens


def _requests(prompts: Prompt | Sequence[Prompt], request: Request, seed: Seed) -> list[Request]:
    """A request like this for every prompt, each with a seed of its own."""
    several = one_by_one(prompts)
    return [
        dataclasses.replace(request, prompt=prompt, seed=own)
        for prompt, own in zip(several, seeds_of(seed, len(several)), strict=True)
    ]


def _prepared(
    model: Model, requests: Sequence[Request], options: Options, prefix: Prefix | None
) -> tuple[Engine, list[CheckedRequest]]:
    """An engine with these requests in its queue, and a slot for each answer."""
    options = options.checked()
    if not requests:
        raise PromptError("there is no prompt; give at least one")
    if prefix is not None:
        check_prefix(prefix, model, options)
    repeats, several, expected = Repeats(), [], []
    for i, request in enumerate(requests):
        one = checked(model, request, f"prompt {i}")
        if prefix is not None:
            check_begins(prefix, one, f"prompt {i}")
        several.append(one)
        expected += repeats.of(one)
    sizes = [len(r.tokens) for r in expected]
    origin = used(prefix, options, min(sizes))
    samples = max((r.n for r in several if len(r.tokens) - origin >= BLOCK), default=1)  # with a block to share
    if model.on(options.mesh).mesh is not None:
        samples = 1  # what is shared lies on one device
    fed, _ = bucket_length(max(sizes) - origin, options.prefill_chunk)
    if options.cache_tokens is not None:
        check_room(options.cache_tokens, max(r.capacity for r in expected))
    room = answer_room(max(r.max_new_tokens for r in expected))
    if samples == 1:
        tokens = fed + room if options.cache_tokens is None else options.cache_tokens - origin
    else:
        own = max(own_tokens(r, origin, samples) for r in expected)
        tokens = sharding.round_up(own, SMALLEST_BUCKET) if own < BLOCK else BLOCK - 1 + room
    sharing = Sharing(prefix, min(sizes), samples, prompts=len(requests) if samples > 1 else 0, tokens=fed)
    engine = Engine(model, options, slots=len(expected), tokens=tokens, in_place=samples == 1, sharing=sharing)
    for request in expected:
        engine.submit(request)
    return engine, expected
