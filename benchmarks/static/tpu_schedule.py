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
    """Consecutive bundles at one depth of loops and of one conditional; `opens` where a loop begins.

    conditional: the number, in order, of the innermost forward branch of the grid's loop that may skip them
    """

    depth: int
    opens: bool
    conditional: int | None
    first: int
    size: int = 0


def read_regions(bundles: str) -> list[Region]:
    """The parts of a schedule in order. A line of it: address, label, one `>` for each loop it is in, the bundle. A
    branch and the bundle that it leads to, or the line after the first of its lines, name the same region."""
    found: list[Region] = []
    branches: list[tuple[str, int]] = []  # that are open: the region they lead to, their number
    ends = set(re.findall(r"empty region (\d+)\b", bundles))
    count, depth = 0, 0
    for line in bundles.splitlines():
        ended = set(re.findall(r"empty region (\d+)\b", line))
        branches = [branch for branch in branches if branch[0] not in ended]
        match = re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?:\s*((?:>\s*)*)\{", line)
        if match is not None:
            depth, opens = match[3].count(">"), match[2] == "LB"
            conditional = branches[-1][1] if branches else None
            if opens or not found or (found[-1].depth, found[-1].conditional) != (depth, conditional):
                found.append(Region(depth, opens, conditional, int(match[1], 16)))
            found[-1].size += 1
        if depth == 1 and (branch := re.search(r"sbr\.rel.*?target = \$region(\d+)", line)) and branch[1] in ends:
            branches.append((branch[1], count))
            count += 1
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
    return [(1, 1), (2, tiling.tile // large)]


def once(tiling: DecodeTiling) -> tuple[int, ...]:
    """Which conditionals of a grid step, counted from the last, run once for each sequence: before the first tile,
    after the chunks of the last one, and at the end."""
    return (3, 1) if tiling.looped else (4, 2, 1)


def sum_trips(tiling: SumTiling) -> list[tuple[int, float]]:
    """`trips` of `accumulate`: only what is multiplied is laid out, once a chunk, in the loop over strips, which turns
    twice more than there are any."""
    laid_out = [width for name, width in tiling.left.items() if name in ("sum", "stored")]
    between = [width for name, width in tiling.left.items() if name.startswith("between")]
    loops = [width // 128 // (2 - width // 128 % 2) for width in laid_out] + [width // 128 for width in between]
    chunks = tiling.tile // tiling.chunk
    turns = chunks * (tiling.sum.width // tiling.strip) + 2
    return [(1, 1), (2, turns), *((3, count * chunks / turns) for count in loops)]


@dataclasses.dataclass
class Schedule:
    """Bundles of a step of the grid, of them those outside its loops, and those that its vector operations need;
    bundles once for each sequence; spills in the loops that run."""

    step: float = 0
    outside: float = 0
    vector: float = 0
    once: float = 0
    spills: int = 0


def read_schedule(dump: Path, kernel: str, loops: Sequence[tuple[int, float]], once: Sequence[int] = ()) -> Schedule:
    """The schedule of what was compiled last. `loops`: as `trips` returns them; `once`: as `once` does."""
    (bundles,) = dump.glob(f"*{kernel}*-final_bundles.txt")
    (utilization,) = dump.glob(f"*{kernel}*-final_hlo-static-per-bundle-utilization.txt")
    slots, used = read_units(utilization.read_text())
    regions = read_regions(bundles.read_text())
    conditionals = 1 + max((r.conditional for r in regions if r.conditional is not None), default=-1)
    left, inside = iter(loops), 0
    turns: dict[int, float] = {0: 0}
    schedule = Schedule()
    for region in regions:
        if region.opens:
            depth, count = next(left)
            if depth != region.depth:
                raise SystemExit(f"a loop at depth {region.depth} where the kernel has one at depth {depth}")
            inside = max(inside, 1)
            turns[depth] = count * (turns[depth - 1] if depth > 1 else 1)
        if region.depth < 2 and region.conditional is not None and conditionals - region.conditional in once:
            schedule.once += region.size
            continue
        times = turns[max(region.depth, inside)] if region.depth else turns.get(inside, 0)
        units = used[region.first : region.first + region.size]
        schedule.step += times * region.size
        schedule.outside += times * region.size if region.depth < 2 else 0
        schedule.vector += times * sum(row[UNITS.index("valu")] for row in units) / slots[UNITS.index("valu")]
        if region.depth > 1 and times:
            schedule.spills += sum(row[UNITS.index("spill")] for row in units)
    if next(left, None) is not None:
        raise SystemExit("the kernel has more loops than its schedule")
    return schedule
