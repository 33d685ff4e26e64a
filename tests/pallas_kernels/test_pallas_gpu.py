"""`remat_project` of `pallas_gpu` without a GPU: its interpreter, what each thread loads, and lowering for an H200.

The interpreter has stand-ins for operands in registers and for the two functions written below Pallas. One of these,
the loads of packed words, is run here thread by thread; the other is a multiply-add.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import RematProject, target
from pallas_kernels.pallas_gpu import remat_project, remat_project_kernel
from tests.compiled import dequantized, quantized
from tests.pallas_kernels import lanes
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


@pytest.mark.parametrize(("bits", "axis"), [(2, "channel"), (3, "token"), (4, "channel"), (8, "token")])
def test_interpreted(bits: int, axis: Any) -> None:
    stream = quantized(jnp.asarray(random(3, 1, 128, 384)), StreamSpec(384, bits, axis))  # more steps than stages
    weight = jnp.asarray(random(384, 128), jnp.bfloat16)
    np.testing.assert_allclose(project(stream, weight), expected(stream, weight), rtol=BF16_ROUNDING, atol=1e-3)


@pytest.mark.parametrize(("columns", "group"), [(192, 128), (256, 64)])
def test_interpreted_with_several_tiles_of_columns(columns: int, group: int) -> None:
    stream = quantized(jnp.asarray(random(1, 4, 128, 256)), StreamSpec(256, 4, "token", group))
    weight = jnp.asarray(random(256, columns), jnp.bfloat16)
    np.testing.assert_allclose(project(stream, weight), expected(stream, weight), rtol=BF16_ROUNDING, atol=1e-3)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_every_thread_loads_the_codes_that_wgmma_wants_of_it(p: int) -> None:
    codes = np.random.default_rng(p).integers(0, 2**p, (128, 64))
    bits = next(bits for bits, planes in PLANES.items() if planes[-1] == p)
    low = sum(PLANES[bits][:-1])
    words = np.asarray(pack(jnp.asarray(codes, jnp.uint32) << low, bits)[-1])  # [4p, 64]
    rows = min(8, 4 * p)
    tiles = words.reshape(4 * p // rows, rows, 8, 8).transpose(0, 2, 1, 3)
    (found,) = lanes.run(lambda tiles: [remat_project_kernel._load_fields(tiles, p)], tiles)
    np.testing.assert_array_equal(found & (2**p - 1), codes[:64])
    np.testing.assert_array_equal(found >> 16 & (2**p - 1), codes[64:])


SHAPES = {
    "llama-3.1-8b": (1024, 1024),  # a joint latent and the keys of 8 heads; so has Qwen3-8B
    "llama-2-7b": (4096, 4096),
}


@pytest.mark.parametrize(
    ("model", "bits", "axis"),
    [
        ("llama-3.1-8b", 2, "token"),
        ("llama-3.1-8b", 3, "channel"),
        ("llama-2-7b", 4, "token"),
        ("llama-2-7b", 8, "channel"),
    ],
)
def test_lowers_for_an_h200(model: str, bits: int, axis: Any) -> None:
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
