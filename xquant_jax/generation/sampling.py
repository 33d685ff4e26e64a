"""Choosing the next token from logits: every sequence of a batch by options of its own."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import Leaf

LOWEST_TEMPERATURE = 1e-4
"""Below it logits divided by the temperature overflow float32 sooner than they differ from greedy."""

MOST_LOGPROBS = 20
"""Log-probabilities per token that a request may ask for."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `None` leaves a step out; temperature 0 (the default) is greedy.

    Applied in the order of the fields, as Hugging Face transformers does. Sequences with different options share a
    batch, and no option compiles anything new.

    repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely (Keskar et al. 2019)
    temperature: divides the logits
    top_k: keeps the k likeliest tokens
    top_p: keeps the likeliest tokens that together reach probability p (Holtzman et al. 2020)
    min_p: keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024)
    """

    repetition_penalty: SupportsFloat | None = None
    temperature: SupportsFloat | None = 0.0
    top_k: SupportsIndex | None = None
    top_p: SupportsFloat | None = None
    min_p: SupportsFloat | None = None

    def checked(self) -> "Sampling":
        """The same sampling in plain numbers, greedy written as `temperature=None`.

        Raises `ConfigError` for values out of range.
        """
        penalty, temperature = _number("repetition_penalty", self.repetition_penalty), self.temperature
        temperature, top_p, min_p = (_number(name, getattr(self, name)) for name in ("temperature", "top_p", "min_p"))
        if temperature and not LOWEST_TEMPERATURE <= temperature < float("inf"):
            raise ConfigError(
                f"temperature={temperature} is not possible; choose 0 (greedy) or {LOWEST_TEMPERATURE} and more"
            )
        if penalty is not None and not 0 < penalty < float("inf"):
            raise ConfigError(f"repetition_penalty={penalty} is not possible; choose more than 0")
        top_k = self.top_k
        try:
            top_k = None if top_k is None else operator.index(top_k)
        except TypeError:
            top_k = 0
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k={self.top_k} is not possible; choose a whole number from 1, or leave it out")
        if top_p is not None and not 0 < top_p <= 1:
            raise ConfigError(f"top_p={top_p} is not possible; choose more than 0 and at most 1")
        if min_p is not None and not 0 <= min_p <= 1:
            raise ConfigError(f"min_p={min_p} is not possible; choose 0 or more and at most 1")
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        given = [name for name, value in filters.items() if value is not None]
        if given and not temperature:
            raise ConfigError(f"{', '.join(given)} has no effect at temperature 0 (greedy); set a temperature")
        return Sampling(penalty, temperature or None, top_k, top_p, min_p)


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not hasattr(value, "__float__"):
        raise ConfigError(f"{name}={value!r} is not a number; give one, or leave it out")
    return float(value)


@struct.dataclass
class SamplingRows:
    """The sampling of every sequence of a batch, as arrays; a neutral value means that a step is left out."""

    repetition_penalty: Leaf  # float32 [B], 1: none
    temperature: Leaf  # float32 [B], 0: greedy
    top_k: Leaf  # int32 [B], 0: all tokens
    top_p: Leaf  # float32 [B], 1: all tokens
    min_p: Leaf  # float32 [B], 0: all tokens

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "SamplingRows":
        """One row for each of these, which are checked."""

        def row(name: str, neutral: int, dtype: Any) -> np.ndarray:
            values = [getattr(sampling, name) for sampling in samplings]
            most = np.inf if dtype is np.float32 else np.iinfo(dtype).max
            return np.asarray([neutral if value is None else min(value, most) for value in values], dtype)

        return cls(
            repetition_penalty=row("repetition_penalty", 1, np.float32),
            temperature=row("temperature", 0, np.float32),
            top_k=row("top_k", 0, np.int32),
            top_p=row("top_p", 1, np.float32),
            min_p=row("min_p", 0, np.float32),
        )


@struct.dataclass
class Chosen:
    """The next token of every sequence, with log-probabilities (natural) under the model itself: before penalty,
    temperature and filters. The likeliest tokens are zeros where no sequence of the batch asks for them."""

    tokens: Leaf  # int32 [B]
    logprobs: Leaf  # float32 [B]
    top_tokens: Leaf  # int32 [B, 20], likeliest first
    top_logprobs: Leaf  # float32 [B, 20]

    @classmethod
    def nothing(cls, *shape: int, vocabulary: int) -> "Chosen":
        """Zeros of a shape that ends in B."""
        top = (*shape, min(MOST_LOGPROBS, vocabulary))
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(top, jnp.int32), jnp.zeros(top))


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    seeds: Int[Array, " B"],
    numbers: Int[Array, " B"],
    seen: Bool[Array, "B V"],
    top: Int[Array, " B"],
) -> Chosen:
    """The next token of every sequence. What is costly runs only if a sequence of the batch asks for it.

    `seeds`, `numbers`: a token is drawn by its sequence's seed and its number in the answer, and nothing else.
    `seen`: tokens that the repetition penalty is about. `top`: how many likeliest tokens are asked for.
    """
    logits = logits.astype(jnp.float32)
    vocabulary = logits.shape[1]

    def choose() -> Int[Array, " B"]:
        penalized = lax.cond(
            jnp.any(rows.repetition_penalty != 1), lambda: _penalized(logits, rows, seen), lambda: logits
        )
        greedy = jnp.argmax(penalized, axis=-1)
        drawn = lax.cond(
            jnp.any(rows.temperature > 0), lambda: _drawn(penalized, rows, token_keys(seeds, numbers)), lambda: greedy
        )
        return jnp.where(rows.temperature > 0, drawn, greedy)

    def likeliest() -> tuple[Array, Array]:
        logprobs, tokens = lax.top_k(jax.nn.log_softmax(logits), min(MOST_LOGPROBS, vocabulary))
        return tokens, logprobs

    nothing = Chosen.nothing(len(logits), vocabulary=vocabulary)
    plain = jnp.all((rows.temperature == 0) & (rows.repetition_penalty == 1))
    tokens = lax.cond(plain, lambda: jnp.argmax(logits, axis=-1), choose).astype(jnp.int32)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    top_of_all = lax.cond(jnp.any(top > 0), likeliest, lambda: (nothing.top_tokens, nothing.top_logprobs))
    return Chosen(tokens, logprobs, *top_of_all)


def token_keys(seeds: Int[Array, " B"], numbers: Int[Array, " B"]) -> Any:
    """The random key that token `numbers` of each answer is drawn with: it depends on seed and number only."""
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)


def _penalized(logits: Float[Array, "B V"], rows: SamplingRows, seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    penalty = rows.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _drawn(logits: Float[Array, "B V"], rows: SamplingRows, keys: Any) -> Int[Array, " B"]:
    sampled = rows.temperature > 0
    logits = logits / jnp.where(sampled, rows.temperature, 1)[:, None]
    ranked = jnp.any(sampled & ((rows.top_k > 0) | (rows.top_p < 1)))
    logits = lax.cond(ranked, lambda: likely_by_rank(logits, rows), lambda: logits)
    floor = logits.max(axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None]
    return jax.vmap(jax.random.categorical)(keys, jnp.where(logits < floor, -jnp.inf, logits))


def likely_by_rank(logits: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, "B V"]:
    """The logits that `top_k` and `top_p` keep; minus infinity for the others."""
    vocabulary, top_p = logits.shape[1], rows.top_p[:, None]
    kept = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocabulary), vocabulary)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    least_by_k = jnp.take_along_axis(ordered, kept[:, None] - 1, axis=1)
    ordered = jnp.where(ordered < least_by_k, -jnp.inf, ordered)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    within = (before < top_p) | (top_p >= 1)  # float32 sums reach 1 too early
    least_by_p = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < jnp.maximum(least_by_k, least_by_p), -jnp.inf, logits)
