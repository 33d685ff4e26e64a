"""What the methods that store keys and values themselves have in common; each says only how they are stored."""

from typing import Any

from jaxtyping import Array

from pallas_kernels import KeyRebuild
from xquant_jax.cache.methods.base import Absorbed, Method, NewTokens
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.rope import rotate_heads


class KeysValues(Method):
    """Streams `key` (before RoPE, unless `keys_rotated`) and `value`, R wide each, head after head."""

    def by_head(self, config: ModelConfig) -> bool:
        return True

    def encode(self, method_params: Any, new: NewTokens) -> dict[str, Array]:
        k = new.k
        if self.keys_rotated:
            k = rotate_heads(k, new.geometry.positions, new.geometry.frequencies)
        return {"key": flat(k), "value": flat(new.v)}

    def rebuild(self, method_params: Any, vectors: dict[str, Array], config: ModelConfig) -> tuple[Array, Array]:
        return split(vectors["key"], config), split(vectors["value"], config)

    def absorbed(self, method_params: Any, config: ModelConfig) -> Absorbed | None:
        return Absorbed("key", KeyRebuild(), "value", config.num_kv_heads)


def flat(heads: Array) -> Array:
    """[B, T, K, d] -> [B, T, K d]."""
    return heads.reshape(*heads.shape[:2], -1)


def split(vectors: Array, config: ModelConfig) -> Array:
    """[B, S, K d] -> [B, S, K, d]."""
    return vectors.reshape(*vectors.shape[:2], config.num_kv_heads, config.head_dim)
