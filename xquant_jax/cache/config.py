"""Cache methods by name, and the specs that users type: `name[:bits][,option=value...]`."""

import dataclasses
import itertools
import re
import typing
from typing import Any

from xquant_jax.cache.methods.base import FactorSource, Method
from xquant_jax.cache.methods.bf16 import BF16
from xquant_jax.cache.methods.fp8 import FP8
from xquant_jax.cache.methods.int8 import Int8
from xquant_jax.cache.methods.kivi import KIVI
from xquant_jax.cache.methods.kvquant import KVQuant
from xquant_jax.cache.methods.xquant import XQuant
from xquant_jax.cache.methods.xquant_cl import XQuantCL
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (BF16, Int8, FP8, KIVI, KVQuant, XQuant, XQuantCL)
}


@dataclasses.dataclass(frozen=True, order=True)
class LayerBits:
    """Other bits for some layers, counted from 0, the last one included: `5=2` or `0-2=8`."""

    first: int
    last: int
    bits: int

    @classmethod
    def parse(cls, text: str) -> "LayerBits":
        match = re.fullmatch(r"(\d+)(?:-(\d+))?=(\d+)", text)
        if match is None:
            raise ConfigError(f"bits: {text!r} must be LAYER=BITS or FIRST-LAST=BITS, for example 5=2 or 0-2=8")
        first, last, bits = match.groups()
        part = cls(int(first), int(last or first), int(bits))
        if part.last < part.first:
            raise ConfigError(f"bits: {text!r} runs backwards; write {last}-{first}={bits}")
        return part

    def __str__(self) -> str:
        layers = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{layers}={self.bits}"


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How a model's cache is stored: a method, and other bits for some of the layers.

    What users type, and what `str` gives back:

        spec   = name [":" bits] {"," option "=" value}
        bits   = b {";" layers "=" b}     the layers named at other bits than the rest
        layers = N | M "-" N              counted from 0; M to N, both included

    `xquant:4`, `kivi:2,group=32`, `xquant:4;0-2=8;5=2`. `bits=4;0-2=8` may also stand among the options. Two options
    are short for others: `first=N@b` for layers 0 to N-1 at b bits (xquant-cl has one of its own of that name), and
    `basis=` for the bases of keys and values; every other one is a field of the method. In a shell, quote a spec that
    has a semicolon.
    """

    method: Method
    layer_bits: tuple[LayerBits, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_bits", tuple(sorted(self.layer_bits)))
        for one, two in itertools.pairwise(self.layer_bits):
            if two.first <= one.last:
                raise ConfigError(f"bits: {one} and {two} both name layer {two.first}; name every layer once")
        if self.layer_bits and "bits" not in _options(type(self.method)):
            raise ConfigError(f"bits {self.layer_bits[0]}: {self.method.name} has a fixed width")

    @classmethod
    def parse(cls, spec: "str | CacheConfig") -> "CacheConfig":
        """Raises `ConfigError` naming the part of the spec that cannot be honoured."""
        if isinstance(spec, CacheConfig):
            return spec
        if not isinstance(spec, str):
            raise ConfigError(f"cache={spec!r} is not possible; give a text such as xquant:4, or a CacheConfig")
        head, *options = spec.split(",")
        name, colon, bits = head.partition(":")
        if name not in METHODS:
            raise ConfigError(f"cache method {name!r} is not known; choose one of {', '.join(METHODS)}")
        fields = _options(METHODS[name])
        short = [*(["basis"] if "key_basis" in fields else []), *(["first"] if "bits" in fields else [])]
        known = dict.fromkeys([*fields, *short])
        if colon:
            options.insert(0, f"bits={bits}")
        given: dict[str, str] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise ConfigError(f"cache option {option!r} in {spec!r} has no value; write {option}=...")
            if key not in known and key != "first":
                raise ConfigError(f"cache method {name} has no option {key!r}; it has {', '.join(known) or 'none'}")
            for field in ("key_basis", "value_basis") if key == "basis" and "basis" not in fields else (key,):
                if field in given:
                    raise ConfigError(f"cache spec {spec!r} gives {field} twice")
                given[field] = value
        layer_bits: tuple[LayerBits, ...] = ()
        if "first" in given and "first" not in fields:
            number, bits = _parse_first(value := given.pop("first"))
            if "bits" not in fields:
                raise ConfigError(f"first={value} sets bits, and {name} has a fixed width")
            layer_bits = (LayerBits(0, number - 1, bits),)
        if "bits" in given:
            given["bits"], *parts = given["bits"].split(";")
            layer_bits += tuple(LayerBits.parse(part) for part in parts)
            if "=" in given["bits"]:
                raise ConfigError(f"bits={given['bits']} leaves the other layers open; write bits=4;{given['bits']}")
        values = {key: _convert(key, value, fields[key]) for key, value in given.items()}
        return cls(METHODS[name](**values), layer_bits)

    def __str__(self) -> str:
        fields = _options(type(self.method))
        values = {name: getattr(self.method, name) for name in fields}
        spec = self.method.name
        if "bits" in values:
            spec += ":" + ";".join([str(values.pop("bits")), *map(str, self.layer_bits)])
        options = {name: value for name, value in values.items() if value != fields[name].default}
        if "key_basis" in options and options["key_basis"] == options.get("value_basis"):
            options["basis"] = options.pop("key_basis")
            del options["value_basis"]
        return ",".join([spec, *(f"{name}={_typed(value)}" for name, value in options.items())])

    def segments(self, config: ModelConfig) -> list[tuple[Method, int]]:
        """Runs of layers with the same method: (method, number of layers). Checks the options against the model."""
        layers: list[Any] = []
        for method, count in self.method.layers(config):
            layers += [method] * count
        for part in self.layer_bits:
            if part.last >= len(layers):
                raise ConfigError(f"bits {part}: the model has {len(layers)} layers, 0 to {len(layers) - 1}")
            for i in range(part.first, part.last + 1):
                layers[i] = dataclasses.replace(layers[i], bits=part.bits)
        segments = [(method, len(list(run))) for method, run in itertools.groupby(layers)]
        for method, _ in segments:
            method.streams(config)
        return segments

    def method_params(self, source: FactorSource) -> tuple[Any, ...]:
        """One pytree per segment; its leaves have a leading axis from layer 0 to the segment's last, at least."""
        segments = self.segments(source.config)
        ends = itertools.accumulate(layers for _, layers in segments)
        # the last first: it needs the most layers, whose factors serve the others
        found = [
            method.method_params(source, end) for (method, _), end in reversed([*zip(segments, ends, strict=True)])
        ]
        return tuple(reversed(found))


def _options(method: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """A method's options by name."""
    return {field.name: field for field in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]


def _convert(key: str, value: str, field: dataclasses.Field[Any]) -> Any:
    """What was typed, as the type of the option: `bool`, `int`, `float` or `str`, also with `| None`; or layers and
    bits."""
    if key == "first":
        return _parse_first(value)
    kinds = typing.get_args(field.type) or (field.type,)
    if bool in kinds:
        if value not in ("true", "false"):
            raise ConfigError(f"{key}={value} is not supported; choose true or false")
        return value == "true"
    if int in kinds:
        return _number(key, value)
    if float in kinds:
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{key}={value} is not a number") from None
    return value


def _parse_first(value: str) -> tuple[int, int]:
    layers, at, bits = value.partition("@")
    if not at:
        raise ConfigError(f"first={value} must be LAYERS@BITS, for example first=3@4")
    number = _number("first", layers)
    if number < 1:
        raise ConfigError(f"first={value} names no layer; choose 1 or more, or leave it out")
    return number, _number("first", bits)


def _typed(value: Any) -> str:
    """The value of an option as users type it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "@".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _number(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{key}={value} is not a whole number") from None


__all__ = ["METHODS", "CacheConfig", "LayerBits", "Method"]
