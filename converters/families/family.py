"""What a model family is to us, and what the families share: fields and names of Llama-like checkpoints."""

import dataclasses
from collections.abc import Callable, Mapping

from converters.families.fields import Fields
from converters.families.rope import read_rope
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError

# From the paths of our parameter tree to Hugging Face's names; those of a layer follow `model.layers.{i}.`.
LAYER_NAMES: Mapping[str, str] = {
    "attention_norm.scale": "input_layernorm.weight",
    "query.kernel": "self_attn.q_proj.weight",
    "query.bias": "self_attn.q_proj.bias",
    "key.kernel": "self_attn.k_proj.weight",
    "key.bias": "self_attn.k_proj.bias",
    "value.kernel": "self_attn.v_proj.weight",
    "value.bias": "self_attn.v_proj.bias",
    "output.kernel": "self_attn.o_proj.weight",
    "output.bias": "self_attn.o_proj.bias",
    "query_norm.scale": "self_attn.q_norm.weight",
    "key_norm.scale": "self_attn.k_norm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "gate.kernel": "mlp.gate_proj.weight",
    "gate.bias": "mlp.gate_proj.bias",
    "up.kernel": "mlp.up_proj.weight",
    "up.bias": "mlp.up_proj.bias",
    "down.kernel": "mlp.down_proj.weight",
    "down.bias": "mlp.down_proj.bias",
}
OUTER_NAMES: Mapping[str, str] = {
    "embed.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers: how its config is read and how its tensors are called."""

    architecture: str  # as in `architectures`
    model_type: str
    read: Callable[[Fields], ModelConfig]
    layer_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LAYER_NAMES)
    outer_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: OUTER_NAMES)


def read_model(
    fields: Fields,
    *,
    sliding_windows: tuple[int | None, ...],
    default_positions: int,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """The fields that all families share; what differs is an argument.

    Args:
        fields: the whole config.
        sliding_windows: tokens that each layer looks back, itself included; None is all.
        default_positions: `max_position_embeddings` where absent, in tokens.
        default_kv_heads: `num_key_value_heads` where absent; None, and `null` in the config: as many as
            queries.
        default_head_dim: `head_dim` where absent; None: hidden_size / num_attention_heads.

    Raises:
        ConfigError: a required field is missing, or a value is of the wrong type, out of range or
            unsupported.
    """
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if fields.raw("head_dim") is None and default_head_dim is None and width % num_heads:
        raise fields.error("hidden_size", f"without head_dim it must be a multiple of num_attention_heads={num_heads}")
    head_dim = fields.integer("head_dim", default_head_dim or width // num_heads)
    fields.choice("hidden_act", "silu", ("silu", "swish"))
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer_or_null("num_key_value_heads", default_kv_heads) or num_heads,
        head_dim=head_dim,
        mlp_width=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=read_rope(fields, head_dim, default_positions),
        sliding_windows=sliding_windows,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        dtype=read_dtype(fields) or "bfloat16",
    )


def read_dtype(fields: Fields) -> str | None:
    """`dtype` (transformers 5) or `torch_dtype` (4); None where neither is said, or `auto`."""
    name = "dtype" if fields.raw("dtype") is not None else "torch_dtype"
    value = fields.raw(name)
    stem = value.removeprefix("torch.") if isinstance(value, str) else value
    if stem in (None, "auto"):
        return None
    if stem not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"{name}={value!r} is not supported; supported: bfloat16, float16, float32")
    return stem
