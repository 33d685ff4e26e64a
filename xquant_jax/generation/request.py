"""What may be asked of a model, checked once, and what an answer is.

A `Request` is what users write. `checked` holds it against the model and gives the form that everything behind it
works with: plain numbers, token ids, nothing that can still be wrong. `Options` are those of a whole run.
"""

import dataclasses
import numbers
import operator
from collections.abc import Collection, Sequence
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax.sharding import Mesh

from xquant_jax.cache.config import CacheConfig
from xquant_jax.errors import ConfigError, PromptError
from xquant_jax.generation.sampling import MOST_LOGPROBS, Sampling
from xquant_jax.model.loading import Model

Prompt = str | Sequence[int] | np.ndarray | jax.Array
Seed = int | np.integer | Sequence[int]
Whole = Any
"""An `int`; until it was checked also an integer of numpy or JAX."""

SMALLEST_BUCKET = 16
"""Tokens that the shortest prompts are padded to."""

LONGEST = 2**24
"""Tokens of a sequence: positions are exact in float32 up to here."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt (a text, or token ids taken as they are), and how it is to be answered.

    max_new_tokens: tokens of the answer at most
    seed: of what is sampled; an answer depends on its request only, not on what runs beside it
    sampling: how tokens are chosen, greedy by default
    stop: strings that end the answer; they are not part of its text
    stop_ids: token ids that end it, by default the model's own; `[]` for none
    logprobs: likeliest tokens that are told with every token of the answer, up to 20
    """

    prompt: Prompt
    max_new_tokens: SupportsIndex = 128
    seed: SupportsIndex = 0
    sampling: Sampling = Sampling()
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] | np.ndarray | None = None
    logprobs: SupportsIndex = 0


