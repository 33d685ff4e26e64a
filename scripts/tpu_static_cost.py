"""What the kernels cost on a TPU by the compiler's own schedule, with no TPU at hand.

    python scripts/tpu_static_cost.py [--chips v5e v6e] [--models llama-3.1-8b] [--bits 4] [--kernels quantize]
        [--json OUT]

Compiles the operations ahead of time (libtpu) for one layer at 32 k context and reads what libtpu writes down: the
bundles (instruction words; one a cycle when nothing stalls) of every loop, what each unit does in them, and spills.
The bundles of a step of the grid, divided by the tokens that it takes, times 1024, are set against the least that
the matrix unit, the vector unit or the memory needs for the same tokens: ratio = bound / bundles. A ratio above 1 means
that the schedule issues matrix products faster than the unit takes them: then the bound is what it costs.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="tpu-static-cost-"))
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from pallas_kernels import (  # noqa: E402
    Accumulation,
    KeyRebuild,
    accumulate,
    decode_attention,
    quantize,
    remat_project,
    target,
)
from pallas_kernels.eight_bits import quantize_matrix  # noqa: E402
from pallas_kernels.pallas_tpu import project, quantizing, running_sum  # noqa: E402
from pallas_kernels.pallas_tpu.plan import Plan, make_plan  # noqa: E402
from xquant_jax.numerics.attention import Geometry  # noqa: E402
from xquant_jax.numerics.packing import BLOCK  # noqa: E402
from xquant_jax.numerics.quantization import Blocks, StreamSpec, allocate_blocks  # noqa: E402
from xquant_jax.numerics.rope import Rope  # noqa: E402

CONTEXT = 32_768
UNITS = ("matmul", "matpush", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")


@dataclasses.dataclass(frozen=True)
class Chip:
    """topology: a name that libtpu knows. macs: multiply-adds a cycle and core in bfloat16. bandwidth: bytes a cycle
    and core (v5e: 819 GB/s at 1.5 GHz; v5p: 2,765 GB/s at 1.75 GHz, two cores; v6e: 1,640 GB/s at an assumed 1.75; v7x:
    7,380 GB/s, two cores, at an assumed 2.2). eight_bits: what it multiplies twice as fast."""

    topology: str
    macs: int
    bandwidth: float
    eight_bits: str = "int8"


CHIPS = {
    "v5e": Chip("v5e:2x2", 4 * 128 * 128, 819 / 1.5),
    "v5p": Chip("v5p:2x2x1", 4 * 128 * 128, 2765 / 1.75 / 2),
    "v6e": Chip("v6e:2x2", 4 * 256 * 256, 1640 / 1.75),
    "v7x": Chip("tpu7x:2x2x1", 4 * 256 * 256, 7380 / 2.2 / 2, "fp8"),
}


@dataclasses.dataclass(frozen=True)
class Model:
    width: int
    heads: int
    kv_heads: int
    dim: int
    qk_norm: bool = False

    def cases(self, bits: list[int]) -> list["Case"]:
        """What is compiled; the running sum of xquant-cl has 8 bits."""
        if self.heads == self.kv_heads:
            small = [("int8", b) for b in bits] + [("fp8", b) for b in bits if b <= 4]
            return [Case("x", b) for b in bits] + [Case("x", b, name, g) for g in (128, 256) for name, b in small]
        plain = [Case(basis, b) for basis in ("per_head", "joint") for b in bits]
        return plain + [Case("cl", 8, dtype) for dtype in ("bf16", "int8") if 8 in bits]

    def streams(self, bits: list[int]) -> list["Case"]:
        """What is quantized and packed."""
        axes = ("token",) if self.heads == self.kv_heads else ("channel", "token")
        return [Case(axis, b) for axis in axes for b in bits]

    def projections(self, bits: list[int]) -> list["Case"]:
        """What a running sum is multiplied with before the difference to it is stored."""
        return [Case("cl", 8)] if 8 in bits and self.heads > self.kv_heads else []

    def sums(self, bits: list[int]) -> list["Case"]:
        """What xquant-cl adds to a running sum."""
        forms = ("x",) if self.heads == self.kv_heads else ("cl", "paper")
        return [Case(form, b) for form in forms for b in bits]


@dataclasses.dataclass(frozen=True)
class Case:
    """basis: `per_head`, `joint`, `x` (K = H), `cl` (the running sum of xquant-cl's latents) or `paper` (that of X with
    `predict=paper`); of what is quantized, the axis of its groups. rebuild_dtype: of the matrix that keys are rebuilt
    with. group: channels that share a scale, where keys lie along the token."""

    basis: str
    bits: int
    rebuild_dtype: str = "bf16"
    group: int = 128


MODELS = {
    "llama-3.1-8b": Model(4096, 32, 8, 128),
    "llama-2-7b": Model(4096, 32, 32, 128),
    "qwen3-8b": Model(4096, 32, 8, 128, qk_norm=True),
}


def compile_decode_attention(chip: str, model: Model, case: Case) -> tuple[Any, Plan]:
    """The kernel of one layer for one new token, compiled for a chip."""
    device = topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices[0]
    sharding = SingleDeviceSharding(device)

    def shape(*size: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    def history(spec: StreamSpec) -> Blocks:
        blocks = jax.eval_shape(lambda: allocate_blocks(spec, (2, 1, CONTEXT // BLOCK)))
        return jax.tree.map(lambda a: shape(*a.shape, dtype=a.dtype), blocks)

    basis, bits = case.basis, case.bits
    keys_width, one = model.kv_heads * model.dim, basis in ("x", "cl")
    stored = {"x": model.width, "cl": 2 * keys_width}.get(basis, keys_width)
    key = history(StreamSpec(stored, bits, "token", case.group) if one else StreamSpec(stored, bits, "channel"))
    value = None if one else history(StreamSpec(stored, bits, "token"))
    matrix = (model.kv_heads, model.dim, model.dim) if basis == "per_head" else (stored, keys_width)
    norm = shape(model.dim) if model.qk_norm else None
    rebuild = KeyRebuild(shape(*matrix), None, norm, 1e-6)
    if case.rebuild_dtype != "bf16":
        small = jax.eval_shape(lambda w: quantize_matrix(w[None], case.rebuild_dtype, case.group), shape(*matrix))
        rebuild = dataclasses.replace(
            rebuild, **{name: shape(*a.shape[1:], dtype=a.dtype) for name, a in small.items()}
        )
    frequencies = Rope(theta=500_000.0).frequencies(model.dim)
    plans = []

    def attend(q: Any, key: Any, rebuild: Any, value: Any, history_blocks: Any, positions: Any, layer: Any) -> Any:
        value = key if value is None else value
        geometry = Geometry(positions, 2**30, jnp.asarray(frequencies), model.dim**-0.5)
        value_heads = model.kv_heads if basis == "per_head" else 1
        plans.append(make_plan(q, key, rebuild, value, geometry, model.kv_heads, value_heads))
        heads = {"num_kv_heads": model.kv_heads, "value_heads": value_heads}
        return decode_attention(
            q, key, rebuild, value, history_blocks, geometry, layer=layer, implementation="pallas_tpu", **heads
        )

    numbers = [shape(1, dtype=jnp.int32), shape(1, 1, dtype=jnp.int32), shape(dtype=jnp.int32)]
    queries = shape(1, 1, model.heads, model.dim)
    with target.compiling_for("tpu", device.device_kind):
        traced = jax.jit(attend).trace(queries, key, rebuild, value, *numbers)
        return traced.lower(lowering_platforms=("tpu",)).compile(), plans[0]


def compile_accumulate(chip: str, model: Model, case: Case) -> running_sum.Plan:
    """The kernel of one layer of xquant-cl, compiled for a chip."""
    device = topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices[0]
    latent = 2 * model.kv_heads * model.dim
    width, stored = {"x": (model.width, model.width), "cl": (latent, latent), "paper": (model.width, latent)}[
        case.basis
    ]

    def shapes(tree: Any) -> Any:
        sharding = SingleDeviceSharding(device)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    def matrix(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)

    running_sum = jax.eval_shape(lambda: allocate_blocks(StreamSpec(width, 8), (1, CONTEXT // BLOCK)))
    stream = jax.eval_shape(lambda: allocate_blocks(StreamSpec(stored, case.bits), (2, 1, CONTEXT // BLOCK)))
    predict = (matrix(latent),) if case.basis == "cl" else ()
    accumulation = Accumulation(predict, matrix(latent) if case.basis == "paper" else None)
    numbers = [jax.ShapeDtypeStruct(size, jnp.int32) for size in ((1,), ())]

    def add(running_sum: Any, stream: Any, accumulation: Any, history_blocks: Any, layer: Any) -> Any:
        return accumulate(running_sum, stream, accumulation, history_blocks, layer=layer, implementation="pallas_tpu")

    with target.compiling_for("tpu", device.device_kind):
        traced = jax.jit(add, donate_argnums=0).trace(*shapes((running_sum, stream, accumulation, *numbers)))
        traced.lower(lowering_platforms=("tpu",)).compile()
        return running_sum.make_plan(running_sum, stream, accumulation)


def compile_quantize(chip: str, model: Model, case: Case) -> StreamSpec:
    """The kernel that quantizes a stream as wide as the keys, or X, compiled for a chip."""
    device = topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices[0]
    axis: Any = case.basis
    spec = StreamSpec(model.kv_heads * model.dim, case.bits, axis, 0 if axis == "channel" else case.group)
    shape = (1, CONTEXT // BLOCK, BLOCK, spec.width)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    with target.compiling_for("tpu", device.device_kind):
        traced = jax.jit(lambda x: quantize(x, spec, implementation="pallas_tpu")).trace(x)
        traced.lower(lowering_platforms=("tpu",)).compile()
    return spec


def compile_remat_project(chip: str, model: Model, case: Case) -> tuple[StreamSpec, int]:
    """The product of a running sum with a square matrix, compiled for a chip."""
    device = topologies.get_topology_desc(CHIPS[chip].topology, "tpu").devices[0]
    spec = StreamSpec(2 * model.kv_heads * model.dim, case.bits)
    stream = jax.eval_shape(lambda: allocate_blocks(spec, (1, CONTEXT // BLOCK)))
    matrix = jax.ShapeDtypeStruct((spec.width, spec.width), jnp.bfloat16)
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device)), (stream, matrix)
    )

    def run(stream: Blocks, matrix: Any) -> Any:
        return remat_project(stream, matrix, dtype=jnp.float32, implementation="pallas_tpu")

    with target.compiling_for("tpu", device.device_kind):
        jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    return spec, spec.width // project.COLUMNS


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


def trips(plan: Plan) -> list[tuple[int, int]]:
    """Depth of every loop of the kernel in order, and how often it turns in each turn of the one around it, where a
    whole tile exists. The grid is the loop at depth 1, and turns once for every tile."""
    large, small = plan.chunks
    if plan.looped:
        inner = [(3, plan.key.width // 128), (3, plan.groups // plan.unroll)]
        rest = [(2, 0), *inner] if large > small else []
        return [(1, 1), (2, plan.tile // large), *inner, *rest]
    return [(1, 1), (2, plan.tile // large), (2, 0)]


def sum_trips(plan: running_sum.Plan) -> list[tuple[int, int]]:
    """`trips` of `accumulate`: only what is multiplied is laid out beforehand; one strip comes before their loop."""
    laid_out = [width for name, width in plan.left.items() if name in ("sum", "stored")]
    between = [width for name, width in plan.left.items() if name.startswith("between")]
    loops = [width // 128 // (2 - width // 128 % 2) for width in laid_out] + [width // 128 for width in between]
    strips = plan.sum.width // plan.strip - 1
    return [(1, 1), (2, plan.tile // plan.chunk), *((3, count) for count in (*loops, strips))]


def clear_dump() -> None:
    shutil.rmtree(DUMP, ignore_errors=True)
    DUMP.mkdir()


def read_schedule(kernel: str, loops: Sequence[tuple[int, float]]) -> tuple[float, float, int]:
    """Bundles of a step of the grid of what was compiled last, those that its vector operations need, and spills in
    the loops that run. `loops`: as `trips` returns them."""
    (bundles,) = DUMP.glob(f"*{kernel}*-final_bundles.txt")
    (utilization,) = DUMP.glob(f"*{kernel}*-final_hlo-static-per-bundle-utilization.txt")
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


def row(chip: str, kernel: str, case: dict[str, Any], schedule: Any, tile: int, macs: float, moved: float) -> dict:
    """One row of the table. tile: blocks of a step of the grid. macs, moved: multiplications and bytes of a token."""
    total, vector, spills = schedule
    per_1024 = 1024 / (tile * BLOCK)
    bounds = {
        "matrix": 1024 * macs / CHIPS[chip].macs,
        "vector": vector * per_1024,
        "memory": 1024 * moved / CHIPS[chip].bandwidth,
    }
    unit = max(bounds, key=lambda key: bounds[key])
    return {
        "kernel": kernel,
        "chip": chip,
        **case,
        "bundles_per_1024": round(total * per_1024),
        "bound_per_1024": round(bounds[unit]),
        "bound_unit": unit,
        "ratio": round(bounds[unit] / (total * per_1024), 2),
        "spills": spills,
    }


def static_cost(chip: str, name: str, case: Case) -> dict[str, Any]:
    """The row of `decode_attention`, see the module's docstring."""
    model = MODELS[name]
    clear_dump()
    _, plan = compile_decode_attention(chip, model, case)
    schedule = read_schedule("decode_attention", trips(plan))
    per_head = case.basis == "per_head"
    values = model.dim if per_head else plan.value.width
    rebuild = plan.key.width * (model.dim if per_head else model.kv_heads * model.dim)
    macs = rebuild / (2 if plan.eight_bits else 1) + model.heads * (model.dim + values)  # in bfloat16, or that long
    streams = [plan.key] if plan.shared else [plan.key, plan.value]
    stored = sum(_bytes(spec) for spec in streams)
    return row(chip, "decode_attention", {"model": name, **dataclasses.asdict(case)}, schedule, plan.tile, macs, stored)


