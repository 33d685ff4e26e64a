"""RoPE of a `config.json`: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).

Where both say something, the precedence is that of transformers 5 (`modeling_rope_utils`).
"""

import math
from collections.abc import Mapping

from converters.families.fields import Fields
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.rope import SCALINGS, Rope

_KNOWN = {
    *(
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    ),
    *("low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    *("short_factor", "long_factor"),
    "finetuned",  # a remark that the first YaRN checkpoints carry
}


def read_rope(fields: Fields, head_dim: int, default_positions: int) -> Rope:
    """The rotary embedding that the config describes.

    Args:
        fields: the whole config.
        head_dim: of the model; LongRoPE has a factor for each of its pairs.
        default_positions: `max_position_embeddings` of the family, in tokens, where the config has none.

    Raises:
        ConfigError: an unsupported `rope_type`, an unknown key, or a value out of range.
    """
    positions = fields.integer("max_position_embeddings", default_positions)
    theta = fields.number("rope_theta", 10_000.0)
    where, values = _scaling(fields)
    scaling = Fields(values, f"{where}.")
    _refuse_unknown(scaling, values)

    kind = scaling.raw("rope_type") or scaling.raw("type") or "default"
    if kind not in SCALINGS:
        raise ConfigError(f"rope_type={kind!r} in {where} is not supported; supported: {', '.join(SCALINGS)}")
    theta = scaling.number("rope_theta", theta)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "longrope":
        return _longrope(scaling, theta, head_dim, positions, _original_positions(fields, scaling, positions))

    factor = scaling.number("factor")
    if kind == "linear":
        return Rope(theta=theta, scaling=kind, factor=factor)
    if kind == "dynamic":  # transformers looks at no other context length
        return Rope(theta, kind, factor, original_positions=positions)

    original = _original_positions(fields, scaling, positions)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if high <= low:
            raise scaling.error("high_freq_factor", f"it must be above low_freq_factor={low:g}")
        return Rope(theta, kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    return Rope(
        theta,
        kind,
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=_yarn_attention_factor(scaling, factor),
    )


def _longrope(scaling: Fields, theta: float, head_dim: int, positions: int, original: int) -> Rope:
    """LongRoPE; its attention factor, unless given, is that of transformers, for long and short sequences alike."""
    factor = scaling.number("factor", positions / original)
    if scaling.raw("attention_factor") is not None:
        attention_factor = scaling.number("attention_factor")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    pairs = f"one for each of the head_dim/2={head_dim // 2} pairs that rotate"
    return Rope(
        theta,
        "longrope",
        original_positions=original,
        attention_factor=attention_factor,
        short_factors=scaling.numbers("short_factor", head_dim // 2, pairs),
        long_factors=scaling.numbers("long_factor", head_dim // 2, pairs),
    )


def _original_positions(fields: Fields, scaling: Fields, positions: int) -> int:
    """The context length of pretraining: what stands beside the RoPE parameters beats what stands among them."""
    if fields.raw("original_max_position_embeddings") is not None:
        return fields.integer("original_max_position_embeddings", least=2)
    return scaling.integer("original_max_position_embeddings", positions, least=2)


def _scaling(fields: Fields) -> tuple[str, Mapping]:
    """The name and content of the RoPE object in use."""
    parameters, scaling = fields.raw("rope_parameters"), fields.raw("rope_scaling")
    name, values = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters or {})
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}={values!r} is not supported; it must be an object with rope_type")
    nested = [key for key, value in values.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"{name} has its own RoPE per layer type ({', '.join(nested)}), which is not supported; "
            f"supported: one set of RoPE parameters for all layers"
        )
    return name, values


def _refuse_unknown(scaling: Fields, values: Mapping) -> None:
    for key, value in values.items():
        if key not in _KNOWN and value is not None:
            raise scaling.error(key, f"known RoPE parameters: {', '.join(sorted(_KNOWN))}")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.error("partial_rotary_factor", "supported: 1.0, all of the head rotates")


def _yarn_attention_factor(scaling: Fields, factor: float) -> float:
    """What cos and sin are multiplied by: given, or from mscale, or 0.1 ln(factor) + 1 (the YaRN paper)."""

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.raw("attention_factor") is not None:
        return scaling.number("attention_factor")
    if scaling.raw("mscale") and scaling.raw("mscale_all_dim"):
        return temperature(scaling.number("mscale")) / temperature(scaling.number("mscale_all_dim"))
    return temperature(1.0)
