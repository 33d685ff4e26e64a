"""What the kernels cost on a TPU by the compiler's own schedule, with no TPU at hand.

    python -m benchmarks.static.tpu [--chips v5e v6e] [--models Llama-3.1-8B] [--bits 4] [--bases per_head]
        [--kernels quantize] [--new-tokens 4] [--json OUT]

Compiles the operations ahead of time (libtpu) for one layer at 32 k context and reads what libtpu writes down: the
bundles (instruction words; one a cycle when nothing stalls) of every loop, what each unit does in them, and spills.
The bundles of a step of the grid, divided by the tokens that it takes, times 1024, are set against the least that
the matrix unit, the vector unit or the memory needs for the same tokens: ratio = bound / bundles. A ratio above 1 means
that the schedule issues matrix products faster than the unit takes them: then the bound is what it costs.

step: bundles of a step outside its loops, which the above has; mostly scalars of the grid. once: bundles of a sequence
whatever its length, which it has not. layer_us: microseconds of one layer and one sequence at 32 k context: all steps,
what comes once, and the read of the first tile, which nothing hides; cores share the sequence.

basis: what keys are rebuilt from, `per_head`, `joint`, `x` (K = H) or `cl` (the running sum of xquant-cl's latents, 8
bits); of sums, `paper` is that of X with `predict=paper`; of what is quantized, the axis of its groups. group: channels
that share a scale, where keys lie along the token.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from benchmarks.models import FILES, NARROW, config_of, decode_shape, streams, sum_shape
from benchmarks.static.tpu_schedule import Schedule, clear, dumping, once, read_schedule, sum_trips, trips
from pallas_kernels import Quantize, RematProject, eight_bits, run, target
from pallas_kernels.calls import Call
from pallas_kernels.chips import TPUS
from pallas_kernels.pallas_tpu import quantize, quantize_kernel, remat_project, remat_project_kernel
from pallas_kernels.pallas_tpu.accumulate_tiling import SumTiling
from pallas_kernels.pallas_tpu.decode_attention_tiling import DecodeTiling
from pallas_kernels.shapes import bytes_per_token, history
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import StreamSpec
from xquant_jax.planning.devices import find_device

BLOCKS = 32_768 // BLOCK
LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled: a cache of a model, and by what name the table has it."""

    model: str
    cache: str
    basis: str
    new: int = 1  # tokens that attend

    def columns(self, spec: StreamSpec, rebuild_dtype: str = "bf16") -> dict[str, Any]:
        return {
            "model": self.model,
            "basis": self.basis,
            "new": self.new,
            "bits": spec.bits,
            "rebuild_dtype": rebuild_dtype,
            "group": spec.group,
        }


def decode_cases(model: str, bits: list[int]) -> Iterator[Case]:
    """The running sum of xquant-cl has 8 bits; e4m3 holds codes of up to 4."""
    if config_of(model).is_multi_head:
        yield from (Case(model, f"xquant:{b}", "x") for b in bits)
        for group in (128, 256):
            for dtype in ("int8", "fp8"):
                for b in bits:
                    if dtype == "int8" or b <= 4:
                        yield Case(model, f"xquant:{b},group={group},rebuild_dtype={dtype}", "x")
        return
    for basis in ("per_head", "joint"):
        yield from (Case(model, f"xquant:{b},basis={basis}", basis) for b in bits)
    if 8 in bits:
        yield from (Case(model, f"xquant-cl:2,rebuild_dtype={dtype}", "cl") for dtype in ("bf16", "int8"))


def sum_cases(model: str, bits: list[int]) -> Iterator[Case]:
    """What xquant-cl adds to a running sum."""
    if config_of(model).is_multi_head:
        yield from (Case(model, f"xquant-cl:{b}", "x") for b in bits)
        return
    for basis, options in (("cl", ""), ("paper", ",predict=paper")):
        yield from (Case(model, f"xquant-cl:{b}{options}", basis) for b in bits)


def quantize_cases(model: str, bits: list[int]) -> Iterator[Case]:
    """What is quantized and packed."""
    for spec in streams(model, "xquant:4"):
        yield from (Case(model, f"xquant:{b}", spec.axis) for b in bits)


def project_cases(model: str, bits: list[int]) -> Iterator[Case]:
    """What a running sum of latents is multiplied with before the difference to it is stored."""
    if 8 in bits and not config_of(model).is_multi_head:
        yield Case(model, "xquant-cl:2", "cl")


def compile_for(chip: str, call: Call, donate: str | None = None) -> None:
    """Compiles a call of shapes; `donate`: the field that is updated in place."""
    sharding = SingleDeviceSharding(topologies.get_topology_desc(TPUS[chip].topology, "tpu").devices[0])
    call, donated = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (call, {donate: getattr(call, donate)} if donate else {}),
    )

    def function(donated: dict[str, Any], call: Any) -> Any:
        return run(dataclasses.replace(call, **donated), "pallas_tpu")

    with target.compiling_for("tpu", TPUS[chip].kinds[0]):
        jax.jit(function, donate_argnums=0).trace(donated, call).lower(lowering_platforms=("tpu",)).compile()


