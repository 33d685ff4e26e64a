"""The ordinary cache, for comparison: keys after RoPE and values, not quantized."""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array

from pallas_kernels import KeyRebuild
from xquant_jax import rope
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.methods.base import Absorbed, Method, NewTokens
from xquant_jax.quantization import UNQUANTIZED, StreamSpec


@dataclasses.dataclass(frozen=True)
class BF16(Method):
    """Stores k after RoPE and v as they are. `dtype=float32` stores them exactly in a float32 model."""

    name: ClassVar[str] = "bf16"
    keys_rotated: ClassVar[bool] = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"dtype={self.dtype} is not supported; choose bfloat16 or float32")

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        spec = StreamSpec(config.kv_width, UNQUANTIZED, dtype=self.dtype)
        return {"key": spec, "value": spec}

    def encode(self, factors: Any, new: NewTokens) -> dict[str, Array]:
        k = rope.rotate_heads(new.k, new.geometry.positions, new.geometry.frequencies)
        return {"key": flat(k), "value": flat(new.v)}

    def rebuild(self, factors: Any, vectors: dict[str, Array], config: ModelConfig) -> tuple[Array, Array]:
        return split(vectors["key"], config), split(vectors["value"], config)

    def absorbed(self, factors: Any, config: ModelConfig) -> Absorbed:
        return Absorbed("key", KeyRebuild(), "value", config.num_kv_heads)


def flat(heads: Array) -> Array:
    """[B, T, K, d] -> [B, T, K d]."""
    return heads.reshape(*heads.shape[:2], -1)


def split(vectors: Array, config: ModelConfig) -> Array:
    """[B, S, K d] -> [B, S, K, d]."""
    return vectors.reshape(*vectors.shape[:2], config.num_kv_heads, config.head_dim)
