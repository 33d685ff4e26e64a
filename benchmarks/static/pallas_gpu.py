"""What `decode_attention` of `pallas_gpu` costs by its machine code, on an H200 that need not be there.

    python -m benchmarks.static.pallas_gpu [--json OUT]

Needs no GPU, but JAX's plugin for CUDA 13 (`pip install 'jax[cuda13]'`) and `ptxas` of CUDA 13 on the path. Columns are
those of `benchmarks.static.triton`. `issue`: both loops, of the warps that attend and of those that copy for them; and
beside it that of the Triton kernels which do the same.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.models import decode_shape
from benchmarks.static.triton import ISSUED, decode_rows, nanoseconds
from benchmarks.static.triton_ahead import Machine, _read, _tool
from pallas_kernels import run, target
from pallas_kernels.chips import GPUS
from pallas_kernels.pallas_gpu.fragments import QUERIES
from pallas_kernels.shapes import DecodeShape
from xquant_jax.numerics.packing import BLOCK

GPU = GPUS["H200"]
WARPS = 4  # of a warpgroup
CASES = [
    *(("Llama-3.1-8B", f"xquant:{bits}") for bits in (2, 3, 4, 8)),
    ("Qwen3-8B", "xquant:4"),
    ("Llama-3.1-8B", "kivi:4"),
    ("Llama-3.1-8B", "int8"),
]
DEVICE = f"""
gpu_device_info {{ name: "{GPU.kind}" cuda_compute_capability {{ major: 9 }} core_count: {GPU.multiprocessors}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000 clock_rate_ghz: 1.98
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" }}
platform_name: "CUDA" device_description_str: "{GPU.kind}"
"""
"""The device, as XLA's compiler wants it described (`GpuTargetConfigProto`)."""


def compiled(shape: DecodeShape) -> Machine:
    """The machine code for 8 sequences of 32 k tokens, one new token each."""
    topology = topologies.get_topology_desc("h200", "cuda", topology="1x1x1", target_config=DEVICE)
    device = SingleDeviceSharding(topology.devices[0])
    call = shape.call(layers=1, batch=8, blocks=256)
    call = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), call)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": folder}
        with target.compiling_for("gpu", GPU.kind):
            jax.jit(lambda call: run(call, "pallas_gpu")).trace(call).lower(lowering_platforms=("cuda",)).compile()
        (code,) = Path(folder).glob("*.ptx")
        cubin = Path(folder) / "cubin"
        subprocess.run(["ptxas", "-arch=sm_90a", code, "-o", cubin], check=True)
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        shared = re.search(r"smem_scratch_bytes=(\d+)", next(Path(folder).glob("*.resources.txt")).read_text())
        registers = re.search(r"REG:(\d+)", usage)
        assert registers is not None
        assert shared is not None
        return _read(_tool("nvdisasm", "-c", str(cubin)), int(registers[1]), int(shared[1]))


def row(model: str, cache: str) -> dict[str, Any]:
    """One row of the table."""
    shape = decode_shape(model, cache)
    machine = compiled(shape)
    (attend,) = (loop for loop in machine.loops if loop.operations["HMMA"])
    (copy,) = (loop for loop in machine.loops if loop.operations["UTMALDG"] > 2)
    width = shape.key if shape.value is None else shape.value
    products = shape.rebuild_macs + QUERIES * (shape.kv_heads * shape.dim + width.width)
    a_block = (attend.instructions + copy.instructions) * WARPS * shape.kv_heads
    return {
        "model": model,
        "cache": cache,
        "issue_per_1024": 1024 / BLOCK * a_block / ISSUED,
        "triton_issue_per_1024": sum(kernel["issue_per_1024"] for kernel in decode_rows(model, cache, "", GPU)),
        "matrix_per_1024": 1024 * products / GPU.matrix,
        "registers": machine.registers,
        "shared_bytes": machine.shared,
        "spills": [attend.spills, machine.spills - attend.spills],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    print("| model | cache | issue | Triton's issue | matrix | ns per token at best | shared bytes | spills |")
    print("|---|---|---|---|---|---|---|---|")
    for model, cache in CASES:
        rows.append(found := row(model, cache))
        issue, theirs, matrix = (found[f"{what}_per_1024"] for what in ("issue", "triton_issue", "matrix"))
        best = nanoseconds(max(issue, matrix), GPU)
        print(
            f"| {model} | {cache} | {issue:,.0f} | {theirs:,.0f} | {matrix:,.0f} | {best:.2f} | "
            f"{found['shared_bytes']:,} | {', '.join(map(str, found['spills']))} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
