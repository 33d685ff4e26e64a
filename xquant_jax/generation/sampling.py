"""Choosing the next token from logits."""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xquant_jax.errors import ConfigError

LOWEST_TEMPERATURE = 1e-4
"""Below it logits divided by the temperature overflow float32 sooner than they differ from greedy."""

Number = Any
"""A float, or an array in compiled code."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `None` leaves a step out; temperature 0 (the default) is greedy.

    Applied in the order of the fields, as Hugging Face transformers does. Values are traced: another temperature
    compiles nothing new, another set of steps or another top_k does.

    repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely (Keskar et al. 2019)
    temperature: divides the logits
    top_k: keeps the k likeliest tokens
    top_p: keeps the likeliest tokens that together reach probability p (Holtzman et al. 2020)
    min_p: keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024)
    """

    repetition_penalty: Number | None = None
    temperature: Number | None = 0.0
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    top_p: Number | None = None
    min_p: Number | None = None

    def checked(self) -> "Sampling":
        """The same sampling, greedy written as `temperature=None`. Raises `ConfigError` for values out of range."""
        if self.temperature and not LOWEST_TEMPERATURE <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature} is not possible; choose 0 (greedy) or {LOWEST_TEMPERATURE} and more"
            )
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty={self.repetition_penalty} is not possible; choose more than 0")
        if self.top_k is not None and not (isinstance(self.top_k, numbers.Integral) and self.top_k >= 1):
            raise ConfigError(f"top_k={self.top_k} is not possible; choose a whole number from 1, or leave it out")
        for name, lowest in (("top_p", "more than 0"), ("min_p", "0 or more")):
            value = getattr(self, name)
            if value is not None and not (0 <= value <= 1 and (value > 0 or name == "min_p")):
                raise ConfigError(f"{name}={value} is not possible; choose {lowest} and at most 1")
        if self.temperature:
            return self
        filters = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}
        if given := [name for name, value in filters.items() if value is not None]:
            raise ConfigError(f"{', '.join(given)} has no effect at temperature 0 (greedy); set a temperature")
        return dataclasses.replace(self, temperature=None)


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    keys: Any,
    seen: Bool[Array, "B V"] | None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Next tokens and their log-probabilities under the model itself, before penalty, temperature and filters.

    `keys`: one random key per sequence. `seen`: tokens that the repetition penalty is about.
    """
    logits = logits.astype(jnp.float32)
    model = jax.nn.log_softmax(logits)
    if sampling.repetition_penalty is not None:
        assert seen is not None
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature is None:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        logits = _filter(logits / sampling.temperature, sampling)
        tokens = jax.vmap(jax.random.categorical)(keys, logits)
    return tokens.astype(jnp.int32), jnp.take_along_axis(model, tokens[:, None], axis=1)[:, 0]


def _filter(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    if sampling.top_k is not None:
        kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        within = (before < sampling.top_p) | (jnp.asarray(sampling.top_p) >= 1)  # float32 sums reach 1 too early
        kept = jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    if sampling.min_p is not None:
        floor = logits.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits
