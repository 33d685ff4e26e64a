"""What only the Triton backend has: tiles and splits, refusals. Its machine code is for `test_triton_compiled.py`.

That it agrees with the reference is for the most part a matter of `test_operations.py`.
"""

import dataclasses
import importlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Accumulation, KeyRebuild, target, xla
from pallas_kernels.eight_bits import quantize_matrix
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import Blocks, StreamSpec, dequantize, quantize
from xquant_jax.numerics.rope import Rope

jax_triton = pytest.importorskip("jax_triton", reason="jax-triton is not installed; it is on Linux only")
backend = importlib.import_module("pallas_kernels.triton")
launching, running_sum, tiling = (
    importlib.import_module(f"pallas_kernels.triton.{name}") for name in ("launching", "running_sum", "tiling")
)
Tiles = tiling.Tiles

LAYERS, BLOCKS, HEADS, KV_HEADS, DIM = 2, 9, 4, 2, 64
FLUSHED = np.asarray([0, 1, 8, 9], np.int32)  # nothing, one block, one block short of everything, everything
NO_WINDOW = 2**30

# Codes enter products as 128 + code and the 128 is taken back: that costs 7 of float32's 24 bits.
TOLERANCE = 1e-3


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def stream(width: int, bits: int, axis: str, seed: int) -> Blocks:
    values = random(LAYERS, len(FLUSHED), BLOCKS, 128, width, seed=seed)
    return quantize(jnp.asarray(values), StreamSpec(width, bits, axis))


@dataclasses.dataclass(frozen=True)
class Case:
    """What is attended to, and how."""

    bits: int = 4
    form: str = "per_head"
    key_axis: str = "channel"
    value_heads: int = KV_HEADS
    new: int = 1
    dim: int = DIM
    sliding_window: int = NO_WINDOW
    bias: bool = False
    norm: bool = False
    rotated: bool = False
    shared_stream: bool = False

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        width = KV_HEADS * self.dim
        matrix = {
            "per_head": random(KV_HEADS, self.dim, self.dim) / 8,
            "dense": random(width, width) / 8,
            "identity": None,
        }[self.form]
        rebuild = KeyRebuild(
            matrix=None if matrix is None else jnp.asarray(matrix),
            bias=jnp.asarray(random(width, seed=3)) if self.bias else None,
            norm=jnp.asarray(1 + random(self.dim, seed=4) / 4) if self.norm else None,
            norm_eps=1e-5,
        )
        key = stream(width, self.bits, self.key_axis, seed=1)
        value = key if self.shared_stream else stream(width, self.bits, "token", seed=2)
        positions = jnp.asarray(128 * FLUSHED[:, None] + 40 + np.arange(self.new))
        geometry = Geometry(
            positions, self.sliding_window, jnp.asarray(Rope().frequencies(self.dim)), self.dim**-0.5, self.rotated
        )
        q = jnp.asarray(random(len(FLUSHED), self.new, HEADS, self.dim))
        arguments = (q, key, rebuild, value, jnp.asarray(FLUSHED), geometry)
        return arguments, {"num_kv_heads": KV_HEADS, "value_heads": self.value_heads}


def check(case: Case, tolerance: float = TOLERANCE) -> None:
    """The layer is a traced number, as in the scan over layers."""
    arguments, static = case.arguments()
    with target.interpreted():
        assert backend.refuse_decode_attention(*arguments, layer=1, **static) is None
        got = jax.jit(lambda layer: backend.decode_attention(*arguments, layer=layer, **static))(1)
        out, lse = np.asarray(got.out), np.asarray(got.lse)
    expected = xla.decode_attention(*arguments, layer=1, **static)
    np.testing.assert_allclose(lse, expected.lse, atol=tolerance)
    np.testing.assert_allclose(out, expected.out, atol=tolerance)


