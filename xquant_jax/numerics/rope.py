"""Rotary position embedding: the frequencies of every supported scaling, and the rotation itself.

Halves are rotated against each other (`rotate_half`), as Llama, Mistral and Qwen checkpoints expect.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xquant_jax.errors import ConfigError
from xquant_jax.numerics.broadcast import along_last


@dataclasses.dataclass(frozen=True)
class Rope:
    """RoPE of a model: base `theta` and the scaling that stretches it to longer contexts.

    `scaling` is `default`, `linear` (Chen et al. 2023, arXiv 2306.15595), `llama3` (Llama 3.1) or
    `yarn` (Peng et al. 2023, arXiv 2309.00071); the fields below it belong to the scalings named.
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_positions: int = 0  # llama3, yarn: the context length of pretraining, in tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: correction range in whole dimensions
    attention_factor: float = 1.0  # yarn: multiplies cos and sin

    def __post_init__(self) -> None:
        if self.scaling not in ("default", "linear", "llama3", "yarn"):
            raise ConfigError(f"rope_type={self.scaling!r} is not supported; supported: default, linear, llama3, yarn")

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


def rotate(
    x: Float[Array, "*rest d"], cos: Float[Array, "*#rest half"], sin: Float[Array, "*#rest half"]
) -> Float[Array, "*rest d"]:
    """Rotates pairs (i, i + d/2) of the last axis; computed in float32, returned in x's type."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_heads(
    x: Float[Array, "B T heads d"], positions: Int[Array, "#B T"], frequencies: Float[Array, " half"]
) -> Float[Array, "B T heads d"]:
    """Rotates every head of every token by the token's position."""
    cos, sin = rotation(positions, frequencies)
    return rotate(x, cos[:, :, None], sin[:, :, None])