def decode_cost(dump: Path, chip: str, case: Case) -> dict[str, Any] | None:
    """The row of `decode_attention`; None where the chip has no matrix unit for the case."""
    shape = decode_shape(case.model, case.cache)
    matrix = shape.rebuild.matrix
    small = matrix and eight_bits.name_of(matrix.dtype)
    if small not in (None, TPUS[chip].eight_bits):
        return None
    call = shape.call(layers=LAYERS, batch=1, blocks=BLOCKS, new=case.new)
    clear(dump)
    compile_for(chip, call)
    with target.compiling_for("tpu", TPUS[chip].kinds[0]):
        tiling = DecodeTiling.of(call)
    schedule = read_schedule(dump, "decode_attention", trips(tiling), once(tiling))
    rebuilt = shape.rebuild_macs / 2 if small else shape.rebuild_macs  # in bfloat16, or what takes as long
    macs = rebuilt + case.new * (shape.macs - shape.rebuild_macs)
    columns = case.columns(shape.key, small or "bf16")
    return row(chip, "decode_attention", columns, schedule, tiling.tile, macs, shape.bytes)


def sum_cost(dump: Path, chip: str, case: Case) -> dict[str, Any]:
    """The row of `accumulate`: what a layer of xquant-cl adds to the running sum, and the sum read and written."""
    shape = sum_shape(case.model, case.cache)
    call = shape.call(layers=LAYERS, batch=1, blocks=BLOCKS)
    clear(dump)
    compile_for(chip, call, donate="running_sum")
    with target.compiling_for("tpu", TPUS[chip].kinds[0]):
        tiling = SumTiling.of(call)
    schedule = read_schedule(dump, "accumulate", sum_trips(tiling))
    return row(chip, "accumulate", case.columns(shape.stream), schedule, tiling.tile, shape.macs, shape.bytes)


def quantize_cost(dump: Path, chip: str, case: Case) -> dict[str, Any]:
    """The row of `quantize`: bfloat16 read, codes and scales written."""
    spec = next(spec for spec in streams(case.model, case.cache) if spec.axis == case.basis)
    clear(dump)
    compile_for(chip, Quantize(jax.ShapeDtypeStruct((1, BLOCKS, BLOCK, spec.width), jnp.bfloat16), spec))
    groups = quantize.TILE * spec.width // 128
    schedule = read_schedule(dump, "quantize", [(1, 1), (2, groups // quantize_kernel.UNROLL[spec.axis])])
    moved = 2 * spec.width + bytes_per_token(spec)
    return row(chip, "quantize", case.columns(spec), schedule, quantize.TILE, 0, moved)


def project_cost(dump: Path, chip: str, case: Case) -> dict[str, Any]:
    """The row of `remat_project`: the sum read, float32 written."""
    shape = sum_shape(case.model, case.cache)
    (matrix,), spec = shape.matrices, shape.running_sum
    clear(dump)
    compile_for(chip, RematProject(history(spec, 1, BLOCKS), matrix, jnp.float32))
    tile, parts = remat_project.TILE, spec.width // remat_project.COLUMNS
    strips = tile * spec.width // 128 / remat_project_kernel.UNROLL  # unpacked before the first of the parts
    loops = [(1, parts), (2, strips / parts), (2, tile // remat_project_kernel.TOGETHER)]
    schedule = read_schedule(dump, "remat_project", loops)
    moved = bytes_per_token(spec) + 4 * spec.width + 2 * matrix.size / (tile * BLOCK)
    return row(chip, "remat_project", case.columns(spec), schedule, tile, matrix.size, moved)


def row(
    chip: str, kernel: str, columns: dict[str, Any], schedule: Schedule, tile: int, macs: float, moved: float
) -> dict[str, Any]:
    """One row of the table. tile: blocks of a step of the grid. macs, moved: multiply-adds and bytes of a token."""
    tpu, per_1024 = TPUS[chip], 1024 / (tile * BLOCK)
    bandwidth = find_device(chip).bandwidth
    bounds = {
        "matrix": 1024 * macs / tpu.macs,
        "vector": schedule.vector * per_1024,
        "memory": 1024 * moved * tpu.clock * tpu.cores / bandwidth,
    }
    unit = max(bounds, key=lambda key: bounds[key])
    computed = (schedule.step * BLOCKS / tile / tpu.cores + schedule.once) / tpu.clock
    layer = computed + tpu.cores * tile * BLOCK * moved / bandwidth
    return {
        "kernel": kernel,
        "chip": chip,
        **columns,
        "bundles_per_1024": round(schedule.step * per_1024),
        "bound_per_1024": round(bounds[unit]),
        "bound_unit": unit,
        "ratio": round(bounds[unit] / (schedule.step * per_1024), 2),
        "spills": schedule.spills,
        "step": round(schedule.outside),
        "once": round(schedule.once),
        "layer_us": round(1e6 * layer, 1),
    }


KERNELS = {
    "decode_attention": (decode_cases, decode_cost),
    "accumulate": (sum_cases, sum_cost),
    "quantize": (quantize_cases, quantize_cost),
    "remat_project": (project_cases, project_cost),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TPUS, default=list(TPUS))
    parser.add_argument("--models", nargs="+", choices=[*FILES, *NARROW], default=list(FILES))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--bases", nargs="+", help="per_head, joint, x ...; all if left out")
    parser.add_argument("--new-tokens", type=int, default=1, help="tokens that attend at once (decode_attention)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = []
    with dumping() as dump:
        for model in arguments.models:
            for kernel in arguments.kernels:
                cases, cost = KERNELS[kernel]
                for case in cases(model, arguments.bits):
                    if arguments.bases and case.basis not in arguments.bases:
                        continue
                    if kernel == "decode_attention":
                        case = dataclasses.replace(case, new=arguments.new_tokens)
                    rows += [found for chip in arguments.chips if (found := cost(dump, chip, case))]
    if arguments.json:
        versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu"))
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    table = Table(*rows[0])
    for found in rows:
        table.add_row(*map(str, found.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