@dataclasses.dataclass(frozen=True)
class CheckedRequest:
    """A request that can be honoured. `prompt` is as it was asked, `tokens` are its ids; see `checked`."""

    prompt: str | list[int]
    tokens: list[int]
    max_new_tokens: int
    seed: int
    sampling: Sampling
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    logprobs: int

    @property
    def capacity(self) -> int:
        """Tokens that its cache must hold: the last one of an answer is never stored."""
        return len(self.tokens) + self.max_new_tokens - 1


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt's answer. `tokens` are the new ones, `logprobs` theirs under the model itself (natural log).

    top_logprobs: if asked for, the likeliest (token id, log-probability) at every token, likeliest first
    """

    prompt: str | list[int]
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop": a stop token or string; "length": max_new_tokens
    top_logprobs: list[list[tuple[int, float]]] | None = None

    def to_json(self) -> dict[str, Any]:
        written = dataclasses.asdict(self)
        if self.top_logprobs is None:
            del written["top_logprobs"]
        return written


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of request number `index`: a completion, or the error that a bad request is."""

    index: int
    completion: Completion | None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What belongs to a run and not to a request.

    cache: how the cache is stored, see `CacheConfig.parse`
    prefill_chunk: prompt tokens processed at once. Tokens of a chunk see each other exactly and earlier chunks
        through the cache, as the new tokens will; None takes the whole prompt at once and exactly
    cache_tokens: tokens per sequence that the cache holds, by default as many as are needed
    slots: sequences that run at the same time, by default as many as the run finds fitting
    memory: bytes that the caches of a batch may take instead, on all devices together
    mesh: devices to spread cache and work over (`make_mesh`), by default those that the model was loaded on
    """

    cache: str | CacheConfig = "xquant:4"
    prefill_chunk: Whole | None = 512
    cache_tokens: Whole | None = None
    slots: Whole | None = None
    memory: Whole | None = None
    mesh: Mesh | None = None

    @property
    def cache_config(self) -> CacheConfig:
        return CacheConfig.parse(self.cache)

    def checked(self) -> "Options":
        """The same options in plain numbers. Raises `ConfigError` for one that cannot be honoured."""
        sizes: dict[str, Any] = {}
        for name in ("prefill_chunk", "cache_tokens", "slots", "memory"):
            value = getattr(self, name)
            sizes[name] = None if value is None else whole_number(name, value)
            if value is not None and sizes[name] < 1:
                raise ConfigError(f"{name}={value} is not possible; choose 1 or more, or None")
        if self.memory is not None:
            for name in ("slots", "cache_tokens"):
                if sizes[name] is not None:
                    raise ConfigError(f"{name}={sizes[name]} and memory={self.memory} are both given; choose one")
        return dataclasses.replace(self, cache=self.cache_config, **sizes)


def checked(model: Model, request: Request, name: str = "the prompt") -> CheckedRequest:
    """The request as the model can honour it. `name`: what errors call its prompt.

    Raises `PromptError` for a prompt or a token id that the model cannot take, `ConfigError` for anything else.
    """
    asked = check_wishes(model, request)
    tokens = _prompt_tokens(model, name, request.prompt)
    if len(tokens) + asked["max_new_tokens"] > LONGEST:
        needed = len(tokens) + asked["max_new_tokens"]
        raise ConfigError(f"prompt and answer may take {needed:,} tokens; shorten them to {LONGEST:,}")
    return CheckedRequest(request.prompt if isinstance(request.prompt, str) else tokens, tokens, **asked)


def check_wishes(model: Model, request: Request) -> dict[str, Any]:
    """The fields of a `CheckedRequest` that are not about its prompt. Raises as `checked` does."""
    max_new_tokens = whole_number("max_new_tokens", request.max_new_tokens)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not possible; choose 1 or more")
    logprobs = whole_number("logprobs", request.logprobs)
    most = min(MOST_LOGPROBS, model.config.vocab_size)
    if not 0 <= logprobs <= most:
        raise ConfigError(f"logprobs={logprobs} is not possible; choose from 0 to {most}")
    stop = request.stop
    listed = isinstance(stop, Collection) and not isinstance(stop, str)
    if not listed or not all(isinstance(string, str) and string for string in stop):
        raise ConfigError("stop must be a list of strings that are not empty")
    if stop and model.tokenizer is None:
        raise ConfigError("stop strings need a tokenizer, and this model has none; use stop_ids")
    if not isinstance(request.sampling, Sampling):
        raise ConfigError(f"sampling={request.sampling!r} is not possible; give a Sampling")
    ids = request.stop_ids
    return {
        "max_new_tokens": max_new_tokens,
        "seed": checked_seed(request.seed),
        "sampling": request.sampling.checked(),
        "stop": tuple(stop),
        "stop_ids": model.stop_ids if ids is None else tuple(_token_ids(model, "stop_ids", ids)),
        "logprobs": logprobs,
    }


def whole_number(name: str, value: Any) -> int:
    """A plain `int` from anything that is one, of numpy or JAX too. Raises `ConfigError` for what is not."""
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}={value!r} is not a whole number; give one") from None


def checked_seed(seed: Any) -> int:
    """A seed as a plain number. Raises `ConfigError` for one out of range."""
    number = whole_number("seed", seed)
    if not -(2**31) <= number < 2**31:
        raise ConfigError(f"seed={number} is not possible; choose from -2^31 to 2^31 - 1")
    return number


def seeds_of(seed: Seed, size: int) -> list[int]:
    """One seed for each of `size` prompts. Raises `ConfigError` for another number of them, or one out of range."""
    seeds = [seed] * size if np.ndim(seed) == 0 else list(seed)  # pyright: ignore[reportArgumentType]
    if len(seeds) != size:
        raise ConfigError(f"{len(seeds)} seeds given for {size} prompts; give one for all or one for each")
    return [checked_seed(s) for s in seeds]


def one_by_one(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts as a sequence, also where one stands alone."""
    if isinstance(prompts, bytes):
        raise PromptError("a prompt is bytes; decode it to text, or give token ids")
    several: Any = np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts
    if isinstance(several, str) or (len(several) > 0 and isinstance(several[0], numbers.Integral)):
        several = [several]
    return list(several)


def _prompt_tokens(model: Model, name: str, prompt: Any) -> list[int]:
    if isinstance(prompt, bytes):
        raise PromptError(f"{name} is bytes; decode it to text, or give token ids")
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


def _token_ids(model: Model, what: str, ids: Any) -> list[int]:
    """Plain numbers; PromptError for what is not a token id of the model."""
    size, plain = model.config.vocab_size, []
    try:
        tokens = list(np.asarray(ids) if isinstance(ids, jax.Array) else ids)
    except TypeError:
        raise PromptError(f"{what} is {ids!r}; give a text, or a list of token ids") from None
    for token in tokens:
        try:
            plain.append(operator.index(token))
        except TypeError:
            raise PromptError(f"{what} holds {token!r}, which is not a whole number") from None
        if not 0 <= plain[-1] < size:
            raise PromptError(f"{what} holds token id {token}; the model's ids are 0 to {size - 1}")
    return plain


def bucket_length(longest: int, prefill_chunk: int | None) -> tuple[int, int]:
    """Length that prompts are padded to, and prompt tokens per chunk; the chunk divides the length.

    Powers of two up to the chunk, then eight steps per doubling: few programs to compile, little cache wasted.
    """
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
