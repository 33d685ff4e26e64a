"""Reads the schedule that libtpu makes of a kernel: bundles of every loop, what each unit does in them, and spills."""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pallas_kernels.pallas_tpu.accumulate_tiling import SumTiling
from pallas_kernels.pallas_tpu.decode_attention_tiling import DecodeTiling

UNITS = ("matmul", "matpush", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")


@contextlib.contextmanager
def dumping() -> Iterator[Path]:
    """A folder that libtpu writes its schedules to: those of this process, if it has compiled nothing yet."""
    folder = Path(tempfile.mkdtemp(prefix="tpu-static-cost-"))
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU whose metadata could be asked for
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may compile at the same time
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    }
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def clear(dump: Path) -> None:
    """Forgets what was compiled before."""
    shutil.rmtree(dump)
    dump.mkdir()


@dataclasses.dataclass
class Region:
    """Consecutive bundles at one depth of loops; `opens` where a loop begins."""

    depth: int
    opens: bool
    first: int
    size: int = 0


def read_regions(bundles: str) -> list[Region]:
    """The parts of a schedule in order. A line of it: address, label, one `>` for each loop it is in, the bundle."""
    found: list[Region] = []
    for line in bundles.splitlines():
        match = re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?:\s*((?:>\s*)*)\{", line)
        if match is None:
            continue
        depth, opens = match[3].count(">"), match[2] == "LB"
        if opens or not found or found[-1].depth != depth:
            found.append(Region(depth, opens, int(match[1], 16)))
        found[-1].size += 1
    return found


def read_units(utilization: str) -> tuple[list[int], list[list[int]]]:
    """Slots of every unit in a bundle, and how many of them each bundle uses."""
    numbers = [line for line in utilization.splitlines() if re.fullmatch(r"\s*\d+(\s+\d+)+\s*", line)]
    slots, *used = ([int(n) for n in line.split()] for line in numbers)
    return slots, used


def trips(tiling: DecodeTiling) -> list[tuple[int, int]]:
    """Depth of every loop of the kernel in order, and how often it turns in each turn of the one around it, where a
    whole tile exists. The grid is the loop at depth 1, and turns once for every tile."""
    large, small = tiling.chunks
    if tiling.looped:
        inner = [(3, tiling.key.width // 128), (3, tiling.bundles // tiling.unroll)]
        rest = [(2, 0), *inner] if large > small else []
        return [(1, 1), (2, tiling.tile // large), *inner, *rest]
    return [(1, 1), (2, tiling.tile // large), (2, 0)]


def sum_trips(tiling: SumTiling) -> list[tuple[int, int]]:
    """`trips` of `accumulate`: only what is multiplied is laid out beforehand; one strip comes before their loop."""
    laid_out = [width for name, width in tiling.left.items() if name in ("sum", "stored")]
    between = [width for name, width in tiling.left.items() if name.startswith("between")]
    loops = [width // 128 // (2 - width // 128 % 2) for width in laid_out] + [width // 128 for width in between]
    strips = tiling.sum.width // tiling.strip - 1
    return [(1, 1), (2, tiling.tile // tiling.chunk), *((3, count) for count in (*loops, strips))]


def read_schedule(dump: Path, kernel: str, loops: Sequence[tuple[int, float]]) -> tuple[float, float, int]:
    """Bundles of a step of the grid of what was compiled last, those that its vector operations need, and spills in
    the loops that run. `loops`: as `trips` returns them."""
    (bundles,) = dump.glob(f"*{kernel}*-final_bundles.txt")
    (utilization,) = dump.glob(f"*{kernel}*-final_hlo-static-per-bundle-utilization.txt")
    slots, used = read_units(utilization.read_text())
    left, inside = iter(loops), 0
    turns: dict[int, float] = {0: 0}
    total, vector, spills = 0.0, 0.0, 0
    for region in read_regions(bundles.read_text()):
        if region.opens:
            depth, count = next(left)
            if depth != region.depth:
                raise SystemExit(f"a loop at depth {region.depth} where the kernel has one at depth {depth}")
            inside = max(inside, 1)
            turns[depth] = count * (turns[depth - 1] if depth > 1 else 1)
        times = turns[max(region.depth, inside)] if region.depth else turns.get(inside, 0)
        units = used[region.first : region.first + region.size]
        total += times * region.size
        vector += times * sum(row[UNITS.index("valu")] for row in units)
        if region.depth > 1 and times:
            spills += sum(row[UNITS.index("spill")] for row in units)
    if next(left, None) is not None:
        raise SystemExit("the kernel has more loops than its schedule")
    return total, vector / slots[UNITS.index("valu")], spills
