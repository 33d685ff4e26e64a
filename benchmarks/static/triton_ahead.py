"""Compiles the Triton kernels for GPUs that need not be there, and reads what became of them.

Nothing here runs on a GPU: `triton.compile` builds a cubin, and the disassembler that comes with Triton lists its
machine instructions. What a loop costs is known from that, short of stalls.
"""

import collections
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import triton
from jax.extend import core
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import run, target
from pallas_kernels.calls import Call
from pallas_kernels.chips import GPU
from pallas_kernels.shapes import DecodeShape, SumShape

if not os.environ.get("TRITON_CACHE_DIR"):  # jax-triton 0.3 sets it to no folder, where Triton cannot write
    os.environ.pop("TRITON_CACHE_DIR", None)

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32", "uint32": "*u32", "int8": "*i8"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as an operation would launch it."""

    function: Any
    arrays: tuple[Any, ...]  # shapes of inputs, then of what it writes
    grid: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]  # of the compiler

    @property
    def kernel(self) -> str:
        return self.function.__name__

    @property
    def warps(self) -> int:
        return self.options["num_warps"]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Machine instructions a warp executes in one turn, those of loops inside it excluded; how many are spills; cycles
    that shared memory, which moves 128 bytes in one, is busy for it, without bank conflicts."""

    start: int
    end: int
    instructions: int
    spills: int
    operations: collections.Counter[str]
    shared: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """Machine code: loops from the innermost out, instructions and spills outside of them and in them, registers a
    thread, bytes of shared memory."""

    loops: tuple[Loop, ...]
    instructions: int
    spills: int
    registers: int
    shared: int


def decode_launches(shape: DecodeShape, gpu: GPU, new: int = 1) -> list[Launch]:
    """The kernels that read one layer: 8 sequences of 32 k tokens, `new` new tokens each."""
    return launches(shape.call(layers=1, batch=8, blocks=256, new=new), gpu)


def sum_launches(shape: SumShape, gpu: GPU) -> list[Launch]:
    """The kernels that add one layer to a running sum: 8 sequences of 4 k tokens, a single range."""
    return launches(shape.call(layers=1, batch=8, blocks=32), gpu)


def launches(call: Call, gpu: GPU) -> list[Launch]:
    """What a call, of shapes or of arrays, would launch on a GPU, as its trace has it."""
    with target.compiling_for("gpu", gpu.kind):
        traced = jax.make_jaxpr(functools.partial(run, implementation="triton"))(call)
    return [
        Launch(
            equation.params["fn"],
            (*(getattr(v.aval, "inner_aval", v.aval) for v in equation.invars), *equation.params["out_shapes"]),
            equation.params["grid"],
            dict(equation.params["metaparams"]),
            dict(equation.params["backend_options"]),
        )
        for equation in _kernel_calls(traced.jaxpr)
    ]


def _kernel_calls(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "triton_kernel_call":
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from _kernel_calls(inner)


def compiled(launch: Launch, gpu: GPU) -> Machine:
    """Compiles a kernel for an NVIDIA GPU and reads its machine code."""
    kernel = _compile(launch, GPUTarget("cuda", round(10 * float(gpu.architecture)), 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, usage = _tool("nvdisasm", "-c", file.name), _tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None
    return _read(code, int(found[1]), kernel.metadata.shared)


def compiled_for_amd(launch: Launch, gpu: GPU) -> str:
    """The assembly of a kernel for an AMD GPU."""
    return _compile(launch, GPUTarget("hip", gpu.architecture, 64)).asm["amdgcn"]


def _compile(launch: Launch, gpu: GPUTarget) -> Any:
    names = launch.function.arg_names
    arrays = [name for name in names if name not in launch.constants]
    types = dict(zip(arrays, (TYPES[str(a.dtype)] for a in launch.arrays), strict=True))
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types}  # as XLA's buffers are
    source = ASTSource(launch.function, signature, launch.constants, aligned)
    return triton.compile(source, target=gpu, options=launch.options)


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _read(code: str, registers: int, shared: int) -> Machine:
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", found[1]))
    spans = []
    for i, instruction in enumerate(instructions):
        found = re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if found and labels[found[1]] < i:  # the endless loop behind the last instruction jumps to itself
            spans.append((labels[found[1]], i + 1))
    loops, inside = [], set()
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        own = [instructions[i] for i in range(start, end) if i not in inside]
        inside |= set(range(start, end))
        operations = collections.Counter(instruction.split()[0].split(".")[0] for instruction in own)
        loops.append(Loop(start, end, len(own), _spills(own), operations, sum(map(_shared, own))))
    return Machine(tuple(loops), len(instructions), _spills(instructions), registers, shared)


def _shared(instruction: str) -> float:
    """Cycles that a warp's instruction takes of shared memory."""
    operation, *modifiers = instruction.split()[0].split(".")
    if operation in ("LDS", "STS", "LDGSTS"):
        return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    if operation == "LDSM":
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if found := re.match(
        r"(?:HGMMA|IGMMA|QGMMA)\.64x(\d+)x(\d+)", instruction
    ):  # four warps read the right operand once
        return int(found[1]) * int(found[2]) * (2 if operation == "HGMMA" else 1) / 128 / 4
    return 0


def _spills(instructions: list[str]) -> int:
    return sum(instruction.startswith(("LDL", "STL")) for instruction in instructions)
