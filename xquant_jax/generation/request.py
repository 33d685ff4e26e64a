"""What may be asked of a model, checked once.

A `Request` is what users write. `checked` holds it against the model and gives the form that everything behind it
works with: plain numbers, token ids, nothing that can still be wrong. `Options` are those of a whole run.
"""

import dataclasses
import operator
import secrets
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np
from jax.sharding import Mesh

from xquant_jax.cache.config import CacheConfig
from xquant_jax.errors import ConfigError, XQuantWarning
from xquant_jax.generation.prompts import Prompt, prompt_tokens, token_ids
from xquant_jax.generation.sampling import MOST_LOGPROBS, Sampling, recommended
from xquant_jax.model.loading import Model
from xquant_jax.sharding.hosts import from_process_0
from xquant_jax.speculation import Speculation

Seed = SupportsIndex | Sequence[int] | np.ndarray | None
Whole = Any
"""An `int`; until it was checked also an integer of numpy or JAX."""

MOST_ANSWERS = 4096
"""Answers to one prompt in one request."""

LONGEST = 2**24
"""Tokens of a sequence: positions are exact in float32 up to here."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt (a text, token ids taken as they are, or a `Chat`), and how it is to be answered.

    max_new_tokens: tokens of the answer at most
    seed: of what is sampled; None draws one, which the completion tells
    sampling: how tokens are chosen, greedy by default; "model": as its generation_config.json says
    stop: strings that end the answer; they are not part of its text. One that holds special tokens ends it there
    stop_ids: token ids that end it, by default the model's own; `[]` for none
    min_tokens: tokens of the answer before any of these may end it
    logprobs: likeliest tokens that are told with every token of the answer, up to 20
    n: answers to this prompt, each with draws of its own
    add_special_tokens: whether a text gets the special tokens that the tokenizer prescribes, such as a BOS, unless it
        begins with them
    speculate: whether tokens may be drafted, in a run that drafts; the answer is the same either way
    """

    prompt: Prompt
    max_new_tokens: SupportsIndex = 128
    seed: SupportsIndex | None = None
    sampling: Sampling | Literal["model"] = Sampling()
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] | np.ndarray | None = None
    min_tokens: SupportsIndex = 0
    logprobs: SupportsIndex = 0
    n: SupportsIndex = 1
    add_special_tokens: bool = True
    speculate: bool = True


@dataclasses.dataclass(frozen=True)
class CheckedRequest:
    """A request that can be honoured. `prompt` is its text or ids, `tokens` are its ids; see `checked`.

    repeat: how many earlier requests of the call have the same tokens and seed, see `Repeats`
    """

    prompt: str | list[int]
    tokens: list[int]
    max_new_tokens: int = 128
    seed: int = 0
    sampling: Sampling = Sampling(temperature=None)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int = 0
    n: int = 1
    repeat: int = 0
    speculate: bool = True

    @property
    def capacity(self) -> int:
        """Tokens that its cache must hold: the last one of an answer is never stored."""
        return len(self.tokens) + self.max_new_tokens - 1

    @property
    def key(self) -> tuple[int, int]:
        """What its draws depend on, 64 bits: seed, tokens, and which of several answers to them it is."""
        own = sha256(f"{self.seed} {self.repeat} ".encode() + np.asarray(self.tokens, "<i4").tobytes()).digest()
        return int.from_bytes(own[:4], "little"), int.from_bytes(own[4:8], "little")


@dataclasses.dataclass(frozen=True)
class Options:
    """What belongs to a run and not to a request.

    cache: how the cache is stored, see `CacheConfig.parse`
    prefill_chunk: prompt tokens processed at once. Tokens of a chunk see each other exactly and earlier chunks
        through the cache, as the new tokens will; None takes the whole prompt at once and exactly
    cache_tokens: tokens per sequence that the cache holds, by default as many as are needed
    slots: sequences that run at the same time, by default as many as the run finds fitting
    memory: bytes that the caches of a batch may take instead, on all devices together
    speculate: where drafts come from and how long they are, see `Speculation.parse`; None: nothing is drafted
    mesh: devices to spread cache and work over (`make_mesh`), by default those that the model was loaded on
    """

    cache: str | CacheConfig = "xquant:4"
    prefill_chunk: Whole | None = 512
    cache_tokens: Whole | None = None
    slots: Whole | None = None
    memory: Whole | None = None
    mesh: Mesh | None = None
    speculate: str | Speculation | None = None

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
        speculate = Speculation.parse(self.speculate)
        return dataclasses.replace(self, cache=self.cache_config, speculate=speculate, **sizes)


def checked(model: Model, request: Request, name: str = "the prompt") -> CheckedRequest:
    """The request as the model can honour it. `name`: what errors call its prompt.

    Warns if prompt and answer pass the positions that the model was made for.

    Raises `PromptError` for a prompt or a token id that the model cannot take, `ConfigError` for anything else.
    """
    asked = check_wishes(model, request)
    prompt, tokens = prompt_tokens(model, name, request.prompt, request.add_special_tokens)
    request_checked = CheckedRequest(prompt, tokens, **asked)
    needed = request_checked.capacity
    if needed > LONGEST:
        raise ConfigError(f"prompt and answer may take {needed:,} tokens; shorten them to {LONGEST:,}")
    model.config.rope.check(needed)
    if model.positions is not None and needed > model.positions:
        warnings.warn(
            f"prompt and answer may take more than the {model.positions:,} tokens that the model was made for "
            f"(max_position_embeddings); what it says beyond them may be nonsense",
            XQuantWarning,
            stacklevel=2,
        )
    return request_checked


