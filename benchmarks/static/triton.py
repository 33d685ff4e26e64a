"""What the Triton kernels cost by their machine code, for GPUs that need not be there. Needs no GPU.

    python -m benchmarks.static.triton [--gpu H200] [--models Llama-3.1-8B] [--bits 4] [--new-tokens 4]
        [--json OUT]

Prints two tables of markdown: cycles of a multiprocessor for 1024 cached tokens of one layer, all heads. `issue`:
machine instructions of the loops, four a cycle; code that masks tiles at the end of a sequence is counted, though most
tiles skip it. `shared`: cycles that shared memory is busy, at 128 bytes in one. `matrix`: multiplications over what the
matrix units do in a cycle. Nothing is faster than the largest of the three; if they did not overlap it would be their
sum. Stalls and bank conflicts are not in it. `spills`: instructions that move registers to memory and back, in the
innermost loop, in the loop around it, and outside of loops.

The second table is of `accumulate` at 2 bits: `issue` has the code outside of loops too, which a program passes once
for a tile, and `memory` is what arrays take that are read and written once.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.models import FILES, decode_shape, sum_shape
from benchmarks.static.triton_ahead import Launch, Machine, compiled, decode_launches, sum_launches
from pallas_kernels.chips import GPU, GPUS
from pallas_kernels.eight_bits import TYPES
from pallas_kernels.shapes import DecodeShape, bytes_per_token
from xquant_jax.numerics.packing import BLOCK

ISSUED = 4  # instructions a cycle and multiprocessor
NVIDIA = {name: gpu for name, gpu in GPUS.items() if not gpu.amd}

CASES = [  # model, cache, what keys are rebuilt from (cl: the running sum, which has 8 bits)
    ("Llama-3.1-8B", "xquant:{}", "per_head"),
    ("Llama-3.1-8B", "xquant:{},basis=joint", "joint"),
    ("Qwen3-8B", "xquant:{}", "per_head"),
    ("Llama-2-7B", "xquant:{}", "x"),
    ("Llama-2-7B", "xquant:{},rebuild_dtype=int8", "x"),
    ("Llama-2-7B", "xquant:{},rebuild_dtype=fp8", "x"),
    ("Llama-3.1-8B", "xquant-cl:2", "cl"),
    ("Llama-3.1-8B", "xquant-cl:2,rebuild_dtype=int8", "cl"),
]
SUMS = [
    ("Llama-3.1-8B", "xquant-cl:2"),
    ("Llama-3.1-8B", "xquant-cl:2,rank=512"),
    ("Llama-3.1-8B", "xquant-cl:2,predict=paper"),
    ("Llama-2-7B", "xquant-cl:2"),
]


def products(launch: Launch, shape: DecodeShape) -> int:
    """Multiplications of a token, all programs, queries padded to what is computed; two in 8 bits count as one."""
    c, (*_, query_tiles) = launch.constants, launch.grid
    if launch.kernel == "decode_values":
        return query_tiles * c["WIDTH"] * c["QUERIES"]
    scores = shape.kv_heads * shape.dim * c["QUERIES"]
    rebuild = shape.rebuild_macs // (2 if c["FORM"] in TYPES else 1)
    values = c["VALUE_WIDTH"] * c["QUERIES"] if launch.kernel == "decode" else 0
    return query_tiles * (rebuild + scores + values)


def of_loops(what: str, launch: Launch, machine: Machine, shape: DecodeShape) -> float:
    """`what` loops have, instructions or cycles of shared memory, of all warps and programs for a token."""
    c, (*_, query_tiles) = launch.constants, launch.grid
    inner, *outer = (getattr(loop, what) for loop in machine.loops)
    turns = 1
    if outer:
        turns = (shape.dim if c["FORM"] == "per_head" else shape.key.width) // c["CHUNK"]
    programs = c["WIDTH"] // c["CHANNELS"] if launch.kernel == "decode_values" else shape.kv_heads
    return (inner * turns + sum(outer)) * launch.warps * programs * query_tiles / (BLOCK * c["BLOCKS"])


def decode_rows(model: str, cache: str, basis: str, gpu: GPU, new: int = 1) -> list[dict[str, Any]]:
    """Rows of the first table: the kernels of one cache, for so many new tokens."""
    shape, found = decode_shape(model, cache), []
    for launch in decode_launches(shape, gpu, new):
        machine = compiled(launch, gpu)
        inner, *outer = machine.loops
        around = sum(loop.spills for loop in outer)
        found.append(
            {
                "kernel": launch.kernel,
                "capability": gpu.capability,
                "model": model,
                "cache": cache,
                "new": new,
                "bits": shape.key.bits,
                "basis": basis,
                "rebuild_dtype": cache.partition("rebuild_dtype=")[2] or "bf16",
                "issue_per_1024": 1024 * of_loops("instructions", launch, machine, shape) / ISSUED,
                "shared_per_1024": 1024 * of_loops("shared", launch, machine, shape),
                "matrix_per_1024": 1024 * products(launch, shape) / gpu.matrix,
                "registers": machine.registers,
                "shared_bytes": machine.shared,
                "spills": [inner.spills, around, machine.spills - inner.spills - around],
            }
        )
    return found


def sum_rows(model: str, cache: str, gpu: GPU) -> list[dict[str, Any]]:
    """Rows of the second table: the kernels that add one layer."""
    shape, found = sum_shape(model, cache), []
    for launch in sum_launches(shape, gpu):
        machine, c = compiled(launch, gpu), launch.constants
        width = c.get("SUM_WIDTH") or c["OUT_WIDTH"]
        inner = c["BELOW"] + c["STORED"] if launch.kernel == "add" else c["MULTIPLY"] * c["WIDTH"]
        loop = sum(loop.instructions for loop in machine.loops)
        a_tile = machine.instructions + loop * (inner // c["CHUNK"] - 1)
        packed = c["WIDTH"] * (c["BITS"] / 8 + 4 / 128)
        if launch.kernel == "lay_out":
            moved = packed + 2 * width
        else:
            written = bytes_per_token(shape.running_sum)
            moved = 2 * inner + (0 if c["STORED"] else packed) + (1 + c["ADD_SUM"]) * written
        found.append(
            {
                "kernel": launch.kernel,
                "capability": gpu.capability,
                "model": model,
                "cache": cache,
                "issue_per_1024": 1024 * a_tile * launch.warps * (width // 128) / (BLOCK * c["BLOCKS"]) / ISSUED,
                "matrix_per_1024": 1024 * inner * width / gpu.matrix,
                "memory_per_1024": 1024 * moved / gpu.sustained * gpu.multiprocessors * gpu.clock,
                "registers": machine.registers,
                "shared_bytes": machine.shared,
                "spills": machine.spills,
            }
        )
    return found


def nanoseconds(cycles: float, gpu: GPU) -> float:
    """Of a token, from a multiprocessor's cycles for 1024."""
    return 1e9 * cycles / 1024 / (gpu.multiprocessors * gpu.clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H200", choices=NVIDIA, help="what is compiled for")
    parser.add_argument("--models", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], help="of xquant")
    parser.add_argument("--new-tokens", type=int, default=1, help="tokens that attend at once")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file")
    arguments = parser.parse_args()
    gpu = GPUS[arguments.gpu]
    rows, sums = [], []
    print(
        "| model | basis | rebuild | bits | kernel | issue | shared | matrix | ns per token at best | registers |",
        end="",
    )
    print(" shared bytes | spills |")
    print("|---" * 12 + "|")
    for model, cache, basis in CASES:
        if model not in arguments.models or (cache.endswith(tuple(TYPES)) and gpu.capability < 9):
            continue
        for spec in dict.fromkeys(cache.format(bits) for bits in arguments.bits):
            for row in decode_rows(model, spec, basis, gpu, arguments.new_tokens):
                cycles = [row[f"{what}_per_1024"] for what in ("issue", "shared", "matrix")]
                print(
                    f"| {model} | {basis} | {row['rebuild_dtype']} | {row['bits']} | `{row['kernel']}` | "
                    f"{' | '.join(f'{n:,.0f}' for n in cycles)} | {nanoseconds(max(cycles), gpu):.2f} | "
                    f"{row['registers']} | {row['shared_bytes']:,} | {', '.join(map(str, row['spills']))} |"
                )
                rows.append(row)
    print("\n| model | cache | kernel | issue | matrix | memory | ns per token at best | registers |", end="")
    print(" shared bytes | spills |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model, cache in SUMS:
        if model not in arguments.models:
            continue
        for row in sum_rows(model, cache, gpu):
            cycles = [row[f"{what}_per_1024"] for what in ("issue", "matrix", "memory")]
            best = nanoseconds(max(cycles), gpu)
            print(
                f"| {model} | `{cache}` | `{row['kernel']}` | {' | '.join(f'{n:,.0f}' for n in cycles)} | "
                f"{best:.2f} | {row['registers']} | {row['shared_bytes']:,} | {row['spills']} |"
            )
            sums.append(row)
    if arguments.json:
        found = {"gpu": arguments.gpu, "versions": f"Triton {version('triton')}", "rows": rows, "sums": sums}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
