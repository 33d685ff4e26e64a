"""Compiles the Triton kernels for GPUs that need not be there, and reads what became of them.

Nothing here runs on a GPU: `triton.compile` builds a cubin, and the disassembler that comes with Triton lists its
machine instructions. What a loop costs is known from that, short of stalls.
"""

import collections
import dataclasses
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import eight_bits, target
from pallas_kernels.calls import Accumulate, DecodeAttention
from pallas_kernels.operands import Accumulation, KeyRebuild
from pallas_kernels.triton import accumulate, decode_attention, launching
from pallas_kernels.triton.kernels import find
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import StreamSpec, quantize
from xquant_jax.numerics.rope import Rope

KINDS = {8.0: "NVIDIA A100", 8.9: "NVIDIA L4", 9.0: "NVIDIA H100", 10.0: "NVIDIA B200"}

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32", "uint32": "*u32", "int8": "*i8"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as an operation would launch it."""

    kernel: str
    arrays: tuple[jax.ShapeDtypeStruct, ...]  # inputs, then what it writes
    grid: tuple[int, ...]
    warps: int
    stages: int
    constants: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Machine instructions a warp executes in one turn, those of loops inside it excluded; how many are spills."""

    start: int
    end: int
    instructions: int
    spills: int
    operations: collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Machine code: loops from the innermost out, instructions and spills outside of them and in them, registers a
    thread, bytes of shared memory."""

    loops: tuple[Loop, ...]
    instructions: int
    spills: int
    registers: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Model:
    """Attention of a model; `width` is that of the key stream."""

    heads: int
    kv_heads: int
    width: int
    dim: int = 128
    norm: bool = False
    along_token: bool = False  # how the key stream is quantized


MODELS = {
    "Llama-3.1-8B": Model(32, 8, 1024),
    "Llama-2-7B": Model(32, 32, 4096, along_token=True),
    "Llama-3.1-8B, xquant-cl": Model(32, 8, 2048, along_token=True),
    "Qwen3-8B": Model(32, 8, 1024, norm=True),
}


def of_model(model: Model, bits: int, form: str, capability: float, amd: bool = False) -> list[Launch]:
    """The kernels that read one layer of `xquant`: 8 sequences of 32 k tokens, one new token each.

    form: `per_head` or `dense`, or `int8` or `fp8`: dense with a matrix of that type.
    """
    key = StreamSpec(model.width, bits, "token" if model.along_token else "channel")
    columns = model.kv_heads * model.dim
    dense = (model.width, columns)
    shape = (model.kv_heads, model.dim, model.dim) if form == "per_head" else dense
    small = {}
    if form in eight_bits.TYPES:
        small = jax.eval_shape(
            lambda w: eight_bits.quantize_matrix(w, form, 128), jax.ShapeDtypeStruct((1, *dense), jnp.bfloat16)
        )
        small = {name: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for name, a in small.items()}

    def history(spec: StreamSpec) -> Any:
        return jax.eval_shape(lambda: quantize(jnp.zeros((1, 8, 256, 128, model.width)), spec))

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def operation(q: Any, key: Any, rebuild: Any, value: Any, history_blocks: Any, positions: Any) -> Any:
        geometry = Geometry(positions, 2**30, jnp.asarray(Rope().frequencies(model.dim)), model.dim**-0.5)
        heads = {"num_kv_heads": model.kv_heads, "value_heads": model.kv_heads if form == "per_head" else 1}
        return decode_attention.run(DecodeAttention(q, key, rebuild, value, history_blocks, geometry, layer=0, **heads))

    return launches(
        operation,
        array(8, 1, model.heads, model.dim),
        history(key),
        KeyRebuild(**{"matrix": array(*shape), "norm": array(model.dim) if model.norm else None, **small}),
        history(StreamSpec(model.width, bits, "token")),
        array(8, dtype=jnp.int32),
        array(8, 1, dtype=jnp.int32),
        capability=capability,
        amd=amd,
    )


SUMS = {  # width of the sum, of the stream, of what the sum becomes in between; lift
    "Llama-3.1-8B": (2048, 2048, (2048,), False),
    "Llama-3.1-8B, rank=512": (2048, 2048, (512, 2048), False),
    "Llama-3.1-8B, predict=paper": (4096, 2048, (), True),
    "Llama-2-7B": (4096, 4096, (), False),
}
"""Running sums of `xquant-cl`."""


def of_sum(name: str, bits: int, capability: float, amd: bool = False) -> list[Launch]:
    """The kernels that accumulate one layer of one of `SUMS`: 8 sequences of 4 k tokens, a single range."""
    width, stored, predict, lift = SUMS[name]

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def history(spec: StreamSpec, *leading: int) -> Any:
        return jax.eval_shape(lambda: quantize(jnp.zeros((*leading, 8, 32, 128, spec.width)), spec))

    matrices = tuple(array(a, b) for a, b in itertools.pairwise((width, *predict)))
    return launches(
        lambda *operands: accumulate.run(Accumulate(*operands, layer=0)),
        history(StreamSpec(width, 8)),
        history(StreamSpec(stored, bits), 1),
        Accumulation(matrices, array(stored, width) if lift else None),
        array(8, dtype=jnp.int32),
        capability=capability,
        amd=amd,
    )


def launches(operation: Callable[..., Any], *args: Any, capability: float, amd: bool = False) -> list[Launch]:
    """What an operation of `pallas_kernels.triton` would launch on a GPU of this compute capability; nothing is run.

    Arguments may be abstract (`jax.ShapeDtypeStruct`).
    """
    seen: list[Launch] = []

    def record(
        kernel: str,
        *inputs: Any,
        grid: Any,
        outputs: Any = (),
        updated: Any = (),
        warps: int,
        stages: int,
        **constants: Any,
    ) -> list:
        written = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*updated, *outputs)]
        arrays = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs)
        seen.append(Launch(kernel, (*arrays, *written), grid, warps, stages, constants))
        return [jnp.zeros(a.shape, a.dtype) for a in written]

    with (
        mock.patch.object(launching, "run", record),
        target.compiling_for("gpu", "AMD Instinct MI300X" if amd else KINDS[capability]),
    ):
        jax.eval_shape(operation, *args)
    return seen


def compiled(launch: Launch, capability: float) -> Machine:
    """Compiles a kernel for an NVIDIA GPU of this compute capability, such as 9.0, and reads its machine code."""
    kernel = _compile(launch, GPUTarget("cuda", round(10 * capability), 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, usage = _tool("nvdisasm", "-c", file.name), _tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None
    return _read(code, int(found[1]), kernel.metadata.shared)


def compiled_for_amd(launch: Launch, architecture: str) -> str:
    """The assembly of a kernel for an AMD GPU, such as gfx942 (MI300)."""
    return _compile(launch, GPUTarget("hip", architecture, 64)).asm["amdgcn"]


def _compile(launch: Launch, gpu: GPUTarget) -> Any:
    function = find(launch.kernel)
    arrays = [name for name in function.arg_names if name not in launch.constants]
    types = dict(zip(arrays, (TYPES[str(a.dtype)] for a in launch.arrays), strict=True))
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    # buffers of XLA are aligned
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in types}
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    if gpu.backend == "cuda":
        options["ptx_version"] = launching.PTX_VERSION
    return triton.compile(ASTSource(function, signature, launch.constants, aligned), target=gpu, options=options)


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
        loops.append(Loop(start, end, len(own), _spills(own), operations))
    return Machine(tuple(loops), len(instructions), _spills(instructions), registers, shared)


def _spills(instructions: list[str]) -> int:
    return sum(instruction.startswith(("LDL", "STL")) for instruction in instructions)
