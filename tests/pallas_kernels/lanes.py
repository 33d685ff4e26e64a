"""Evaluates straight-line code of a warpgroup for all 128 threads: the values of its registers, threads first.

Of the instructions of a whole warp it has those that `pallas_gpu.fragments` uses, after the PTX ISA ("Matrix Fragments
for mma.m16n8k16", `movmatrix`, `prmt`, `lop3`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.interpreters.mlir import make_ir_context
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

THREADS = np.arange(128)
WARP, G, C = THREADS // 32, THREADS % 32 // 4, THREADS % 4
TYPES = {"i16": np.uint16, "i32": np.uint32, "index": np.int64, "f32": np.float32, "bf16": jnp.bfloat16}
NAMES = {np.dtype(v): k for k, v in TYPES.items()}


@dataclasses.dataclass(frozen=True)
class Held:
    """An array that the threads hold in their registers, in the layout of `wgmma`."""

    array: np.ndarray


def run(build: Callable[..., Sequence[mgpu.FragmentedArray]], *inputs: np.ndarray | Held) -> list[np.ndarray]:
    """The arrays that `build` makes of references to memory, and of arrays that are held."""
    with make_ir_context() as context, ir.Location.unknown():
        mgpu.dialect.register_dialect(context)  # pyright: ignore[reportPrivateImportUsage]
        module = ir.Module.create()
        kinds, numbers = [], []
        for x in inputs:
            if isinstance(x, Held):
                registers = held(x.array)
                kinds += [ir.Type.parse(f"vector<2x{NAMES[x.array.dtype]}>")] * len(registers)
                numbers += registers
            else:
                kinds.append(ir.Type.parse(f"memref<{'x'.join(map(str, x.shape))}x{NAMES[x.dtype]}>"))
                numbers.append(x)
        with ir.InsertionPoint(module.body):
            function = func.FuncOp("run", (kinds, []))
            with ir.InsertionPoint(function.add_entry_block()):
                arguments = iter(function.arguments)
                built = build(*(_held(x.array, arguments) if isinstance(x, Held) else next(arguments) for x in inputs))
        values = dict(zip(function.arguments, numbers, strict=True))
        evaluate(function.entry_block, values)
        return [whole([values[register] for register in a.registers.flat], a.shape) for a in built]


def _held(array: np.ndarray, arguments: Iterator[Any]) -> mgpu.FragmentedArray:
    layout = mgpu.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape(array.shape), dtype=object)
    for at in np.ndindex(registers.shape):
        registers[at] = next(arguments)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def whole(registers: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The array whose pairs the threads hold (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16")."""
    out = np.zeros(shape, registers[0].dtype)
    for number, register in enumerate(registers):
        tile, s = divmod(number, 2)
        m, j = divmod(tile, shape[1] // 8)
        for i in range(2):
            out[64 * m + 16 * WARP + G + 8 * s, 8 * j + 2 * C + i] = register[:, i]
    return out


def held(array: np.ndarray) -> list[np.ndarray]:
    """The pairs of an array that threads hold: the inverse of `whole`."""
    rows, columns = array.shape
    return [
        np.stack([array[64 * m + 16 * WARP + G + 8 * s, 8 * j + 2 * C + i] for i in range(2)], axis=-1)
        for m in range(rows // 64)
        for j in range(columns // 8)
        for s in range(2)
    ]


def evaluate(block: Any, values: dict[Any, np.ndarray]) -> None:
    """Adds the values of all results of a block, [threads] or [threads, length]."""
    for op in block.operations:
        operands = [values[operand] for operand in op.operands]
        name, attributes = op.operation.name, op.attributes
        with np.errstate(over="ignore"):
            result = _result(name, attributes, op, operands)
        values[op.results[0]] = result


def _result(name: str, attributes: Any, op: Any, x: list[Any]) -> Any:
    match name:
        case "gpu.thread_id":
            return THREADS if "dim<x>" in str(op) else 0 * THREADS
        case "gpu.block_dim":
            return np.full(128, 128 if "dim<x>" in str(op) else 1)
        case "arith.constant":
            return _constant(attributes["value"], op.results[0].type)
        case "arith.addi" | "arith.addf":
            return x[0] + x[1]
        case "arith.subi":
            return x[0] - x[1]
        case "arith.muli" | "arith.mulf":
            return x[0] * x[1]
        case "arith.divui":
            return x[0] // x[1]
        case "arith.remui":
            return x[0] % x[1]
        case "arith.andi":
            return x[0] & x[1]
        case "arith.ori":
            return x[0] | x[1]
        case "arith.xori":
            return x[0] ^ x[1]
        case "arith.shli":
            return x[0] << x[1]
        case "arith.shrui":
            return x[0] >> x[1]
        case "arith.maximumf":
            return np.maximum(x[0], x[1])
        case "arith.index_cast" | "arith.index_castui" | "arith.extui":
            return x[0].astype(TYPES[str(op.results[0].type)])
        case "arith.bitcast":
            return x[0].view(TYPES[str(op.results[0].type)])
        case "vector.bitcast":
            return np.ascontiguousarray(x[0]).view(TYPES[str(ir.VectorType(op.results[0].type).element_type)])
        case "vector.broadcast":
            length = ir.VectorType(op.results[0].type).shape[0]
            return np.repeat(x[0].reshape(128, 1), length, axis=1)
        case "vector.extract":
            return x[0][:, _numbers(attributes["static_position"])[0]]
        case "vector.extract_strided_slice":
            (start,), (size,) = (_numbers(attributes[key]) for key in ("offsets", "sizes"))
            return x[0][:, start : start + size]
        case "vector.from_elements":
            return np.stack(x, axis=-1)
        case "vector.load":
            memory, *where, last = x
            length = ir.VectorType(op.results[0].type).shape[0]
            return np.stack([memory[(*where, last + i)] for i in range(length)], axis=-1)
        case "llvm.intr.fma":
            return (x[0].astype(np.float64) * x[1].astype(np.float64) + x[2].astype(np.float64)).astype(x[0].dtype)
        case "llvm.intr.fshl":
            by = x[2] & 31
            return np.where(by == 0, x[0], (x[0] << by) | (x[1] >> (32 - by) % 32))
        case "llvm.extractvalue":
            return x[0][_numbers(attributes["position"])[0]]
        case "nvvm.shfl.sync":
            assert "bfly" in str(op)
            return x[1][THREADS ^ x[2].astype(np.int64)]
        case "llvm.inline_asm":
            return _assembly(ir.StringAttr(attributes["asm_string"]).value, x)
    raise NotImplementedError(name)


def _assembly(code: str, x: list[np.ndarray]) -> Any:
    name = code.split()[0]
    if name == "prmt.b32":
        digits = int(re.findall(r"\d+", code)[-1])
        parts = np.stack([(a >> np.uint32(8 * i)) & np.uint32(255) for a in x for i in range(4)])
        return sum(parts[digits >> 4 * i & 7] << np.uint32(8 * i) for i in range(4))
    if name == "lop3.b32":
        assert code.endswith("0xEA;")
        mask, more = code.split(",")[2:4]
        return (x[0] & np.uint32(int(mask))) | (x[1] if len(x) > 1 else np.uint32(int(more)))
    if name == "movmatrix.sync.aligned.m8n8.trans.b16":
        return _joined(np.stack([_part(x[0], 32 * WARP + 4 * (2 * C + i) + G // 2, G % 2) for i in range(2)], axis=-1))
    if name.startswith("{.reg"):  # a difference of products, the first of which is not rounded
        a, b, c, d = (_pair(part).astype(np.float64) for part in x)
        return _joined((a * c - (b * d).astype(jnp.bfloat16).astype(np.float64)).astype(jnp.bfloat16))
    assert name == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    left, right, total = (np.zeros((4, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
    for number in range(4):
        pair = _pair(x[number])
        for i in range(2):
            left[WARP, G + 8 * (number % 2), 2 * C + 8 * (number // 2) + i] = pair[:, i]
            total[WARP, G + 8 * (number // 2), 2 * C + number % 2] = x[6 + number]
    for number in range(2):
        pair = _pair(x[4 + number])
        for i in range(2):
            right[WARP, 2 * C + 8 * number + i, G] = pair[:, i]
    product = total + left @ right
    return [product[WARP, G + 8 * (i // 2), 2 * C + i % 2].astype(np.float32) for i in range(4)]


def _pair(register: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(register).view(jnp.bfloat16).reshape(128, 2)


def _joined(pair: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pair).view(np.uint32).reshape(128)


def _part(register: np.ndarray, threads: np.ndarray, half: np.ndarray) -> np.ndarray:
    """One half of the registers of other threads."""
    return np.ascontiguousarray(register).view(np.uint16).reshape(128, 2)[threads, half]


def _constant(value: Any, kind: Any) -> np.ndarray:
    if isinstance(kind, ir.VectorType):
        raise NotImplementedError(kind)
    number = ir.FloatAttr(value).value if isinstance(value, ir.FloatAttr) else ir.IntegerAttr(value).value
    if isinstance(number, int) and str(kind) == "i32":
        number %= 2**32
    return np.full(128, number, TYPES[str(kind)])


def _numbers(attribute: Any) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", str(attribute).split(":")[-1])]
