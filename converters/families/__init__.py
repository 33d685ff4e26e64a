"""The model families: from a `config.json` to a `ModelConfig`, and from our parameter names to Hugging
Face's.

A family is one file; a new one is a new file and its name in `FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from converters.families.family import Family, read_dtype
from converters.families.fields import Fields
from converters.families.llama import LLAMA
from converters.families.mistral import MISTRAL
from converters.families.qwen2 import QWEN2
from converters.families.qwen3 import QWEN3
from converters.families.unsupported import refuse_unsupported
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of `architectures[0]`, or of `model_type` where the config names no architecture.

    Raises:
        ConfigError: an architecture that is unknown, missing, or contradicted by `model_type`.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    supported = ", ".join(family.architecture for family in FAMILIES)
    if architectures:
        name = architectures[0] if isinstance(architectures, list) else architectures
        family = next((family for family in FAMILIES if family.architecture == name), None)
        if family is None:
            raise ConfigError(f"architectures={architectures!r} is not supported; supported: {supported}")
        if model_type not in (None, family.model_type):
            raise ConfigError(
                f"model_type={model_type!r} contradicts architectures={architectures!r}; "
                f"its model_type is {family.model_type!r}"
            )
        return family
    if model_type is None:
        raise ConfigError(f"architectures is missing from config.json; supported: {supported}")
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        types = ", ".join(family.model_type for family in FAMILIES)
        raise ConfigError(f"model_type={model_type!r} is not supported; supported: {types}")
    return family


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """What the model computes, from the dict of a `config.json` as transformers 4 or 5 wrote it.

    Fields that are absent get transformers' default for the family. `dtype` is what the config says, bfloat16
    where it says nothing; a checkpoint then replaces it by what its tensors are.

    Raises:
        ConfigError: an architecture, RoPE scaling or field that changes the mathematics and is not supported;
            a required field that is missing; a value of the wrong type or out of range. The message names it.
    """
    fields = Fields(config)
    family = family_of(config)
    result = family.read(fields)
    refuse_unsupported(fields)
    return result


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The type of the weights that a `config.json` names; None where it names none."""
    return read_dtype(Fields(config))