def sum_cost(chip: str, name: str, case: Case) -> dict[str, Any]:
    """The row of `accumulate`: what a layer of xquant-cl adds to the running sum, and the sum read and written."""
    clear_dump()
    plan = compile_accumulate(chip, MODELS[name], case)
    schedule = read_schedule("accumulate", sum_trips(plan))
    macs = sum(a * b for a, b in [*(plan.predict or ()), *([plan.lift] if plan.lift else [])])
    moved = _bytes(plan.stream) + 2 * _bytes(plan.sum)
    return row(chip, "accumulate", {"model": name, **dataclasses.asdict(case)}, schedule, plan.tile, macs, moved)


def quantize_cost(chip: str, name: str, case: Case) -> dict[str, Any]:
    """The row of `quantize`: bfloat16 read, codes and scales written."""
    clear_dump()
    spec = compile_quantize(chip, MODELS[name], case)
    groups = quantizing.TILE * spec.width // 128
    schedule = read_schedule("quantize", [(1, 1), (2, groups // quantizing.UNROLL[spec.axis])])
    moved = 2 * spec.width + _bytes(spec)
    return row(chip, "quantize", {"model": name, **dataclasses.asdict(case)}, schedule, quantizing.TILE, 0, moved)


def project_cost(chip: str, name: str, case: Case) -> dict[str, Any]:
    """The row of `remat_project`: the sum read, float32 written."""
    clear_dump()
    spec, parts = compile_remat_project(chip, MODELS[name], case)
    tile = project.TILE
    strips = tile * spec.width // 128 / project.UNROLL  # unpacked before the first of the parts
    schedule = read_schedule("remat_project", [(1, parts), (2, strips / parts), (2, tile // project.TOGETHER)])
    moved = _bytes(spec) + 4 * spec.width + 2 * spec.width**2 / (tile * BLOCK)
    case_of_row = {"model": name, **dataclasses.asdict(case)}
    return row(chip, "remat_project", case_of_row, schedule, tile, spec.width**2, moved)


def _bytes(spec: StreamSpec) -> float:
    """Of a token."""
    return spec.width * (spec.bits + 32 / spec.group) / 8


KERNELS = {
    "decode_attention": (Model.cases, static_cost),
    "accumulate": (Model.sums, sum_cost),
    "quantize": (Model.streams, quantize_cost),
    "remat_project": (Model.projections, project_cost),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for kernel in arguments.kernels:
            cases, cost = KERNELS[kernel]
            rows += [
                cost(chip, name, case)
                for case in cases(MODELS[name], arguments.bits)
                for chip in arguments.chips
                if case.rebuild_dtype in ("bf16", CHIPS[chip].eight_bits)
            ]
    shutil.rmtree(DUMP)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
