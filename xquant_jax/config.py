"""What a model is: the sizes and options that the forward pass depends on.

Reading them from a `config.json` is the business of `converters.families`, one file per family.
"""

import dataclasses

from xquant_jax.errors import ConfigError
from xquant_jax.numerics.rope import Rope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind. Shape letters as in the field: D, L, H, K, d, F."""

    vocab_size: int
    width: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # d
    mlp_width: int  # F
    norm_eps: float
    rope: Rope
    sliding_windows: tuple[int | None, ...]  # tokens each layer looks back, itself included; None: all
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"  # of the weights in the checkpoint

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly; "
                f"num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs, so it must be even")
        if len(self.sliding_windows) != self.num_layers:
            raise ConfigError(f"{len(self.sliding_windows)} sliding windows given for {self.num_layers} layers")

    @property
    def kv_width(self) -> int:
        """R = K d, the width of all keys (and of all values) of one token."""
        return self.num_kv_heads * self.head_dim

    @property
    def is_multi_head(self) -> bool:
        """Whether every query head has its own key/value head (K = H)."""
        return self.num_kv_heads == self.num_heads

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores: 1/sqrt(d), times YaRN's attention factor once for the query and once for the key."""
        return self.rope.attention_factor**2 / self.head_dim**0.5
