"""`remat_project` and `decode_attention`: every backend against attention computed plainly from what is stored."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import KeyRebuild
from xquant_jax.attention import Geometry
from xquant_jax.errors import ConfigError
from xquant_jax.quantization import Blocks, StreamSpec, dequantize, quantize
from xquant_jax.rope import Rope

LAYERS, BATCH, BLOCKS, HEADS, KV_HEADS, DIM, WIDTH = 2, 6, 19, 6, 2, 16, 32
FLUSHED = np.asarray([0, 1, 7, 8, 9, 19], np.int32)  # nothing, one block, around a tile's end, everything
FREQUENCIES = Rope().frequencies(DIM)
NO_WINDOW = 2**30


@pytest.fixture(params=["xla"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def stream(bits: int, axis: str, seed: int) -> Blocks:
    return quantize(jnp.asarray(random(LAYERS, BATCH, BLOCKS, 128, WIDTH, seed=seed)), StreamSpec(WIDTH, bits, axis))


def plain_attention(q, keys, values, flushed, positions, sliding_window, rotate) -> tuple[np.ndarray, np.ndarray]:
    """One query head at a time, float64, complex rotations; keys [S, K, d], values [S, K or 1, C]."""
    batch, length, heads, dim = q.shape
    out = np.zeros((batch, length, heads, values.shape[-1]))
    lse = np.full((batch, length, heads), -np.inf)

    def turn(x: np.ndarray, position: np.ndarray | int) -> np.ndarray:
        if not rotate:
            return x
        z = x[..., : dim // 2] + 1j * x[..., dim // 2 :]
        z = z * np.exp(1j * np.multiply.outer(position, FREQUENCIES.astype(np.float64)))
        return np.concatenate([z.real, z.imag], axis=-1)

    for b, t, h in np.ndindex(batch, length, heads):
        s = np.arange(128 * flushed[b])
        s = s[positions[b, t] - s < sliding_window]
        if not len(s):
            continue
        kv = h // (heads // KV_HEADS)
        score = turn(keys[b, s, kv], s) @ turn(q[b, t, h], positions[b, t]) / math.sqrt(dim)
        lse[b, t, h] = np.log(np.exp(score - score.max()).sum()) + score.max()
        out[b, t, h] = np.exp(score - lse[b, t, h]) @ values[b, s, kv if values.shape[2] > 1 else 0]
    return out, lse


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["per_head", "dense", "identity"])
@pytest.mark.parametrize("new", [1, 3])
def test_decode_attention(implementation: str, bits: int, form: str, new: int) -> None:
    matrix = {
        "per_head": random(KV_HEADS, WIDTH // KV_HEADS, DIM),
        "dense": random(WIDTH, KV_HEADS * DIM) / 4,
        "identity": None,
    }[form]
    rebuild = KeyRebuild(
        matrix=None if matrix is None else jnp.asarray(matrix),
        bias=jnp.asarray(random(KV_HEADS * DIM, seed=3)) if form == "dense" else None,
        norm=jnp.asarray(1 + random(DIM, seed=4) / 4) if form == "per_head" else None,
        norm_eps=1e-5,
    )
    key, value = stream(bits, "channel", seed=1), stream(bits, "token", seed=2)
    value_heads = 1 if form == "dense" else KV_HEADS
    sliding_window = 700 if new == 3 else NO_WINDOW
    q = random(BATCH, new, HEADS, DIM)
    positions = 128 * FLUSHED[:, None] + 40 + np.arange(new)
    geometry = Geometry(
        jnp.asarray(positions), sliding_window, jnp.asarray(FREQUENCIES), DIM**-0.5, rotated=form == "identity"
    )
    part = pallas_kernels.decode_attention(
        jnp.asarray(q),
        key,
        rebuild,
        value,
        jnp.asarray(FLUSHED),
        geometry,
        layer=1,
        num_kv_heads=KV_HEADS,
        value_heads=value_heads,
        implementation=implementation,
    )
    z = np.asarray(dequantize(key))[1].reshape(BATCH, -1, WIDTH).astype(np.float64)
    if form == "per_head":
        keys = np.einsum("bske,ked->bskd", z.reshape(BATCH, -1, KV_HEADS, WIDTH // KV_HEADS), matrix)
        keys = keys / np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(rebuild.norm)
    else:
        keys = z if matrix is None else z @ matrix + np.asarray(rebuild.bias)
        keys = keys.reshape(BATCH, -1, KV_HEADS, DIM)
    values = np.asarray(dequantize(value))[1].reshape(BATCH, BLOCKS * 128, value_heads, -1).astype(np.float64)
    out, lse = plain_attention(q, keys, values, FLUSHED, positions, sliding_window, form != "identity")
    np.testing.assert_allclose(part.lse, lse, atol=2e-4)
    np.testing.assert_allclose(part.out, out, atol=2e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_remat_project(implementation: str, bits: int, axis: str) -> None:
    spec = StreamSpec(WIDTH, bits, axis)
    blocks = quantize(jnp.asarray(random(BATCH, 3, 128, WIDTH)), spec)
    weight = random(WIDTH, 24)
    got = pallas_kernels.remat_project(blocks, jnp.asarray(weight), implementation=implementation)
    expected = np.asarray(dequantize(blocks)).reshape(BATCH, 3 * 128, WIDTH).astype(np.float64) @ weight
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_widths_that_do_not_fit_are_an_error() -> None:
    blocks = quantize(jnp.zeros((1, 1, 128, WIDTH)), StreamSpec(WIDTH, 4))
    with pytest.raises(ConfigError, match=r"width 32 cannot be multiplied by a .16, 8. weight"):
        pallas_kernels.remat_project(blocks, jnp.zeros((16, 8)))