@pytest.mark.parametrize(
    "case",
    [
        Case(value_heads=1),  # keys of each head's own basis, values of a joint one
        Case(form="dense", key_axis="token", value_heads=1, shared_stream=True),  # X itself, as of Llama 2
        Case(new=3, sliding_window=200, norm=True, bias=True),
    ],
    ids=str,
)
def test_both_ways_to_read_values_agree_with_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("splits", [1, 2, 3, 9])
@pytest.mark.parametrize("tiles", [Tiles(fused=True), Tiles(blocks=2, chunk=16, fused=True), Tiles(blocks=4)], ids=str)
def test_any_tiles_and_splits_give_the_same(tiles: Tiles, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 blocks over 2, 3 and 9 parts: lengths end within, at and one block next to the end of a part and of a tile."""
    monkeypatch.setattr(tiling, "choose", lambda shape: tiles)
    monkeypatch.setattr(tiling, "splits", lambda *_: splits)
    check(Case())


def test_blocks_past_a_length_are_not_read() -> None:
    arguments, static = Case().arguments()
    q, key, rebuild, value, history_blocks, geometry = arguments

    def spoiled(stream: Blocks) -> Blocks:
        """NaN scales in every block that does not exist, and in all of the other layer."""
        exists = (jnp.arange(BLOCKS) < history_blocks[:, None])[None] & (jnp.arange(LAYERS) == 1)[:, None, None]
        poison = jnp.where(exists[..., None, None], 1.0, jnp.nan).astype(jnp.bfloat16)
        return stream.replace(scale=stream.scale * poison)

    with target.interpreted():
        part = backend.decode_attention(
            q, spoiled(key), rebuild, spoiled(value), history_blocks, geometry, layer=1, **static
        )
        assert np.isfinite(part.out).all()
        assert (np.isfinite(part.lse) == (FLUSHED > 0)[:, None, None]).all()


def test_remat_project_of_partial_tiles_agrees_with_the_reference() -> None:
    """3 blocks in tiles of 2, and 136 columns in tiles of 128."""
    blocks = quantize(jnp.asarray(random(1, 3, 128, 128)), StreamSpec(128, 3))
    weight = jnp.asarray(random(128, 136))
    with target.interpreted():
        assert backend.refuse_remat_project(blocks, weight) is None
        got = np.asarray(jax.jit(backend.remat_project)(blocks, weight))
    np.testing.assert_allclose(got, xla.remat_project(blocks, weight), atol=1e-4)


def of_sums(predict: int = 1, width: int = 256) -> tuple[Blocks, Blocks, Accumulation, jax.Array]:
    """Arguments of `accumulate`, for `LAYERS` layers."""
    below = quantize(jnp.asarray(random(len(FLUSHED), BLOCKS, 128, width)), StreamSpec(width, 8))
    matrices = tuple(jnp.asarray(random(width, width, seed=i) / 16) for i in range(predict))
    return below, stream(width, 2, "token", seed=1), Accumulation(matrices), jnp.asarray(FLUSHED)


@pytest.mark.parametrize("predict", [1, 2])
@pytest.mark.parametrize("tiles", [Tiles(chunk=64), Tiles(blocks=2, chunk=32), Tiles(blocks=4, chunk=64)], ids=str)
def test_sums_in_ranges_agree_with_the_reference(tiles: Tiles, predict: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 blocks in ranges of 2 or 4: the last has one block."""
    monkeypatch.setattr(tiling, "choose", lambda shape: tiles)
    monkeypatch.setattr(running_sum, "LEAST_RANGE", 1)
    arguments = of_sums(predict)
    with target.interpreted():
        assert backend.refuse_accumulate(*arguments, layer=1) is None
        got = jax.jit(lambda layer: backend.accumulate(*arguments, layer=layer))(1)
        got = jax.block_until_ready(got)
    expected = xla.accumulate(*arguments, layer=1)
    for row, history_blocks in enumerate(FLUSHED):
        a, b = (np.asarray(dequantize(blocks))[row, :history_blocks] for blocks in (got, expected))
        steps = np.repeat(np.asarray(expected.scale, np.float32)[row, :history_blocks], 128, axis=-1)
        assert (np.abs(a - b) <= 1.01 * steps + TOLERANCE).all()  # one code where rounding was close


def test_blocks_of_sums_past_a_length_are_neither_read_nor_written() -> None:
    below, differences, accumulation, history_blocks = of_sums()
    exists = (jnp.arange(BLOCKS) < history_blocks[:, None])[..., None, None]
    nan = jnp.bfloat16(jnp.nan)
    differences = differences.replace(scale=jnp.where(exists, differences.scale, nan).at[0].set(nan))
    below = below.replace(scale=jnp.where(exists, below.scale, nan))
    with target.interpreted():
        total = backend.accumulate(below, differences, accumulation, history_blocks, layer=1)
        for before, after in zip(jax.tree.leaves(below), jax.tree.leaves(total), strict=True):
            np.testing.assert_array_equal(*(np.where(exists, 0, np.asarray(a)).astype("f4") for a in (before, after)))
        assert np.isfinite(np.where(exists, np.asarray(total.scale, np.float32), 0)).all()


def test_sums_are_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a scan over layers, as far as it lowers without a GPU."""
    plugin = mock.MagicMock()
    plugin.get_compute_capability.return_value = 90
    plugin.TritonKernelCall.return_value.to_proto.return_value = b""
    monkeypatch.setattr(jax_triton.triton_lib, "triton_kernel_call_lib", plugin)
    below, differences, accumulation, history_blocks = of_sums()
    accumulation = jax.tree.map(lambda a: a.astype(jnp.bfloat16), accumulation)

    def layers(below: Blocks, differences: Blocks) -> Blocks:
        def layer(total: Blocks, number: jax.Array) -> tuple[Blocks, None]:
            assert backend.refuse_accumulate(total, differences, accumulation, history_blocks, layer=number) is None
            return backend.accumulate(total, differences, accumulation, history_blocks, layer=number), None

        return jax.lax.scan(layer, below, jnp.arange(LAYERS))[0]

    with target.compiling_for("gpu"):
        lowered = jax.jit(layers).trace(below, differences).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@triton_kernel_call") == 2  # what is laid out, and the sum
    assert lowered.count("output_operand_alias<") == len(jax.tree.leaves(below))


def test_sums_that_cannot_be_taken_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    below, differences, accumulation, history_blocks = of_sums()

    def reason(below: Blocks = below, accumulation: Accumulation = accumulation) -> str | None:
        with target.interpreted():
            return backend.refuse_accumulate(below, differences, accumulation, history_blocks, layer=0)

    def sum_of(spec: StreamSpec) -> Blocks:
        return jax.eval_shape(lambda: quantize(jnp.zeros((4, 1, 128, spec.width)), spec))

    assert reason() is None
    assert (
        reason(sum_of(StreamSpec(256, 16)))
        == "a sum of 16 bits along the token in groups of 128 is not taken; 8 bits along the token in groups of 128 are"
    )
    assert "in groups of 64 is not taken" in str(reason(sum_of(StreamSpec(256, 8, group=64))))
    low_rank = Accumulation((jnp.zeros((256, 96)), jnp.zeros((96, 256))))
    assert reason(accumulation=low_rank) == "a matrix of 96 rows is not taken; multiples of 128 are"
    three = Accumulation((jnp.zeros((256, 256)),) * 3)
    assert reason(accumulation=three) == "3 matrices one after the other are not taken; up to 2 are"
    wide = jax.eval_shape(lambda: quantize(jnp.zeros((1, 4, 1, 128, 256)), StreamSpec(256, 2, group=64)))
    with target.interpreted():
        assert (
            backend.refuse_accumulate(below, wide, accumulation, history_blocks, layer=0)
            == "the stream's groups of 64 channels are not taken; multiples of 128 are"
        )
    monkeypatch.setattr(launching, "CAN_UPDATE", False)
    assert reason() == "jax-triton before 0.4 cannot update arrays in place; pip install --upgrade jax-triton"


def test_what_cannot_be_taken_is_refused_with_a_reason() -> None:
    def reason(case: Case, **changes: Any) -> str | None:
        arguments, static = case.arguments()
        with target.interpreted():
            return backend.refuse_decode_attention(*arguments, layer=0, **{**static, **changes})

    def key_of(spec: StreamSpec) -> str | None:
        (q, _, rebuild, value, *rest), static = Case(form="identity").arguments()
        key = jax.eval_shape(lambda: quantize(jnp.zeros((1, 4, 1, 128, 128)), spec))
        with target.interpreted():
            return backend.refuse_decode_attention(q, key, rebuild, value, *rest, layer=0, **static)

    assert reason(Case()) is None
    assert reason(Case(dim=96)) == "a head dimension of 96 is not taken; 64, 128 and 256 are"
    assert reason(Case(new=17)) == "17 new tokens are not taken; up to 16 are"
    assert key_of(StreamSpec(128, 16)) == "the key stream is not quantized"
    assert key_of(StreamSpec(128, 8, format="e4m3")) == "the key stream's format e4m3 is not taken; uniform is"
    assert (
        key_of(StreamSpec(128, 4, "channel", group=32))
        == "the key stream's groups of 32 tokens are not taken; whole blocks of 128 are"
    )
    assert (
        key_of(StreamSpec(128, 4, "token", group=16))
        == "the key stream's groups of 16 channels are not taken; multiples of 32 are"
    )


def test_where_keys_are_not_rebuilt_in_eight_bits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(form: str, **changes: Any) -> str | None:
        case = Case(
            **{"form": "dense", "key_axis": "token", "value_heads": 1, "shared_stream": True, "dim": 128} | changes
        )
        (q, key, rebuild, *rest), static = case.arguments()
        small = {name: a[0] for name, a in quantize_matrix(rebuild.matrix[None], form, 128).items()}
        return backend.refuse_decode_attention(
            q.astype(jnp.bfloat16), key, dataclasses.replace(rebuild, **small), *rest, layer=0, **static
        )

    assert reason("int8") is None
    assert reason("fp8") is None
    assert reason("int8", bits=8) is None
    assert reason("fp8", bits=8) == "keys of 8 bits are not rebuilt in fp8; up to 4 bits are"
    assert "along the channel are not rebuilt in int8" in (reason("int8", key_axis="channel") or "")
    assert "where all heads read the whole value stream" in (reason("int8", value_heads=KV_HEADS) or "")
    monkeypatch.setattr(tiling, "capability", lambda: 8.9)
    assert "compute capability 9.0 (Hopper) and newer, and this GPU has 8.9" in (reason("fp8") or "")


def test_float32_is_for_the_interpreter_only() -> None:
    arguments, static = Case().arguments()
    reason = backend.refuse_decode_attention(*arguments, layer=0, **static)
    assert reason == "float32 is not taken; bfloat16 and float16 are"


def test_the_interpreter_leaves_the_language_as_it_was() -> None:
    """Or else nothing could be compiled afterwards."""
    import triton.language as tl

    before = [dict(vars(thing)) for thing in (tl, tl.core, tl.math, tl.tensor, tl.dtype)]
    blocks = quantize(jnp.asarray(random(1, 1, 128, 128)), StreamSpec(128, 4))
    with target.interpreted():
        jax.block_until_ready(backend.remat_project(blocks, jnp.asarray(random(128, 8))))
    assert [dict(vars(thing)) for thing in (tl, tl.core, tl.math, tl.tensor, tl.dtype)] == before


def test_kernels_lower_into_a_program_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the part of jaxlib that only its CUDA plugin has; in a scan over layers."""
    plugin = mock.MagicMock()
    plugin.get_compute_capability.return_value = 90
    plugin.TritonKernelCall.return_value.to_proto.return_value = b""
    monkeypatch.setattr(jax_triton.triton_lib, "triton_kernel_call_lib", plugin)
    (q, key, rebuild, value, history_blocks, geometry), static = Case(dim=128).arguments()
    q = q.astype(jnp.bfloat16)

    def layers(q: jax.Array, key: Blocks, value: Blocks) -> jax.Array:
        def layer(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            assert (
                backend.refuse_decode_attention(
                    q, key, rebuild, value, history_blocks, geometry, layer=number, **static
                )
                is None
            )
            part = backend.decode_attention(q, key, rebuild, value, history_blocks, geometry, layer=number, **static)
            return total + part.out, None

        return jax.lax.scan(layer, jnp.zeros((*q.shape[:3], 128)), jnp.arange(LAYERS))[0]

    with target.compiling_for("gpu"):
        lowered = jax.jit(layers).trace(q, key, value).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()
    (name, warps, *_), _ = plugin.TritonKernel.call_args
    assert (name, warps) == ("decode", 4)
