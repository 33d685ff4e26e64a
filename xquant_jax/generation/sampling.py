"""Choosing the next token from logits: every sequence of a batch by options of its own."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import Leaf

LOWEST, HIGHEST = 1e-6, 1e6
"""Of temperatures and repetition penalties: beyond them logits of float32 are all alike, or overflow."""

MOST_LOGPROBS = 20
"""Log-probabilities per token that a request may ask for."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `None` leaves a step out, as does a value that changes nothing; temperature 0 (the
    default) is greedy.

    Applied in the order in which they are listed here, as Hugging Face transformers does. Sequences with different
    options share a batch, and no option compiles anything new.

    repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely (Keskar et al. 2019)
    frequency_penalty: is taken from a token's logit as often as the answer holds it (OpenAI's API)
    presence_penalty: is taken once from the logits of all tokens that the answer holds
    temperature: divides the logits
    top_k: keeps the k likeliest tokens; 0 and -1 keep all
    top_p: keeps the likeliest tokens that together reach probability p (Holtzman et al. 2020)
    min_p: keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024)
    """

    repetition_penalty: SupportsFloat | None = None
    temperature: SupportsFloat | None = 0.0
    top_k: SupportsIndex | None = None
    top_p: SupportsFloat | None = None
    min_p: SupportsFloat | None = None
    frequency_penalty: SupportsFloat | None = None
    presence_penalty: SupportsFloat | None = None

    def checked(self) -> "Sampling":
        """The same sampling in plain numbers, greedy written as `temperature=None`.

        Raises `ConfigError` for values out of range.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            values[field.name] = _number(field.name, getattr(self, field.name))
        temperature, top_p, min_p = values["temperature"], values["top_p"], values["min_p"]
        if temperature and not LOWEST <= temperature <= HIGHEST:
            raise ConfigError(
                f"temperature={temperature} is not possible; choose 0 (greedy), or from {LOWEST} to {HIGHEST:.0f}"
            )
        penalty = values["repetition_penalty"]
        if penalty is not None and not LOWEST <= penalty <= HIGHEST:
            raise ConfigError(f"repetition_penalty={penalty} is not possible; choose more than 0, mostly 1 to 2")
        for name in ("frequency_penalty", "presence_penalty"):
            if values[name] is not None and not -100 <= values[name] <= 100:
                raise ConfigError(f"{name}={values[name]} is not possible; choose from -100 to 100, mostly -2 to 2")
        top_k = self.top_k
        try:
            top_k = None if top_k is None else operator.index(top_k)
        except TypeError:
            top_k = -2
        if top_k is not None and top_k < -1:
            raise ConfigError(f"top_k={self.top_k} is not possible; choose a whole number from 1, or leave it out")
        if top_p is not None and not 0 < top_p <= 1:
            raise ConfigError(f"top_p={top_p} is not possible; choose more than 0 and at most 1")
        if min_p is not None and not 0 <= min_p <= 1:
            raise ConfigError(f"min_p={min_p} is not possible; choose 0 or more and at most 1")
        values["top_k"] = top_k if top_k and top_k > 0 else None
        for name, neutral in NEUTRAL.items():
            values[name] = None if values[name] == neutral else values[name]
        given = [name for name in FILTERS if values[name] is not None]
        if given and not temperature:
            raise ConfigError(f"{', '.join(given)} has no effect at temperature 0 (greedy); set a temperature")
        return Sampling(**values)

    def over(self, other: "Sampling") -> "Sampling":
        """What this one says, and where it says nothing what the other does.

        A temperature of 0 leaves out what the other says of which tokens may be drawn.
        """
        said = {name: value for name, value in vars(self).items() if value is not None}
        merged = dataclasses.replace(other, **said)
        return merged if merged.temperature else dataclasses.replace(merged, **{n: said.get(n) for n in FILTERS})

    def told(self) -> str:
        """What it does in words, for people: `temperature 0.7, top_p 0.9`."""
        said = [f"{name} {value}" for name, value in dataclasses.asdict(self.checked()).items() if value is not None]
        return ", ".join(said if any("temperature" in word for word in said) else ["greedy", *said])


FILTERS = ("top_k", "top_p", "min_p")
"""What says which tokens may be drawn: nothing where none is drawn."""

NEUTRAL = {
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "temperature": 0,
    "top_p": 1,
    "min_p": 0,
}
"""Values that change nothing."""


def recommended(settings: Mapping[str, Any]) -> Sampling:
    """The sampling that a generation_config.json asks for: greedy if `do_sample` is false or it says nothing of it.

    Raises `ConfigError` for values out of range.
    """
    said = {name: settings[name] for name in ("repetition_penalty", "temperature", *FILTERS) if name in settings}
    said = {name: value for name, value in said.items() if value is not None}
    draws = settings.get("do_sample")
    if draws is False or said.get("temperature") == 0 or (draws is None and not said.keys() - {"repetition_penalty"}):
        return Sampling(said.get("repetition_penalty"))
    return Sampling(**{"temperature": 1.0, **said})


def _number(name: str, value: Any) -> float | None:
    if value is None or name == "top_k":
        return None
    try:
        if not isinstance(value, str):  # which float would read
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{name}={value!r} is not a number; give one, or leave it out")


