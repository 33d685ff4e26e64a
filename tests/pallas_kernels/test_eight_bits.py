"""Rebuild matrices in 8 bits: how far they are off, and that codes times them are what the definition says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import DecodeAttention, KeyRebuild, target
from pallas_kernels.chips import TPUS
from pallas_kernels.eight_bits import quantize_matrix
from pallas_kernels.pallas_tpu import decode_attention
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.packing import unpack
from xquant_jax.numerics.quantization import Blocks, StreamSpec, allocate_blocks, dequantize, quantize

LAYERS, C, R, GROUP = 2, 96, 40, 32


def matrices() -> np.ndarray:
    """Columns of sizes from 1e-3 to 1e3, and one of zeros."""
    w = np.random.default_rng(0).standard_normal((LAYERS, C, R)) * np.logspace(-3, 3, R)
    w[..., 7] = 0
    return w.astype(np.float32)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_matrix_is_off_by_no_more_than_its_rounding(name: str) -> None:
    w = matrices()
    small = quantize_matrix(jnp.asarray(w), name, GROUP)
    scale = np.asarray(small["scale"], np.float64)[:, None]
    off = np.abs(np.asarray(small["matrix"], np.float64) * scale - w)
    most = scale / 2 if name == "int8" else np.maximum(np.abs(w) / 16, scale / 1024)
    assert (off <= most * (1 + 1e-5)).all()
    assert off.max(axis=(0, 1)).astype(bool).sum() == R - 1  # all but the zeros are rounded


@pytest.mark.parametrize(("name", "bits"), [("int8", 2), ("int8", 8), ("fp8", 4)])
def test_scaled_integer_products_and_sums_are_the_definition(name: str, bits: int) -> None:
    """K = sum over g of s_g (q_g W_g) + z_g (1 W_g), times the columns' scales."""
    x = np.random.default_rng(1).standard_normal((1, 1, 128, C)).astype(np.float32)
    blocks = quantize(jnp.asarray(x), StreamSpec(C, bits, "token", GROUP))
    small = {field: a[1] for field, a in quantize_matrix(jnp.asarray(matrices()), name, GROUP).items()}
    codes, w = np.asarray(unpack(blocks.planes, bits), np.float64)[0, 0], np.asarray(small["matrix"], np.float64)
    scale, zero = (np.asarray(a, np.float64)[0, 0] for a in (blocks.scale, blocks.zero))
    keys = zero @ np.asarray(small["sums"], np.float64)
    for g in range(C // GROUP):
        channels = slice(g * GROUP, (g + 1) * GROUP)
        keys += scale[:, g : g + 1] * (codes[:, channels] @ w[channels])
    keys *= np.asarray(small["scale"], np.float64)
    defined = KeyRebuild(**small)(dequantize(blocks)[0], num_kv_heads=4)
    largest = np.maximum(np.abs(keys).max(axis=0), 1e-30)  # of each column
    np.testing.assert_allclose(np.asarray(defined).reshape(128, R) / largest, keys / largest, atol=1e-5)


def test_a_tpu_refuses_what_its_matrix_unit_does_not_multiply() -> None:
    def refusal(name: str, axis="token", bits=4) -> str:
        def stream(axis) -> Blocks:
            return jax.eval_shape(lambda: allocate_blocks(StreamSpec(256, bits, axis), (1, 1, 1)))

        matrix = jax.eval_shape(
            lambda: {k: a[0] for k, a in quantize_matrix(jnp.zeros((1, 256, 128)), name, 128).items()}
        )
        rebuild = KeyRebuild(**matrix)
        geometry = Geometry(jnp.zeros((1, 1), jnp.int32), 8, jnp.zeros(32), 1.0)
        operands = (jnp.zeros((1, 1, 2, 64)), stream(axis), rebuild, stream("token"), jnp.zeros(1), geometry, 0, 2, 1)
        return decode_attention.refuse(DecodeAttention(*operands, skip=jnp.zeros(1))) or ""

    for kind in (kind for tpu in TPUS.values() for kind in tpu.kinds):
        takes, other, dtype = ("fp8", "int8", "int8") if kind == "TPU7x" else ("int8", "fp8", "float8_e4m3fn")
        with target.compiling_for("tpu", kind):
            assert refusal(takes) == ""
            reason = f"a matrix of {dtype}; the matrix unit of this TPU takes bfloat16 and {takes}"
            assert reason in refusal(other)
            assert f"quantized along the channel are not rebuilt in {takes}; those along the token are" in refusal(
                takes, "channel"
            )
    with target.compiling_for("tpu", "TPU7x"):
        assert "keys of 8 bits are not rebuilt in fp8, which holds codes of up to 4" in refusal("fp8", bits=8)
    with target.compiling_for("tpu", "TPU v9"):
        for name in ("int8", "fp8"):
            assert refusal(name).endswith("the matrix unit of this TPU takes bfloat16")
