"""One transformer layer and its parameters, for every family that `ModelConfig` describes.

The module owns parameters only. How queries meet keys and values, and what is cached, is passed in as `attend`.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from xquant_jax.config import ModelConfig
from xquant_jax.sharding import constrain, tokens_axis

Attend = Callable[..., tuple[Array, Any]]
"""(h [B, T, D], x [B, T, D], q [B, T, H, d], k [B, T, K, d], v [B, T, K, d]) -> attention output [B, T, H, d] and what
to emit.

h is the layer's attention input before its norm and x after it; q and k are after any QK-norm and before RoPE.
"""


class Block(nn.Module):
    """RMSNorm, attention, RMSNorm, SwiGLU."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config

        def dense(features: int, bias: bool) -> nn.Dense:
            return nn.Dense(features, use_bias=bias, param_dtype=c.dtype)

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=c.norm_eps, param_dtype=c.dtype)

        self.attention_norm = norm()
        self.query = dense(c.num_heads * c.head_dim, c.qkv_bias)
        self.key = dense(c.kv_width, c.qkv_bias)
        self.value = dense(c.kv_width, c.qkv_bias)
        self.output = dense(c.width, c.output_bias)
        if c.qk_norm:
            self.query_norm = norm()
            self.key_norm = norm()
        self.mlp_norm = norm()
        self.gate = dense(c.mlp_width, c.mlp_bias)
        self.up = dense(c.mlp_width, c.mlp_bias)
        self.down = dense(c.width, c.mlp_bias)

    def __call__(self, h: Float[Array, "B T D"], attend: Attend) -> tuple[Float[Array, "B T D"], Any]:
        x = self.attention_norm(h)
        tokens = tokens_axis(h.shape[1])
        q, k, v = (self._heads(project(x), tokens) for project in (self.query, self.key, self.value))
        k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))  # all new queries meet all new keys
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        attended, emitted = attend(h, x, q, k, v)
        h = constrain(h + self.output(attended.astype(h.dtype).reshape(*h.shape[:2], -1)), "batch", tokens, None)
        y = self.mlp_norm(h)
        inner = constrain(jax.nn.silu(self.gate(y)) * self.up(y), "batch", tokens, "mlp")
        return constrain(h + self.down(inner), "batch", tokens, None), emitted

    def _heads(self, a: Float[Array, "B T N"], tokens: str | None) -> Float[Array, "B T heads d"]:
        return constrain(a.reshape(*a.shape[:2], -1, self.config.head_dim), "batch", tokens, "heads", None)
