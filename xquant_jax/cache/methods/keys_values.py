"""What the methods that store keys and values themselves have in common; each says only how they are stored."""

from typing import Any

from jaxtyping import Array

from pallas_kernels import KeyRebuild
from xquant_jax.cache.methods.base import Absorbed, FactorSource, Method, NewTokens
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.rope import rotate_heads


class KeysValues(Method):
    """Streams `key` (before RoPE, unless `keys_rotated`) and `value`, R wide each, head after head.

    Keys before RoPE are stored without the projection's bias, which is added again when they are read: where it is
    large (Qwen2), codes would otherwise be spent on a constant.
    """

    def by_head(self, config: ModelConfig) -> bool:
        return True

    def method_params(self, source: FactorSource, number: int) -> Any:
        plain = self.keys_rotated or source.config.qk_norm  # its mean is no longer the bias
        return {"key": {"bias": source.layers["key"]["bias"]}} if source.config.qkv_bias and not plain else {}

    def encode(self, method_params: Any, new: NewTokens) -> dict[str, Array]:
        k = new.k
        if (bias := _bias(method_params)) is not None:
            k = k - bias.astype(k.dtype).reshape(1, 1, *k.shape[2:])
        if self.keys_rotated:
            k = rotate_heads(k, new.geometry.positions, new.geometry.frequencies)
        return {"key": flat(k), "value": flat(new.v)}

    def rebuild(self, method_params: Any, vectors: dict[str, Array], config: ModelConfig) -> tuple[Array, Array]:
        k = KeyRebuild(bias=_bias(method_params))(vectors["key"], config.num_kv_heads)
        return k, split(vectors["value"], config)

    def absorbed(self, method_params: Any, config: ModelConfig) -> Absorbed | None:
        return Absorbed("key", KeyRebuild(bias=_bias(method_params)), "value", config.num_kv_heads)


def _bias(method_params: Any) -> Array | None:
    """[R], of the keys that are stored without it."""
    return method_params.get("key", {}).get("bias")


def flat(heads: Array) -> Array:
    """[B, T, K, d] -> [B, T, K d]."""
    return heads.reshape(*heads.shape[:2], -1)


def split(vectors: Array, config: ModelConfig) -> Array:
    """[B, S, K d] -> [B, S, K, d]."""
    return vectors.reshape(*vectors.shape[:2], config.num_kv_heads, config.head_dim)
