"""What the threads of a warpgroup do in `pallas_gpu.fragments`: their instructions, run for all 128, against the
definitions in `pallas_gpu.warpgroup` that the interpreter runs."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pallas_gpu import fragments, warpgroup
from tests.pallas_kernels import lanes
from tests.pallas_kernels.lanes import Held
from xquant_jax.numerics.packing import pack


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng([1, *shape]).standard_normal(shape).astype(np.float32)


def bf16(a: np.ndarray) -> np.ndarray:
    return a.astype(jnp.bfloat16)


def words(bits: int, width: int) -> list[np.ndarray]:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (128, width))
    return [np.asarray(plane) for plane in pack(jnp.asarray(codes, jnp.uint32), bits)]


def in_shared_memory(plane: np.ndarray) -> np.ndarray:
    """[4p, C] as it is copied: tiles whose rows are 128 bytes, and of every 1024 bytes the 16-byte pieces of row r at
    their number xor r (CUDA C++ programming guide, "Tensor Memory Access", the swizzle of 128 bytes)."""
    rows, width = min(8, plane.shape[0]), plane.shape[1]
    tiles = plane.reshape(-1, rows, width // 32, 32).transpose(0, 2, 1, 3)
    lines = tiles.reshape(-1, 8, 4)
    number = np.arange(len(lines))[:, None] % 8
    return np.take_along_axis(lines, (np.arange(8)[None] ^ number)[..., None], axis=1).reshape(tiles.shape)


@pytest.mark.parametrize(("bits", "axis"), [(2, "channel"), (3, "token"), (4, "channel"), (8, "token")])
def test_keys(bits: int, axis: str) -> None:
    planes = words(bits, 64)
    shape = (1, 64) if axis == "channel" else (128, 8)
    scale, zero = bf16(random(*shape)), bf16(random(*shape[::-1]).reshape(shape))
    low, high = lanes.run(
        lambda scale, zero, *planes: fragments.load_keys(planes, scale, zero, bits, axis, fragments.utils.c(3, _i32())),
        scale,
        zero,
        *map(in_shared_memory, planes),
    )
    expected = warpgroup.keys(planes, scale, zero, bits, axis, 3, interpret=True)
    np.testing.assert_array_equal(low, expected[0])
    np.testing.assert_array_equal(high, expected[1])


@pytest.mark.parametrize("shape", [(128, 8), (6, 64)])  # eight groups of many; all of three
def test_scales_of_tokens(shape: tuple[int, int]) -> None:
    numbers = bf16(random(*shape))
    found = lanes.run(lambda a: fragments.load_tokens(a, fragments.utils.c(2, _i32())), numbers)
    np.testing.assert_array_equal(found, warpgroup.tokens(numbers, 2, interpret=True))


def test_rotation_and_scores() -> None:
    first, second, cos, sin = (bf16(random(4, 64, 64)[i]) for i in range(4))
    queries = bf16(random(2, 16, 32))
    arrays = [Held(a) for a in (first, second, cos, sin)]
    turned = lanes.run(fragments.rotate, *arrays)
    expected = warpgroup.rotate(*(jnp.asarray(a.array) for a in arrays), interpret=True)
    np.testing.assert_array_equal(turned, expected)
    (found,) = lanes.run(lambda *a: [fragments.score(*a)], *arrays[:2], queries)
    expected = warpgroup.score(jnp.asarray(first), jnp.asarray(second), queries, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weighing(bits: int) -> None:
    planes = words(bits, 64)
    scores, least = random(64, 8), np.repeat(random(4, 8), 16, axis=0)
    (top,) = lanes.run(lambda *a: [fragments.warp_max(*a)], Held(scores), Held(least))
    np.testing.assert_array_equal(top, warpgroup.warp_max(jnp.asarray(scores), jnp.asarray(least), interpret=True))
    sums, low, high = random(256, 8), bf16(random(64, 8)), bf16(random(8, 64).T)
    (found,) = lanes.run(
        lambda sums, top, low, high, *planes: [fragments.weigh(sums, top, low, high, planes, bits)],
        *map(Held, (sums, top, low, high)),
        *map(in_shared_memory, planes),
    )
    arrays = [jnp.asarray(a) for a in (sums, top, low, high)]
    expected = warpgroup.weigh(*arrays, words=planes, bits=bits, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def _i32() -> Any:
    return fragments.ir.IntegerType.get_signless(32)
