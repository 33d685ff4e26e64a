"""Llama (1, 2, 3): defaults as in transformers' LlamaConfig."""

from converters.families.family import Family, read_model
from converters.families.fields import Fields
from converters.families.windows import no_windows
from xquant_jax.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias", False)  # all four projections
    return read_model(
        fields,
        sliding_windows=no_windows(fields),
        default_positions=2048,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


LLAMA = Family("LlamaForCausalLM", "llama", _read)
