"""Typed reading of a `config.json`: every error names the field, its value and what is accepted.

A field that has been read is supported; `unread` lists the others, which `unsupported` then looks at.
"""

import math
from collections.abc import Mapping
from typing import Any

from xquant_jax.errors import ConfigError


class Fields:
    """The fields of one JSON object. `null` counts as absent, except for `integer_or_null`."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = values
        self._where = where  # how the error names the object around the field: "rope_parameters."
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the field is there, be it as `null`."""
        return name in self._values

    def raw(self, name: str) -> Any:
        """The field as it stands, None if absent."""
        self._read.add(name)
        return self._values.get(name)

    def unread(self) -> dict[str, Any]:
        """The fields that nobody asked for, without those that are `null`."""
        return {name: value for name, value in self._values.items() if name not in self._read and value is not None}

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`; without a default the field is required."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, f"it must be a whole number of at least {least}")
        return value

    def integer_or_null(self, name: str, default: int | None) -> int | None:
        """A positive whole number; an explicit `null` is None, and only an absent field is the default."""
        if self.has(name) and self.raw(name) is None:
            return None
        return None if default is None and not self.has(name) else self.integer(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero; without a default the field is required."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "it must be a number")
        if not (math.isfinite(value) and value > 0):
            raise self.error(name, "it must be finite and above zero")
        return float(value)

    def numbers(self, name: str, count: int, what: str) -> tuple[float, ...]:
        """A list of `count` finite numbers above zero, required; `what` says in errors why there are so many."""
        values = self._present(name, None)
        if not isinstance(values, list) or len(values) != count:
            raise self.error(name, f"it must be a list of {count} numbers, {what}")
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, int | float) or not 0 < v < math.inf]
        if wrong:
            raise self.error(name, f"{wrong[0]!r} in it is not a finite number above zero")
        return tuple(map(float, values))

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        """One of the strings in `choices`."""
        value = self._present(name, default)
        if value not in choices:
            raise self.error(name, f"supported: {', '.join(choices)}")
        return value

    def error(self, name: str, rule: str) -> ConfigError:
        """The error for a field whose value breaks `rule`."""
        return ConfigError(f"{self._where}{name}={self._values.get(name)!r} is not supported; {rule}")

    def _present(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self._where}{name} is missing from config.json; it is required")
        return value
