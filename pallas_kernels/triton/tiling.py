"""Tile sizes of the Triton kernels: measured ones from a table, by device and shape, and a rule where there are none.

`benchmarks.decode.run --tune` measures them. The rule takes what compiles without spills in the
innermost loops; `tests/pallas_kernels/test_triton_compiled.py` holds it to that.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import chips, target

TABLE = Path(__file__).with_name("tiles.json")

TILES_PER_SPLIT = 4
"""At least: less work does not pay for a program of its own."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel is cut.

    blocks: of 128 tokens, in a tile
    chunk: channels of a rebuild at once; 0: all of a head's, and its matrix stays in shared memory
    fused: whether one kernel does keys and values, if it can
    """

    blocks: int = 1
    chunk: int = 0
    warps: int = 4
    stages: int = 2
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """What tiles depend on. kernel: decode, values, project or sum; form: of the rebuild; queries: of a program; width:
    of the stream."""

    kernel: str
    form: str = ""
    dim: int = 0
    bits: int = 4
    queries: int = 0
    norm: bool = False
    width: int = 0

    def __str__(self) -> str:
        cut = f"d={self.dim} bits={self.bits} queries={self.queries} norm={self.norm} width={self.width}"
        return f"{self.kernel} {self.form} {cut}"


def choose(shape: Shape) -> Tiles:
    """Tiles of a kernel: of the table if it has this device and shape, else by the rule."""
    known = _table().get(jax.local_devices()[0].device_kind, {}).get(str(shape))
    return Tiles(**known) if known else by_rule(shape, capability() or 9.0)


def by_rule(shape: Shape, capability: float) -> Tiles:
    """Tiles for an NVIDIA GPU of this compute capability (AMD: as Ampere's)."""
    hopper = capability >= 9  # the right operand of its matrix unit lies in shared memory; before, in registers
    if shape.kernel == "values":
        return Tiles(warps=8 if shape.queries > 32 else 4)
    if shape.kernel == "sum":
        return Tiles(blocks=2, chunk=64, warps=8, stages=2) if shape.form == "dense" else Tiles(warps=8)
    if shape.form in ("int8", "fp8"):
        return Tiles(blocks=2, chunk=128, warps=8, stages=1)
    if shape.dim > 128 and shape.form != "identity":  # halves of keys fill the registers
        return Tiles(chunk=16, warps=8, stages=1)
    if shape.form == "dense":  # tall tiles, to use each part of a large matrix often
        return Tiles(blocks=2, chunk=64, warps=8, stages=1) if hopper else Tiles(blocks=2, chunk=16, warps=8)
    light = shape.queries <= 8 and shape.bits in (2, 4) and not shape.norm
    if shape.form == "identity":
        return Tiles(warps=8 if shape.bits == 8 or shape.queries > 16 else 4, fused=light)
    return Tiles(
        chunk=0 if hopper and shape.dim <= 128 else 16, warps=8 if shape.queries > 16 else 4, fused=hopper and light
    )


def splits(programs: int, num_blocks: int, blocks: int) -> int:
    """Parts to cut each sequence into: for no more programs than two rounds take, two at once on each multiprocessor.

    blocks: of a tile
    """
    wanted = 4 * multiprocessors() // programs
    return max(1, min(wanted, num_blocks // (TILES_PER_SPLIT * blocks)))


def capability() -> float | None:
    """Compute capability of the GPU that is compiled for: 8.0 for AMD's; None where kernels are interpreted, or
    compiled ahead for a GPU that nothing is known of."""
    architecture = _architecture()
    return None if architecture is None else 8.0 if is_amd() else float(architecture)


def is_amd() -> bool:
    """Whether it is compiled for an AMD GPU."""
    return (_architecture() or "").startswith("gfx")


def multiprocessors() -> int:
    """Of the first GPU; of an A100 where there is none."""
    return getattr(jax.local_devices()[0], "core_count", None) or chips.GPUS["A100"].multiprocessors


def _architecture() -> str | None:
    """ "9.0" on NVIDIA, "gfx942" on AMD: of the kind of GPU that the target names, or of the first device."""
    if kind := target.current().device_kind:
        known = chips.gpu(kind)
        return known and known.architecture
    return getattr(jax.local_devices()[0], "compute_capability", None)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(TABLE.read_text())
