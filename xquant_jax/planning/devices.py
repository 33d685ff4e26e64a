"""What accelerators can do, by name: `devices.json`, or a file of the same form for others.

    {"name": {"tflops": dense bf16 rate, "gb_per_s": memory bandwidth, "memory_gib": capacity, "source": "..."}}

Rates are the vendors' published ones for matrices that are not sparse. Vendors write GB for a capacity that is counted
in powers of two.
"""

import dataclasses
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from xquant_jax.errors import ConfigError

NUMBERS = ("tflops", "gb_per_s", "memory_gib")


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip. `flops`: dense bf16 operations per second; `bandwidth`: bytes per second; `memory`: bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: int
    source: str

    @property
    def ridge(self) -> float:
        """FLOP per byte above which arithmetic takes longer than memory (Williams et al. 2009, the roofline)."""
        return self.flops / self.bandwidth

    def seconds(self, flops: Any, moved: Any) -> Any:
        """Time of work that does `flops` operations and moves so many bytes, perfectly overlapped. Arrays too."""
        arithmetic, memory = flops / self.flops, moved / self.bandwidth
        return (arithmetic + memory + abs(arithmetic - memory)) / 2  # the larger one


def find_device(name: str, path: Path | None = None) -> Device:
    """The device of that name, however it is spaced and capitalized, from `path` if given and else the known ones.

    Raises `ConfigError` for a name that is not there, and for a file that is not as described.
    """
    devices = read_devices(path)
    for device in devices:
        if _plain(device.name) == _plain(name):
            return device
    known = ", ".join(device.name for device in devices)
    where = f"in {path}: {known}" if path else f"known: {known}; a file of your own can name others (--devices)"
    raise ConfigError(f"device {name!r} is not known; {where}")


def read_devices(path: Path | None = None) -> list[Device]:
    """All devices of a file, by default those that the package knows."""
    text = (
        path.read_text(encoding="utf-8") if path else (files("xquant_jax.planning") / "devices.json").read_text("utf-8")
    )
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{path} must hold an object with a device a name")
    return [_device(path, name, entry) for name, entry in entries.items()]


def _device(path: Path | None, name: str, entry: Any) -> Device:
    if not isinstance(entry, dict) or not entry.keys() <= {*NUMBERS, "source"} or not entry.keys() >= {*NUMBERS}:
        raise ConfigError(f"{path}: {name!r} must have {', '.join(NUMBERS)}, and may have a source; it is {entry!r}")
    for field in NUMBERS:
        value = entry[field]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{path}: {name!r} has {field}={value!r}; it must be a number above 0")
    return Device(
        name,
        flops=1e12 * entry["tflops"],
        bandwidth=1e9 * entry["gb_per_s"],
        memory=int(2**30 * entry["memory_gib"]),
        source=str(entry.get("source", path)),
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
