"""Qwen2 and Qwen2.5: defaults as in transformers' Qwen2Config. Query, key and value always have a bias."""

from converters.families.family import Family, read_model
from converters.families.fields import Fields
from converters.families.windows import windows_by_layer
from xquant_jax.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    for name in (
        "attention_bias",
        "qkv_bias",
    ):  # not fields of this family: they may only say what holds anyway
        if not fields.flag(name, True):
            raise fields.error(name, "query, key and value of a Qwen2ForCausalLM always have a bias")
    return read_model(
        fields,
        sliding_windows=windows_by_layer(fields, default_window=4096, default_full_layers=28),
        default_positions=32_768,
        default_kv_heads=32,
        qkv_bias=True,
    )


QWEN2 = Family("Qwen2ForCausalLM", "qwen2", _read)
