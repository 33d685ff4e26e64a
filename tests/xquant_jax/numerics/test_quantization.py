"""The quantizer: every value stays within half a step, sizes are exact, bits are as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xquant_jax.errors import ConfigError
from xquant_jax.numerics.packing import unpack
from xquant_jax.numerics.quantization import StreamSpec, default_group, dequantize, quantize

pytestmark = pytest.mark.optimized

WIDTH = 6
TINY = 2.0**-126  # denormal float32 numbers count as zero on the devices
LARGEST = float(np.nextafter(np.float32(1e38), np.float32(0)))
values = st.floats(-LARGEST, LARGEST, width=32)
offsets = st.sampled_from([0.0, 1.0, -3e4, 1e10, -1e37])


@st.composite
def blocks(draw: st.DrawFn) -> np.ndarray:
    """Blocks of 128 tokens: wild values, constant groups, small values on huge offsets, spread-out tails."""
    kind = draw(st.sampled_from(["wild", "constant", "offset", "normal"]))
    if kind == "wild":
        return draw(hnp.arrays(np.float32, (128, WIDTH), elements=values, fill=values))
    if kind == "constant":
        return np.full((128, WIDTH), draw(values), np.float32)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((128, WIDTH)) * 10.0 ** draw(st.integers(-30, 30))
    return (x + draw(offsets) if kind == "offset" else x).astype(np.float32)


@settings(deadline=None, max_examples=200)
@given(x=blocks(), bits=st.sampled_from([2, 3, 4, 8]), axis=st.sampled_from(["token", "channel"]))
def test_error_is_at_most_half_a_step(x: np.ndarray, bits: int, axis: str) -> None:
    stored = quantize(jnp.asarray(x), StreamSpec(WIDTH, bits, axis, group=3 if axis == "token" else 0))
    scale = np.asarray(stored.scale).astype(np.float64)
    scale = np.repeat(scale, 3, axis=-1) if axis == "token" else scale
    back = np.asarray(dequantize(stored)).astype(np.float64)
    exact = x.astype(np.float64)
    rounding = 4 * np.finfo(np.float32).eps * (np.abs(exact) + np.abs(scale) * 2**bits) + TINY
    assert np.isfinite(back).all()
    assert (np.abs(back - exact) <= scale / 2 + rounding).all()


@settings(deadline=None, max_examples=200)
@given(x=blocks(), bits=st.sampled_from([2, 3, 4]), axis=st.sampled_from(["token", "channel"]))
def test_clipped_error_is_half_a_step_and_what_lies_beyond_the_range(x: np.ndarray, bits: int, axis: str) -> None:
    stored = quantize(jnp.asarray(x), StreamSpec(WIDTH, bits, axis, group=3 if axis == "token" else 0, clip=True))
    scale = np.asarray(stored.scale).astype(np.float64)
    scale = np.repeat(scale, 3, axis=-1) if axis == "token" else scale
    back = np.asarray(dequantize(stored)).astype(np.float64)
    exact = x.astype(np.float64)
    groups = exact.reshape(128, WIDTH // 3, 3) if axis == "token" else exact
    along = -1 if axis == "token" else 0
    low, high = groups.min(along, keepdims=True), groups.max(along, keepdims=True)
    moved = 3 / 4**bits * (high - low)
    beyond = np.maximum(low + moved - groups, groups - (high - moved)).clip(0).reshape(x.shape)
    size = np.broadcast_to(np.maximum(np.abs(low), np.abs(high)), groups.shape).reshape(x.shape)
    rounding = 8 * np.finfo(np.float32).eps * (size + np.abs(scale) * 2**bits) + TINY
    assert np.isfinite(back).all()
    assert (np.abs(back - exact) <= scale / 2 + beyond + rounding).all()


@pytest.mark.parametrize(
    ("bits", "whole", "clipped"), [(2, 0.2525, 0.1227), (3, 0.0461, 0.0386), (4, 0.01004, 0.00961)]
)
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_clipped_ranges_are_closer_to_normal_numbers(bits: int, whole: float, clipped: float, axis: str) -> None:
    """Mean squared errors, which vary by half a percent from one draw of so many numbers to another."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 128, 1024)), jnp.float32)

    def error(*, clip: bool) -> float:
        return float(jnp.mean((dequantize(quantize(x, StreamSpec(1024, bits, axis, clip=clip))) - x) ** 2))

    assert error(clip=False) == pytest.approx(whole, rel=0.01)
    assert error(clip=True) == pytest.approx(clipped, rel=0.01)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_a_group_of_equal_values_has_nothing_to_clip(axis: str) -> None:
    x = jnp.full((128, WIDTH), 1 / 3)
    whole, clipped = (quantize(x, StreamSpec(WIDTH, 2, axis, clip=clip)) for clip in (False, True))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(clipped), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_values_on_the_grid_are_exact_in_compiled_code(bits: int, axis: str) -> None:
    """0 ... 2^b - 1 has scale 1 and zero 0 exactly: the division by 2^b - 1 must not become a rounded product."""
    levels = 2**bits
    x = np.random.default_rng(0).integers(0, levels, (128, 256))
    if axis == "token":  # every group has both ends
        x[:, 0::128], x[:, 1::128] = 0, levels - 1
    else:
        x[0], x[1] = 0, levels - 1
    spec = StreamSpec(256, bits, axis)

    @jax.jit
    def in_a_loop(x: jax.Array) -> tuple[jax.Array, ...]:
        def body(i: int, carry: tuple) -> tuple:
            stored = quantize(x * (1 + 0 * i), spec)
            return unpack(stored.planes, bits), stored.scale, stored.zero

        return jax.lax.fori_loop(0, 2, body, jax.tree.map(jnp.zeros_like, body(0, ())))

    codes, scale, zero = in_a_loop(jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(codes, x)
    assert (np.asarray(scale).astype(np.float32) == 1).all()
    assert (np.asarray(zero).astype(np.float32) == 0).all()


@pytest.mark.parametrize(
    ("width", "group"), [(128, 128), (1024, 128), (192, 96), (576, 96), (32, 32), (7, 7), (131, 1)]
)
def test_group_is_the_largest_divisor_up_to_128(width: int, group: int) -> None:
    assert default_group(width) == group


def test_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"group=100 does not divide .* 192.*96"):
        StreamSpec(192, 4, group=100)


def test_five_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=5 is not supported; choose 2, 3, 4 or 8"):
        StreamSpec(128, 5)


@pytest.mark.parametrize(
    "stored", [{"bits": 8}, {"bits": 16}, {"bits": 4, "format": "codebook"}, {"bits": 4, "outliers": 1}]
)
def test_ranges_that_cannot_be_clipped_are_refused(stored: dict) -> None:
    with pytest.raises(ConfigError, match=rf"clip=True .*bits={stored['bits']} .* is not supported; .* clip=False"):
        StreamSpec(128, **stored, clip=True)
