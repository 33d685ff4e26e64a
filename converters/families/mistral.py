"""Mistral: defaults as in transformers' MistralConfig. One sliding window for all layers."""

from converters.families.family import Family, read_model
from converters.families.fields import Fields
from converters.families.windows import one_window
from xquant_jax.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    return read_model(
        fields,
        sliding_windows=one_window(fields, default=4096),
        default_positions=131_072,
        default_kv_heads=8,
    )


MISTRAL = Family("MistralForCausalLM", "mistral", _read)
