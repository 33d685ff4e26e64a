"""`pallas_gpu` without a GPU: its interpreter, what each thread loads, and lowering for an H200.

The interpreter has stand-ins for operands in registers and for the two functions written below Pallas. One of these,
the loads of packed words, is run here thread by thread; the other is a multiply-add.
"""

from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.mlir import make_ir_context
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

import pallas_kernels
from pallas_kernels import Quantize, RematProject, target
from pallas_kernels.pallas_gpu import remat_project, remat_project_kernel
from tests.compiled import dequantized, quantized
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.packing import PLANES, pack
from xquant_jax.numerics.quantization import Blocks, StreamSpec, allocate_blocks

BF16_ROUNDING = 2**-8  # half the distance of neighbouring numbers, relative


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng([0, *shape]).standard_normal(shape).astype(np.float32)


def project(stream: Blocks, weight: jax.Array) -> np.ndarray:
    with target.interpreted():
        return np.asarray(pallas_kernels.run(RematProject(stream, weight), "pallas_gpu"), np.float64)


def expected(stream: Blocks, weight: jax.Array) -> np.ndarray:
    x = np.asarray(dequantized(stream)).astype(jnp.bfloat16).astype(np.float64)
    return x.reshape(x.shape[0], -1, x.shape[-1]) @ np.asarray(weight, np.float64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_interpreted(bits: int, axis: str) -> None:
    stream = quantized(jnp.asarray(random(3, 1, 128, 384)), StreamSpec(384, bits, axis))  # more steps than stages
    weight = jnp.asarray(random(384, 128), jnp.bfloat16)
    np.testing.assert_allclose(project(stream, weight), expected(stream, weight), rtol=BF16_ROUNDING, atol=1e-3)


@pytest.mark.parametrize(("columns", "group"), [(192, 128), (256, 64)])
def test_interpreted_with_several_tiles_of_columns(columns: int, group: int) -> None:
    stream = quantized(jnp.asarray(random(1, 4, 128, 256)), StreamSpec(256, 4, "token", group))
    weight = jnp.asarray(random(256, columns), jnp.bfloat16)
    np.testing.assert_allclose(project(stream, weight), expected(stream, weight), rtol=BF16_ROUNDING, atol=1e-3)


def run(block: Any, words: np.ndarray) -> dict[Any, np.ndarray]:
    """Evaluates straight-line code for the 128 threads of a warpgroup: the value of every result, threads first."""
    thread = np.arange(128)
    values: dict[Any, np.ndarray] = {}
    for op in block.operations:
        operands = [values.get(operand) for operand in op.operands]
        match op.operation.name:
            case "gpu.thread_id":
                result = thread if "dim<x>" in str(op) else 0 * thread
            case "gpu.block_dim":
                result = np.full(128, 128 if "dim<x>" in str(op) else 1)
            case "arith.constant":
                result = np.full(128, ir.IntegerAttr(op.attributes["value"]).value)
            case "arith.addi":
                result = operands[0] + operands[1]
            case "arith.muli":
                result = operands[0] * operands[1]
            case "arith.divui":
                result = operands[0] // operands[1]
            case "arith.remui":
                result = operands[0] % operands[1]
            case "arith.shrui":
                result = operands[0] >> operands[1]
            case "arith.index_cast" | "arith.index_castui":
                result = operands[0]
            case "vector.broadcast":
                result = operands[0][:, None]
            case "vector.load":
                *where, last = operands[1:]
                result = np.stack([words[(*where, last + i)] for i in range(2)], axis=-1).astype(np.int64)
            case name:
                raise NotImplementedError(name)
        values[op.results[0]] = result
    return values


@pytest.mark.parametrize("p", [1, 2, 4])
def test_every_thread_loads_the_codes_that_wgmma_wants_of_it(p: int) -> None:
    codes = np.random.default_rng(p).integers(0, 2**p, (128, 64))
    bits = next(bits for bits, planes in PLANES.items() if planes[-1] == p)
    low = sum(PLANES[bits][:-1])
    words = np.asarray(pack(jnp.asarray(codes, jnp.uint32) << low, bits)[-1])  # [4p, 64]
    rows = min(8, 4 * p)
    tiles = words.reshape(4 * p // rows, rows, 8, 8).transpose(0, 2, 1, 3)
    with make_ir_context() as context, ir.Location.unknown():
        mgpu.dialect.register_dialect(context)
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            function = func.FuncOp("load", ([ir.Type.parse(f"memref<{'x'.join(map(str, tiles.shape))}xi32>")], []))
            with ir.InsertionPoint(function.add_entry_block()):
                loaded = remat_project_kernel._load_fields(function.arguments[0], p)
        values = run(function.entry_block, tiles)
        registers = [values[register] for register in loaded.registers.flat]
    # PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16", matrix A, four such operands side by side
    warp, row, column = np.arange(128) // 32, np.arange(128) % 32 // 4, np.arange(128) % 4
    assert len(registers) == 16
    for number, register in enumerate(registers):
        token = 16 * warp + row + 8 * (number % 2)
        for i in range(2):
            channel = 8 * (number // 2) + 2 * column + i
            np.testing.assert_array_equal(register[:, i] & (2**p - 1), codes[token, channel])
            np.testing.assert_array_equal(register[:, i] >> 16 & (2**p - 1), codes[token + 64, channel])


SHAPES = {
    "llama-3.1-8b": (1024, 1024),  # a joint latent and the keys of 8 heads; so has Qwen3-8B
    "llama-2-7b": (4096, 4096),
}


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_lowers_for_an_h200(model: str, bits: int, axis: str) -> None:
    width, columns = SHAPES[model]
    stream = jax.eval_shape(lambda: allocate_blocks(StreamSpec(width, bits, axis), (1, 32768 // 128)))
    weight = jax.ShapeDtypeStruct((width, columns), jnp.bfloat16)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    project = jax.jit(lambda call: pallas_kernels.run(call, "pallas_gpu"))
    with jax.sharding.use_abstract_mesh(mesh), target.compiling_for("gpu", "NVIDIA H200"):
        lowered = project.trace(RematProject(stream, weight)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("spec", "columns", "dtype", "reason"),
    [
        (StreamSpec(128, 16), 64, jnp.bfloat16, "the stream is not quantized"),
        (StreamSpec(128, 8, format="e4m3"), 64, jnp.bfloat16, "has format e4m3; it takes uniform"),
        (StreamSpec(128, 4), 64, jnp.float32, "bfloat16 weights, not float32"),
        (StreamSpec(96, 4), 64, jnp.bfloat16, "the stream is 96 wide; it takes multiples of 64"),
        (StreamSpec(128, 4), 40, jnp.bfloat16, "a 128 x 40 weight; it takes multiples of 64 columns"),
        (StreamSpec(128, 4, group=32), 64, jnp.bfloat16, "groups of 32 channels; it takes multiples of 64"),
        (StreamSpec(128, 4, "channel", 64), 64, jnp.bfloat16, "groups of 64 tokens; it takes whole blocks of 128"),
    ],
)
def test_what_it_does_not_take_is_an_error(spec: StreamSpec, columns: int, dtype: Any, reason: str) -> None:
    stream, weight = allocate_blocks(spec, (1, 1)), jnp.zeros((spec.width, columns), dtype)
    with target.interpreted(), pytest.raises(ConfigError, match=reason):
        pallas_kernels.run(RematProject(stream, weight), "pallas_gpu")


def test_a_gpu_that_is_not_a_hopper_is_an_error() -> None:
    stream, weight = allocate_blocks(StreamSpec(128, 4), (1, 1)), jnp.zeros((128, 64), jnp.bfloat16)
    with (
        target.compiling_for("gpu", "NVIDIA A100-SXM4-80GB"),
        pytest.raises(ConfigError, match=r"needs compute capability 9.0 \(Hopper\), and this GPU has 8.0"),
    ):
        pallas_kernels.run(RematProject(stream, weight), "pallas_gpu")


def test_an_empty_history_is_refused() -> None:
    call = RematProject(allocate_blocks(StreamSpec(128, 4), (1, 0)), jnp.zeros((128, 64), jnp.bfloat16))
    assert remat_project.refuse(call) == "a history without blocks"


def test_what_it_has_no_kernel_for_is_an_error_by_name() -> None:
    message = r"has kernels for remat_project only, none for quantize; choose None or \['triton', 'xla'\]"
    with target.interpreted(), pytest.raises(ConfigError, match=message):
        pallas_kernels.run(Quantize(jnp.zeros((1, 1, 128, 128)), StreamSpec(128, 4)), "pallas_gpu")
