"""Qwen3 (dense): defaults as in transformers' Qwen3Config. Queries and keys are normed per head."""

from converters.families.family import Family, read_model
from converters.families.fields import Fields
from converters.families.windows import windows_by_layer
from xquant_jax.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias", False)  # all four projections
    return read_model(
        fields,
        sliding_windows=windows_by_layer(fields, default_window=4096, default_full_layers=28),
        default_positions=32_768,
        default_kv_heads=32,
        default_head_dim=128,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
    )


QWEN3 = Family("Qwen3ForCausalLM", "qwen3", _read)
