"""How many tokens each layer looks back, as the families' configs say it; None is all of them."""

from converters.families.fields import Fields

Windows = tuple[int | None, ...]
_LAYER_TYPES = ("full_attention", "sliding_attention")


def no_windows(fields: Fields) -> Windows:
    """Every layer sees everything (Llama); `layer_types` that say otherwise are an error.

    So is a `sliding_window`, which transformers would ignore, unless `use_sliding_window` is there and false.
    """
    num_layers = fields.integer("num_hidden_layers")
    _require(fields, ["full_attention"] * num_layers)
    if fields.flag("use_sliding_window", False):
        raise fields.error("use_sliding_window", "this architecture has no sliding windows; it must be absent or false")
    if fields.raw("use_sliding_window") is False:
        fields.raw("sliding_window")  # of any size: it is off
    return (None,) * num_layers


def one_window(fields: Fields, default: int) -> Windows:
    """One `sliding_window` for all layers; an explicit `null` turns it off (Mistral)."""
    num_layers = fields.integer("num_hidden_layers")
    window = fields.integer_or_null("sliding_window", default)
    _require(fields, ["full_attention" if window is None else "sliding_attention"] * num_layers)
    return (window,) * num_layers


def windows_by_layer(fields: Fields, default_window: int, default_full_layers: int) -> Windows:
    """Windows where `layer_types` says so, else in layers from `max_window_layers` up (Qwen2, Qwen3)."""
    num_layers = fields.integer("num_hidden_layers")
    full_layers = fields.integer("max_window_layers", default_full_layers, least=0)
    window = fields.integer_or_null("sliding_window", default_window)
    if not fields.flag("use_sliding_window", False):
        window = None
    types = _layer_types(fields, num_layers)
    if types is None:
        return tuple(window if layer >= full_layers else None for layer in range(num_layers))
    if window is None and "sliding_attention" in types:
        raise fields.error("layer_types", "sliding_attention needs use_sliding_window=true and a sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _layer_types(fields: Fields, num_layers: int) -> list[str] | None:
    types = fields.raw("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or any(kind not in _LAYER_TYPES for kind in types):
        raise fields.error("layer_types", f"supported in it: {', '.join(_LAYER_TYPES)}")
    if len(types) != num_layers:
        raise fields.error("layer_types", f"it must name all of num_hidden_layers={num_layers}")
    return types


def _require(fields: Fields, expected: list[str]) -> None:
    types = _layer_types(fields, len(expected))
    if types is not None and types != expected:
        raise fields.error("layer_types", f"this architecture supports only {expected[0]} with its sliding_window")
