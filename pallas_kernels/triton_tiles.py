"""Tile sizes of the Triton kernels: measured ones from a table, by device and shape, and a rule where there are none.

`scripts/bench_decode.py --tune` measures them and writes the table.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax

TABLE = Path(__file__).with_name("triton_tiles.json")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: blocks of 128 tokens and channels of a dense rebuild at once, warps, pipeline stages."""

    blocks: int = 1
    chunk: int = 64
    warps: int = 4
    stages: int = 2


def choose(kernel: str, form: str, dim: int, bits: int, queries: int) -> Tiles:
    """Tiles of a kernel: of the table if it has this device and shape."""
    known = _table().get(device_kind(), {}).get(key(kernel, form, dim, bits, queries))
    return Tiles(**known) if known else by_rule(form)


def by_rule(form: str) -> Tiles:
    """What the compiler turns into code without spills; a dense rebuild needs tall tiles to use a matrix often."""
    return Tiles(blocks=2, warps=8) if form == "dense" else Tiles()


def key(kernel: str, form: str, dim: int, bits: int, queries: int) -> str:
    """The name of a shape in the table."""
    return f"{kernel} {form} d={dim} bits={bits} queries={queries}"


def device_kind() -> str:
    """The name of the first GPU, or of the CPU where kernels are interpreted or compiled ahead of time."""
    return jax.local_devices()[0].device_kind


def multiprocessors() -> int:
    """Of the first GPU; of an A100 where there is none."""
    return getattr(jax.local_devices()[0], "core_count", None) or 108


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text())
