"""Cache methods by name, and the specs that users type: `name[:bits][,option=value...]`."""

import dataclasses
from typing import Any

from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.methods.base import FactorSource, Method
from xquant_jax.methods.bf16 import BF16
from xquant_jax.methods.int8 import Int8
from xquant_jax.methods.xquant import XQuant

METHODS: dict[str, type[Method]] = {method.name: method for method in (BF16, Int8, XQuant)}


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How a model's cache is stored: a method, and how many of the first layers use other bits.

    `CacheConfig.parse("xquant:4,basis=joint,first=3@8")` reads what users type: `basis=` sets the bases of keys and
    values, `first=N@b` stores the first N layers at b bits; every other option is a field of the method.
    """

    method: Method
    first: tuple[int, int] | None = None  # layers, bits

    @classmethod
    def parse(cls, spec: "str | CacheConfig") -> "CacheConfig":
        """Raises `ConfigError` naming the part of the spec that cannot be honoured."""
        if isinstance(spec, CacheConfig):
            return spec
        head, *options = spec.split(",")
        name, colon, bits = head.partition(":")
        if name not in METHODS:
            raise ConfigError(f"cache method {name!r} is not known; choose one of {', '.join(METHODS)}")
        fields = {field.name: field for field in dataclasses.fields(METHODS[name])}  # pyright: ignore[reportArgumentType]
        values: dict[str, Any] = {}
        first = None
        seen: set[str] = set()
        if colon:
            options.insert(0, f"bits={bits}")
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise ConfigError(f"cache option {option!r} in {spec!r} has no value; write {option}=...")
            if key in seen:
                raise ConfigError(f"cache option {key} is given twice in {spec!r}")
            seen.add(key)
            if key == "first":
                first = _parse_first(value)
            elif key == "basis" and "key_basis" in fields:
                values |= {"key_basis": value, "value_basis": value}
            elif key in fields:
                values[key] = _integer(key, value) if fields[key].type is int else value
            else:
                known = [
                    *fields,
                    *(["basis"] if "key_basis" in fields else []),
                    *(["first"] if "bits" in fields else []),
                ]
                raise ConfigError(f"cache method {name} has no option {key!r}; it has {', '.join(known) or 'none'}")
        if first and "bits" not in fields:
            raise ConfigError(f"first={first[0]}@{first[1]} sets bits, and {name} has a fixed width")
        return cls(METHODS[name](**values), first)

    def segments(self, config: ModelConfig) -> list[tuple[Method, int]]:
        """Runs of layers with the same method: (method, number of layers). Checks the options against the model."""
        segments = [(self.method, config.num_layers)]
        if self.first:
            layers, bits = self.first
            if not 0 < layers < config.num_layers:
                raise ConfigError(f"first={layers}@{bits}: the model has {config.num_layers} layers")
            early: Any = dataclasses.replace(self.method, bits=bits)  # pyright: ignore[reportCallIssue, reportArgumentType]
            segments = [(early, layers), (self.method, config.num_layers - layers)]
        for method, _ in segments:
            method.streams(config)
        return segments

    def factors(self, source: FactorSource) -> tuple[Any, ...]:
        """One pytree per segment; its leaves have the leading axis L of the whole model."""
        return tuple(method.factors(source) for method, _ in self.segments(source.config))


def _parse_first(value: str) -> tuple[int, int]:
    layers, at, bits = value.partition("@")
    if not at:
        raise ConfigError(f"first={value} must be LAYERS@BITS, for example first=3@4")
    return _integer("first", layers), _integer("first", bits)


def _integer(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{key}={value} is not a whole number") from None


__all__ = ["METHODS", "CacheConfig", "Method"]
