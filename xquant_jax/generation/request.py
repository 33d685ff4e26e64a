"""What may be asked of the engine, checked once."""

import dataclasses
import numbers
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from xquant_jax.errors import ConfigError, PromptError
from xquant_jax.model.loading import Model

Prompt = str | Sequence[int] | np.ndarray | jax.Array
Seed = int | np.integer | Sequence[int]

STOP_STRING_STEPS = 16
"""Tokens decoded on the device between two looks for stop strings on the host."""

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


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt (a text, or token ids taken as they are), and what is to differ from the options of the run."""

    prompt: Prompt
    max_new_tokens: int | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of request number `index`: a completion, or the error that a bad prompt is."""

    index: int
    completion: Completion | None
    error: str | None = None