def check_wishes(model: Model, request: Request) -> dict[str, Any]:
    """The fields of a `CheckedRequest` that are not about its prompt. Raises as `checked` does."""
    numbers = {name: whole_number(name, getattr(request, name)) for name in ("max_new_tokens", "min_tokens", "n")}
    for name, least in (("max_new_tokens", 1), ("min_tokens", 0), ("n", 1)):
        if numbers[name] < least:
            raise ConfigError(f"{name}={numbers[name]} is not possible; choose {least} or more")
    if numbers["n"] > MOST_ANSWERS:
        raise ConfigError(f"n={numbers['n']} is not possible; choose {MOST_ANSWERS} or less")
    if numbers["min_tokens"] > numbers["max_new_tokens"]:
        raise ConfigError(
            f"min_tokens={numbers['min_tokens']} is more than max_new_tokens={numbers['max_new_tokens']}; lower it"
        )
    logprobs = whole_number("logprobs", request.logprobs)
    most = min(MOST_LOGPROBS, model.config.vocab_size)
    if not 0 <= logprobs <= most:
        raise ConfigError(f"logprobs={logprobs} is not possible; choose from 0 to {most}")
    for name in ("add_special_tokens", "speculate"):
        if not isinstance(value := getattr(request, name), bool):
            raise ConfigError(f"{name}={value!r} is not possible; choose True or False")
    stop, stop_ids = _stops(model, request)
    sampling = recommended(model.generation_config) if request.sampling == "model" else request.sampling
    if not isinstance(sampling, Sampling):
        raise ConfigError(f'sampling={request.sampling!r} is not possible; give a Sampling, or "model"')
    seed = fresh_seed() if request.seed is None else checked_seed(request.seed)
    asked = {"seed": seed, "sampling": sampling.checked(), "stop": stop, "stop_ids": stop_ids, "logprobs": logprobs}
    return numbers | asked | {"speculate": request.speculate}


def _stops(model: Model, request: Request) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings and stop ids; a string that is one special token is also an id."""
    stop, ids, tokenizer = request.stop, request.stop_ids, model.tokenizer
    listed = isinstance(stop, Collection) and not isinstance(stop, str)
    if not listed or not all(isinstance(string, str) and string for string in stop):
        raise ConfigError(f"stop={stop!r} is not possible; give a list of strings that are not empty")
    if stop and tokenizer is None:
        raise ConfigError("stop strings need a tokenizer, and this model has none; use stop_ids")
    stop_ids = dict.fromkeys(model.stop_ids if ids is None else token_ids(model, "stop_ids", ids))
    for id, special in tokenizer.special.items() if tokenizer else ():
        for string in stop:
            if special in string and id >= model.config.vocab_size:
                raise ConfigError(f"stop {string!r} holds {special!r}, which this model never says; leave it out")
            if special == string:
                stop_ids[id] = None
    return tuple(stop), tuple(stop_ids)


def whole_number(name: str, value: Any) -> int:
    """A plain `int` from anything that is one, of numpy or JAX too. Raises `ConfigError` for what is not."""
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}={value!r} is not a whole number; give one") from None


def checked_seed(seed: Any) -> int:
    """A seed as a plain number. Raises `ConfigError` for one out of range."""
    number = whole_number("seed", seed)
    if not -(2**63) <= number < 2**63:
        raise ConfigError(f"seed={number} is not possible; choose from -2^63 to 2^63 - 1")
    return number


def fresh_seed() -> int:
    """A seed that nobody chose, 31 bits. In a job of several processes all of them get that of process 0."""
    seed = secrets.randbits(31)
    return seed if jax.process_count() == 1 else int(from_process_0(seed))


def seeds_of(seed: Seed, size: int) -> list[int]:
    """One seed for each of `size` prompts, a fresh one for all where there is none.

    Raises `ConfigError` for another number of them, or one out of range.
    """
    if seed is None:
        return [fresh_seed()] * size
    array = isinstance(seed, np.ndarray | jax.Array) and seed.ndim > 0
    several = array or (isinstance(seed, Sequence) and not isinstance(seed, str | bytes))
    seeds: Any = list(seed) if several else [seed] * size  # pyright: ignore[reportArgumentType]
    if len(seeds) != size:
        raise ConfigError(f"{len(seeds)} seeds given for {size} prompts; give one for all or one for each")
    return [checked_seed(s) for s in seeds]


class Repeats:
    """Tells the requests of one call apart that have the same tokens and seed: each gets the number of those before it.

    So several answers to one prompt differ, the same call gives the same answers, and no answer depends on requests of
    other prompts.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, int]] = Counter()

    def of(self, request: CheckedRequest) -> list[CheckedRequest]:
        """A request for every answer that this one asks for."""
        first = self._counts[request.key]
        self._counts[request.key] += request.n
        return [dataclasses.replace(request, n=1, repeat=first + i) for i in range(request.n)]
