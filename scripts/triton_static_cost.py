"""What the Triton kernels cost by their machine code, for GPUs that need not be there. Needs no GPU.

    python scripts/triton_static_cost.py [--json OUT] [--capability 9.0]

Prints two tables of markdown: cycles of a multiprocessor for 1024 cached tokens of one layer, all heads. `issue`:
machine instructions of the loops, four a cycle; code that masks tiles at the end of a sequence is counted, though most
tiles skip it. `matrix`: multiplications over what the matrix units do in a cycle. Nothing is faster than the larger of
the two; if they did not overlap it would be their sum. Stalls are not in it. `spills`: instructions that move registers
to memory and back, in the innermost loop, in the loop around it, and outside of loops.

The second table is of `accumulate` at 2 bits: `issue` has the code outside of loops too, which a program passes once
for a tile, and `memory` is what arrays, read and written once, take at an H200's bandwidth.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pallas_kernels.eight_bits import TYPES
from pallas_kernels.triton.ahead import MODELS, SUMS, Launch, Machine, compiled, of_model, of_sum

MATRIX = {8.0: 1024, 8.9: 512, 9.0: 2048}  # bfloat16 products a cycle and multiprocessor: A100, L40S, H100 and H200
ISSUED = 4  # instructions a cycle and multiprocessor
MULTIPROCESSORS, CLOCK = 132, 1.755e9  # of an H200, for nanoseconds; its clock under load varies
BANDWIDTH = 4.3e12  # likewise, bytes a second

CASES = [  # form of the rebuild (of int8 and fp8: dense), bits
    ("Llama-3.1-8B", "per_head", (2, 3, 4)),
    ("Llama-3.1-8B", "dense", (2, 3, 4)),
    ("Qwen3-8B", "per_head", (2, 3, 4)),
    ("Llama-2-7B", "dense", (2, 3, 4)),
    ("Llama-2-7B", "int8", (2, 3, 4)),
    ("Llama-2-7B", "fp8", (2, 3, 4)),
    ("Llama-3.1-8B, xquant-cl", "dense", (8,)),
    ("Llama-3.1-8B, xquant-cl", "int8", (8,)),
]

BASES = {"Llama-2-7B": "x", "Llama-3.1-8B, xquant-cl": "cl"}  # what keys are rebuilt from; cl: the running sum


def products(launch: Launch, model: Any) -> int:
    """Multiplications of a token, all programs, queries padded to what is computed; two in 8 bits count as one."""
    c = launch.constants
    if launch.kernel == "decode_values":
        return c["WIDTH"] * c["QUERIES"]
    scores = model.kv_heads * model.dim * c["QUERIES"]
    rebuild = (model.dim if c["FORM"] == "per_head" else model.width) * model.kv_heads * model.dim
    rebuild //= 2 if c["FORM"] in TYPES else 1
    values = c["VALUE_WIDTH"] * c["QUERIES"] if launch.kernel == "decode" else 0
    return rebuild + scores + values


def issued(launch: Launch, machine: Machine, model: Any) -> float:
    """Instructions of all warps and programs for a token."""
    c = launch.constants
    inner, *outer = machine.loops
    turns = 1
    if outer:
        turns = (model.dim if c["FORM"] == "per_head" else model.width) // c["CHUNK"]
    a_tile = inner.instructions * turns + sum(loop.instructions for loop in outer)
    programs = c["WIDTH"] // c["CHANNELS"] if launch.kernel == "decode_values" else model.kv_heads
    return a_tile * launch.warps * programs / (128 * c["BLOCKS"])


def rows(capability: float) -> list[dict[str, Any]]:
    found = []
    for name, form, all_bits in CASES:
        if form in TYPES and capability < 9:
            continue
        for bits in all_bits:
            for launch in of_model(MODELS[name], bits, form, capability):
                machine = compiled(launch, capability)
                inner, *outer = machine.loops
                around = sum(loop.spills for loop in outer)
                found.append(
                    {
                        "kernel": launch.kernel,
                        "capability": capability,
                        "model": name,
                        "bits": bits,
                        "basis": BASES.get(name, "per_head" if form == "per_head" else "joint"),
                        "rebuild_dtype": form if form in TYPES else "bf16",
                        "issue_per_1024": 1024 * issued(launch, machine, MODELS[name]) / ISSUED,
                        "matrix_per_1024": 1024 * products(launch, MODELS[name]) / MATRIX[capability],
                        "registers": machine.registers,
                        "shared_bytes": machine.shared,
                        "spills": [inner.spills, around, machine.spills - inner.spills - around],
                    }
                )
    return found


def of_sums(capability: float) -> list[dict[str, Any]]:
    """Rows of the second table."""
    found = []
    for name in SUMS:
        for launch in of_sum(name, 2, capability):
            machine, c = compiled(launch, capability), launch.constants
            width = c.get("SUM_WIDTH") or c["OUT_WIDTH"]
            inner = c["BELOW"] + c["STORED"] if launch.kernel == "add" else c["MULTIPLY"] * c["WIDTH"]
            loop = sum(loop.instructions for loop in machine.loops)
            a_tile = machine.instructions + loop * (inner // c["CHUNK"] - 1)
            packed = c["WIDTH"] * (c["BITS"] / 8 + 4 / 128)
            if launch.kernel == "lay_out":
                moved = packed + 2 * width
            else:
                moved = 2 * inner + (0 if c["STORED"] else packed) + (1 + c["ADD_SUM"]) * width * (1 + 4 / 128)
            found.append(
                {
                    "kernel": launch.kernel,
                    "capability": capability,
                    "sum": name,
                    "issue_per_1024": 1024 * a_tile * launch.warps * (width // 128) / (128 * c["BLOCKS"]) / ISSUED,
                    "matrix_per_1024": 1024 * inner * width / MATRIX[capability],
                    "memory_per_1024": 1024 * moved / BANDWIDTH * MULTIPROCESSORS * CLOCK,
                    "registers": machine.registers,
                    "shared_bytes": machine.shared,
                    "spills": machine.spills,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--capability", type=float, default=9.0, choices=sorted(MATRIX), help="of the GPU")
    args = parser.parse_args()
    found = rows(args.capability)
    print("| model | basis | rebuild | bits | kernel | issue | matrix | ns per token | registers | shared | spills |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in found:
        cycles = max(row["issue_per_1024"], row["matrix_per_1024"])
        best = f"{1e9 * cycles / 1024 / (MULTIPROCESSORS * CLOCK):.2f}" if args.capability == 9.0 else "-"
        print(
            f"| {row['model']} | {row['basis']} | {row['rebuild_dtype']} | {row['bits']} | {row['kernel']} | "
            f"{row['issue_per_1024']:,.0f} | {row['matrix_per_1024']:,.0f} | {best} | {row['registers']} | "
            f"{row['shared_bytes']:,} | {', '.join(map(str, row['spills']))} |"
        )
    sums = of_sums(args.capability)
    print("\n| sum | kernel | issue | matrix | memory | ns per token at best | registers | shared | spills |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in sums:
        cycles = [row[f"{what}_per_1024"] for what in ("issue", "matrix", "memory")]
        best = f"{1e9 * max(cycles) / 1024 / (MULTIPROCESSORS * CLOCK):.2f}" if args.capability == 9.0 else "-"
        print(
            f"| {row['sum']} | {row['kernel']} | {' | '.join(f'{n:,.0f}' for n in cycles)} | {best} | "
            f"{row['registers']} | {row['shared_bytes']:,} | {row['spills']} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"rows": found, "sums": sums}, indent=1) + "\n")


if __name__ == "__main__":
    main()
