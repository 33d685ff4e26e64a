"""Rotary position embedding: the frequencies of every supported scaling, and the rotation itself.

Halves are rotated against each other (`rotate_half`), as Llama, Mistral and Qwen checkpoints expect.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from xquant_jax.errors import ConfigError
from xquant_jax.numerics.broadcast import along_last

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """RoPE of a model: base `theta` and the scaling that stretches it to longer contexts.

    `scaling` is `default`, `linear` (Chen et al. 2023, arXiv 2306.15595), `dynamic` (NTK-aware, growing with the
    sequence), `llama3` (Llama 3.1), `yarn` (Peng et al. 2023, arXiv 2309.00071) or `longrope` (Ding et al. 2024,
    arXiv 2402.13753); the fields below it belong to the scalings named.

    `dynamic` and `longrope` depend on the length of the sequence: `longest` says how far these frequencies hold, and
    `for_length` gives those of longer sequences where they are supported. Up to `original_positions` those of
    `dynamic` are the default ones; beyond, they would change with every token, which is not supported.
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_positions: int = 0  # dynamic, llama3, yarn, longrope: the context length of pretraining, in tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: correction range in whole dimensions
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    short_factors: tuple[float, ...] = ()  # longrope: what each pair's frequency is divided by ...
    long_factors: tuple[float, ...] = ()  # longrope: ... and in sequences longer than original_positions
    long: bool = False  # longrope: whether the sequences are longer than original_positions

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ConfigError(f"rope_type={self.scaling!r} is not supported; supported: {', '.join(SCALINGS)}")

    @property
    def longest(self) -> int | None:
        """The longest sequence that these frequencies are right for, in tokens; None where there is no limit."""
        limited = self.scaling == "dynamic" or (self.scaling == "longrope" and not self.long)
        return self.original_positions if limited else None

    def for_length(self, tokens: int) -> "Rope":
        """The RoPE of sequences of up to `tokens` tokens, prompt and answer together.

        One whose sequences grow from short to long must be asked for the longest at the start: LongRoPE's frequencies
        are those of the whole sequence, and what was rotated by others does not fit.

        Raises `ConfigError` for `dynamic` beyond `longest`.
        """
        if self.scaling == "longrope":
            return dataclasses.replace(self, long=tokens > self.original_positions)
        if self.longest is not None and tokens > self.longest:
            raise ConfigError(
                f"{tokens} tokens are more than max_position_embeddings={self.longest}, up to which rope_type="
                f"{self.scaling!r} is supported; prompt and new tokens together must be at most {self.longest}"
            )
        return self

    def check(self, tokens: int) -> None:
        """Raises `ConfigError` if these frequencies are not right for sequences of so many tokens."""
        if self.scaling == "longrope" and not self.long and tokens > self.original_positions:
            raise ConfigError(
                f"{tokens} tokens are more than original_max_position_embeddings={self.original_positions}, and beyond "
                f"rope_type='longrope' rotates all tokens otherwise; load the model with context={tokens} (--context)"
            )
        self.for_length(tokens)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each of the head_dim/2 pairs, in radians, float32."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        base = (1.0 / np.float32(self.theta) ** exponent).astype(np.float32)
        match self.scaling:
            case "linear":
                base = base / np.float32(self.factor)
            case "llama3":
                base = self._llama3(base)
            case "yarn":
                base = self._yarn(base, head_dim)
            case "longrope":
                base = base / np.array(self.long_factors if self.long else self.short_factors, np.float32)
        return base.astype(np.float32)

    def _llama3(self, base: np.ndarray) -> np.ndarray:
        wavelength = 2 * math.pi / base
        low = self.original_positions / self.low_freq_factor
        high = self.original_positions / self.high_freq_factor
        smooth = (self.original_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - smooth) * base / self.factor + smooth * base
        return np.where(wavelength > low, base / self.factor, np.where(wavelength < high, base, between))

    def _yarn(self, base: np.ndarray, head_dim: int) -> np.ndarray:
        def dimension(rotations: float) -> float:  # the pair that turns so often over the pretraining context
            return head_dim * math.log(self.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return base / self.factor * ramp + base * (1 - ramp)


def rotation(
    positions: Int[Array, "*positions"], frequencies: Float[Array, " half"]
) -> tuple[Float[Array, "*positions half"], Float[Array, "*positions half"]]:
    """Cosine and sine of `position * frequency`, float32."""
    angles = positions.astype(jnp.float32)[..., None]
    angles = angles * along_last(frequencies, angles)
    return jnp.cos(angles), jnp.sin(angles)


def turned(
    rotation: tuple[Float[Array, "*rest half"], Float[Array, "*rest half"]],
    by: tuple[Float[Array, "*#rest half"], Float[Array, "*#rest half"]],
) -> tuple[Float[Array, "*rest half"], Float[Array, "*rest half"]]:
    """Cosine and sine of the sum of two angles, from theirs."""
    (cos, sin), (cos_by, sin_by) = rotation, by
    return cos * cos_by - sin * sin_by, sin * cos_by + cos * sin_by


def rotate(
    x: Float[Array, "*rest d"], cos: Float[Array, "*#rest half"], sin: Float[Array, "*#rest half"]
) -> Float[Array, "*rest d"]:
    """Rotates pairs (i, i + d/2) of the last axis; computed in float32, returned in x's type."""

    def joined(first: Array, second: Array) -> Array:
        return jnp.concatenate([first, second], axis=-1)

    def stacked(first: Array, second: Array) -> Array:
        return jnp.stack([first, second], axis=-2).reshape(*first.shape[:-1], -1)

    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    halves = first * cos - second * sin, second * cos + first * sin
    # the same, but XLA for CPU computes only what is stacked in one loop, and XLA for TPU copies it
    return lax.platform_dependent(*halves, cpu=stacked, default=joined).astype(x.dtype)


def rotate_heads(
    x: Float[Array, "B T heads d"], positions: Int[Array, "#B T"], frequencies: Float[Array, " half"]
) -> Float[Array, "B T heads d"]:
    """Rotates every head of every token by the token's position."""
    cos, sin = rotation(positions, frequencies)
    return rotate(x, cos[:, :, None], sin[:, :, None])
