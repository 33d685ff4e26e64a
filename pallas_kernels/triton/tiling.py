"""Tile sizes of the Triton kernels, and what they depend on: the shape of the work and the GPU.

The sizes are those that compile without spills in the innermost loops: `tests/pallas_kernels/test_triton_compiled.py`
holds them to that. None was timed on a GPU.
"""

import dataclasses

from pallas_kernels import gpus

TILES_PER_SPLIT = 4
"""At least: less work does not pay for a program of its own."""

FILLED = 0.9
"""Share of the places for programs, over all rounds, that is filled well enough."""


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


def choose(shape: Shape) -> Tiles:
    """Tiles of a kernel on the GPU that is compiled for."""
    hopper = (
        gpus.current().capability >= 9
    )  # its matrix unit's right operand lies in shared memory; before, in registers
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
    if shape.form == "identity":
        light = shape.queries <= 8 and shape.bits in (2, 4) and not shape.norm
        return Tiles(warps=8 if shape.queries > 32 else 4, fused=light)
    return Tiles(chunk=0 if hopper and shape.dim <= 128 else 16)


def most_queries(dim: int) -> int:
    """Queries of a kv head that one program takes, new tokens times query heads that share it: more would spill."""
    return (64 if gpus.current().capability >= 9 else 32) * 128 // max(dim, 128)


def splits(programs: int, num_blocks: int, blocks: int) -> int:
    """Parts to cut each sequence into: for two rounds of programs, or up to four if the last round would leave places
    empty. Two programs run at once on a multiprocessor.

    blocks: of a tile
    """
    places = 2 * gpus.current().multiprocessors
    longest = num_blocks // (TILES_PER_SPLIT * blocks)
    fewest, most = (max(1, min(rounds * places // programs, longest)) for rounds in (2, 4))

    def filled(parts: int) -> float:
        rounds = -(-programs * parts // places)
        return min(programs * parts / (rounds * places), FILLED)

    return max(range(fewest, most + 1), key=filled)  # the first of the best