@struct.dataclass
class SamplingRows:
    """The sampling of every sequence of a batch, as arrays; a neutral value means that a step is left out."""

    repetition_penalty: Leaf  # float32 [B], 1: none
    frequency_penalty: Leaf  # float32 [B], 0: none
    presence_penalty: Leaf  # float32 [B], 0: none
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
            frequency_penalty=row("frequency_penalty", 0, np.float32),
            presence_penalty=row("presence_penalty", 0, np.float32),
            temperature=row("temperature", 0, np.float32),
            top_k=row("top_k", 0, np.int32),
            top_p=row("top_p", 1, np.float32),
            min_p=row("min_p", 0, np.float32),
        )

    @property
    def counting(self) -> Bool[Array, ""]:
        """Whether a sequence of the batch asks which tokens there were before."""
        return jnp.any((self.repetition_penalty != 1) | (self.frequency_penalty != 0) | (self.presence_penalty != 0))


@struct.dataclass
class Seen:
    """The tokens that were before; means something only where a sequence of the batch has a penalty."""

    anywhere: Leaf  # bool [B, V], in prompt or answer
    answered: Leaf  # int32 [B, V], how often in the answer

    @classmethod
    def nothing(cls, size: int, vocabulary: int, xp: Any = jnp) -> "Seen":
        """Of `size` sequences that begin; `xp` is jax.numpy or numpy."""
        return cls(xp.zeros((size, vocabulary), bool), xp.zeros((size, vocabulary), xp.int32))

    def with_answers(self, tokens: Int[Array, " B"], live: Bool[Array, " B"]) -> "Seen":
        """With one token more in the answers that are live."""
        rows = jnp.arange(len(tokens))
        answered = self.answered.at[rows, tokens].add(live.astype(jnp.int32))
        return Seen(self.anywhere.at[rows, tokens].max(live), answered)


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
    keys: UInt32[Array, "B 2"],
    numbers: Int[Array, " B"],
    seen: Seen,
    forbidden: Int[Array, "B n"],
    top: Int[Array, " B"],
) -> Chosen:
    """The next token of every sequence. What is costly runs only if a sequence of the batch asks for it.

    keys, numbers: a token is drawn by the key of its request and its number in the answer, and nothing else
    seen: what the penalties are about
    forbidden: tokens that are not chosen now; -1: none
    top: how many likeliest tokens are asked for
    """
    logits = logits.astype(jnp.float32)
    vocabulary = logits.shape[1]
    held = jnp.any(forbidden >= 0)

    def choose() -> Int[Array, " B"]:
        allowed = lax.cond(rows.counting, lambda: _penalized(logits, rows, seen), lambda: logits)
        allowed = lax.cond(held, lambda: _without(allowed, forbidden), lambda: allowed)
        greedy = jnp.argmax(allowed, axis=-1)
        drawn = lax.cond(
            jnp.any(rows.temperature > 0), lambda: _drawn(allowed, rows, token_keys(keys, numbers)), lambda: greedy
        )
        return jnp.where(rows.temperature > 0, drawn, greedy)

    def likeliest() -> tuple[Array, Array]:
        logprobs, tokens = lax.top_k(jax.nn.log_softmax(logits), min(MOST_LOGPROBS, vocabulary))
        return tokens, logprobs

    nothing = Chosen.nothing(len(logits), vocabulary=vocabulary)
    plain = jnp.all(rows.temperature == 0) & ~rows.counting & ~held
    tokens = lax.cond(plain, lambda: jnp.argmax(logits, axis=-1), choose).astype(jnp.int32)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    top_of_all = lax.cond(jnp.any(top > 0), likeliest, lambda: (nothing.top_tokens, nothing.top_logprobs))
    return Chosen(tokens, logprobs, *top_of_all)


def token_keys(keys: UInt32[Array, "B 2"], numbers: Int[Array, " B"]) -> Any:
    """The random key that token `numbers` of each answer is drawn with."""

    def fold(key: Array, number: Array) -> Any:
        return jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), number)

    return jax.vmap(fold)(keys, numbers)


def _penalized(logits: Float[Array, "B V"], rows: SamplingRows, seen: Seen) -> Float[Array, "B V"]:
    repeated = rows.repetition_penalty[:, None]
    logits = jnp.where(seen.anywhere, jnp.where(logits > 0, logits / repeated, logits * repeated), logits)
    times = seen.answered.astype(jnp.float32)
    return logits - rows.frequency_penalty[:, None] * times - rows.presence_penalty[:, None] * jnp.sign(times)


def _without(logits: Float[Array, "B V"], forbidden: Int[Array, "B n"]) -> Float[Array, "B V"]:
    places = jnp.where(forbidden < 0, logits.shape[1], forbidden)
    return logits.at[jnp.arange(len(logits))[:, None], places].set(-jnp.inf, mode="drop")


def _drawn(logits: Float[Array, "B V"], rows: SamplingRows, keys: Any) -> Int[Array, " B"]:
    sampled = rows.temperature > 0
    logits = logits - logits.max(axis=-1, keepdims=True)  # so that no temperature makes infinities of them
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
