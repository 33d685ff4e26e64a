"""What only the Triton backend has: tiles and splits, refusals. Its machine code is for `test_triton_compiled.py`.

That it agrees with the reference is for the most part a matter of `test_operations.py`.
"""

import dataclasses
import functools
import importlib.util
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Accumulate, Accumulation, DecodeAttention, KeyRebuild, RematProject, target, xla
from pallas_kernels.eight_bits import quantize_matrix
from tests.compiled import dequantized, quantized
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import Blocks, StreamSpec, quantize
from xquant_jax.numerics.rope import Rope

if importlib.util.find_spec("jax_triton") is None:
    pytest.skip("jax-triton is not installed; it is on Linux only", allow_module_level=True)

import jax_triton

from pallas_kernels.triton import accumulate, decode_attention, remat_project, tiling
from pallas_kernels.triton.tiling import Tiles

LAYERS, BLOCKS, HEADS, KV_HEADS, DIM = 2, 5, 4, 2, 64
FLUSHED = np.asarray([0, 1, 4, 5], np.int32)  # nothing, one block, one block short of everything, everything
NO_WINDOW = 2**30

# Codes enter products as 128 + code and the 128 is taken back: that costs 7 of float32's 24 bits.
TOLERANCE = 1e-3


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


reference = jax.jit(xla.run)


@functools.cache
def stream(width: int, bits: int, axis: str, seed: int) -> Blocks:
    values = random(LAYERS, len(FLUSHED), BLOCKS, 128, width, seed=seed)
    return quantized(jnp.asarray(values), StreamSpec(width, bits, axis))


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
    skip: tuple[int, ...] = (0, 0, 0, 0)
    absent: bool = False  # the last query of the last sequence, whose position is -1
    bias: bool = False
    norm: bool = False
    rotated: bool = False
    shared_stream: bool = False

    def call(self, layer: Any = 1, dtype: Any = jnp.float32) -> DecodeAttention:
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
        value = None if self.shared_stream else stream(width, self.bits, "token", seed=2)
        positions = 128 * FLUSHED[:, None] + 40 + np.arange(self.new)
        if self.absent:
            positions[-1, -1] = -1
        frequencies = jnp.asarray(Rope().frequencies(self.dim))
        return DecodeAttention(
            jnp.asarray(random(len(FLUSHED), self.new, HEADS, self.dim), dtype),
            key,
            rebuild,
            value,
            jnp.asarray(FLUSHED),
            Geometry(jnp.asarray(positions), self.sliding_window, frequencies, self.dim**-0.5, self.rotated),
            layer,
            num_kv_heads=KV_HEADS,
            value_heads=self.value_heads,
            skip=jnp.asarray(self.skip, jnp.int32),
        )


def check(case: Case, tolerance: float = TOLERANCE) -> None:
    """The layer is a traced number, as in the scan over layers."""
    call = case.call()
    with target.interpreted():
        assert decode_attention.refuse(call) is None
        got = jax.jit(decode_attention.run)(call)
        out, lse = np.asarray(got.out), np.asarray(got.lse)
    expected = reference(call)
    np.testing.assert_allclose(lse, expected.lse, atol=tolerance)
    np.testing.assert_allclose(out, expected.out, atol=tolerance)


@pytest.mark.parametrize(
    "case",
    [
        Case(value_heads=1),  # keys of each head's own basis, values of a joint one
        Case(new=3, sliding_window=200, norm=True, bias=True),
    ],
    ids=str,
)
def test_both_ways_to_read_values_agree_with_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    ("tiles", "splits"),
    [
        *((Tiles(fused=True), splits) for splits in (1, 5)),
        *((Tiles(blocks=2, chunk=16, fused=True), splits) for splits in (2, 3)),
        (Tiles(blocks=4), 2),
    ],
    ids=str,
)
def test_any_tiles_and_splits_give_the_same(tiles: Tiles, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 blocks over up to 5 parts: lengths end within, at and one block next to the end of a part and of a tile.
    What is skipped is a part's beginning, or all of it, or nothing; a query that sees nothing is among others."""
    monkeypatch.setattr(tiling, "choose", lambda shape: tiles)
    monkeypatch.setattr(tiling, "splits", lambda *_: splits)
    check(Case(new=2, skip=(0, 200, 200, 0), absent=True))


def test_blocks_past_a_length_or_before_the_window_are_not_read() -> None:
    """Whether or not there is a query that sees nothing."""
    call = Case(new=2, sliding_window=150, absent=True).call()

    def spoiled(stream: Blocks) -> Blocks:
        """NaN scales in every block but the last that exists, and in all of the other layer."""
        exists = jnp.arange(BLOCKS)[None] == call.history_blocks[:, None] - 1
        exists = exists[None] & (jnp.arange(LAYERS) == 1)[:, None, None]
        poison = jnp.where(exists[..., None, None], 1.0, jnp.nan).astype(jnp.bfloat16)
        return stream.replace(scale=stream.scale * poison)

    with target.interpreted():
        part = decode_attention.run(
            call.replace(key_stream=spoiled(call.key_stream), value_stream=spoiled(call.value_stream))
        )
        assert np.isfinite(part.out).all()
        assert (np.isfinite(part.lse) == (call.geometry.positions >= 128)[..., None]).all()


def test_remat_project_of_partial_tiles_agrees_with_the_reference() -> None:
    """3 blocks in tiles of 2, and 136 columns in tiles of 128."""
    blocks = quantized(jnp.asarray(random(1, 3, 128, 128)), StreamSpec(128, 3))
    call = RematProject(blocks, jnp.asarray(random(128, 136)))
    with target.interpreted():
        assert remat_project.refuse(call) is None
        got = np.asarray(jax.jit(remat_project.run)(call))
    np.testing.assert_allclose(got, xla.run(call), atol=1e-4)


def of_sums(predict: int = 1, width: int = 256) -> Accumulate:
    """A call for one of `LAYERS` layers."""
    below = quantized(jnp.asarray(random(len(FLUSHED), BLOCKS, 128, width)), StreamSpec(width, 8))
    matrices = tuple(jnp.asarray(random(width, width, seed=i) / 16) for i in range(predict))
    return Accumulate(below, stream(width, 2, "token", seed=1), Accumulation(matrices), jnp.asarray(FLUSHED), 1)


@pytest.mark.parametrize(
    ("tiles", "predict"),
    [(Tiles(chunk=64), 2), (Tiles(blocks=2, chunk=32), 1), (Tiles(blocks=4, chunk=64), 1), (Tiles(blocks=4), 2)],
    ids=str,
)
def test_sums_in_ranges_agree_with_the_reference(tiles: Tiles, predict: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 blocks in ranges of 2 or 4: the last has one block."""
    monkeypatch.setattr(tiling, "choose", lambda shape: tiles)
    monkeypatch.setattr(accumulate, "LEAST_RANGE", 1)
    call = of_sums(predict)
    with target.interpreted():
        assert accumulate.refuse(call) is None
        got = jax.block_until_ready(jax.jit(accumulate.run)(call))
    expected = reference(call)
    for row, history_blocks in enumerate(FLUSHED):
        a, b = (np.asarray(dequantized(blocks))[row, :history_blocks] for blocks in (got, expected))
        steps = np.repeat(np.asarray(expected.scale, np.float32)[row, :history_blocks], 128, axis=-1)
        assert (np.abs(a - b) <= 1.01 * steps + TOLERANCE).all()  # one code where rounding was close


def test_blocks_of_sums_past_a_length_are_neither_read_nor_written() -> None:
    call = of_sums()
    below, differences = call.running_sum, call.stream
    exists = (jnp.arange(BLOCKS)[None] < call.history_blocks[:, None])[..., None, None]
    nan = jnp.bfloat16(jnp.nan)
    differences = differences.replace(scale=jnp.where(exists, differences.scale, nan).at[0].set(nan))
    below = below.replace(scale=jnp.where(exists, below.scale, nan))
    with target.interpreted():
        total = accumulate.run(call.replace(running_sum=below, stream=differences))
        for before, after in zip(jax.tree.leaves(below), jax.tree.leaves(total), strict=True):
            np.testing.assert_array_equal(*(np.where(exists, 0, np.asarray(a)).astype("f4") for a in (before, after)))
        assert np.isfinite(np.where(exists, np.asarray(total.scale, np.float32), 0)).all()


def test_sums_are_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a scan over layers, as far as it lowers without a GPU."""
    plugin = mock.MagicMock()
    plugin.get_compute_capability.return_value = 90
    plugin.TritonKernelCall.return_value.to_proto.return_value = b""
    monkeypatch.setattr(jax_triton.triton_lib, "triton_kernel_call_lib", plugin)
    call = of_sums()
    call = call.replace(accumulation=jax.tree.map(lambda a: a.astype(jnp.bfloat16), call.accumulation))

    def layers(call: Accumulate) -> Blocks:
        def layer(total: Blocks, number: jax.Array) -> tuple[Blocks, None]:
            of_layer = call.replace(running_sum=total, layer=number)
            assert accumulate.refuse(of_layer) is None
            return accumulate.run(of_layer), None

        return jax.lax.scan(layer, call.running_sum, jnp.arange(LAYERS))[0]

    with target.compiling_for("gpu"):
        lowered = jax.jit(layers).trace(call).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@triton_kernel_call") == 2  # what is laid out, and the sum
    assert lowered.count("output_operand_alias<") == len(jax.tree.leaves(call.running_sum))


def test_sums_that_cannot_be_taken_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(**changes: Any) -> str:
        with target.interpreted():
            return accumulate.refuse(of_sums().replace(**changes)) or ""

    def blocks_of(spec: StreamSpec, *leading: int) -> Blocks:
        return jax.eval_shape(lambda: quantize(jnp.zeros((*leading, 4, 1, 128, spec.width)), spec))

    assert reason() == ""
    assert (
        reason(running_sum=blocks_of(StreamSpec(256, 16)))
        == "a sum of 16 bits along the token in groups of 128 is not taken; 8 bits along the token in groups of 128 are"
    )
    assert "in groups of 64 is not taken" in reason(running_sum=blocks_of(StreamSpec(256, 8, group=64)))
    low_rank = Accumulation((jnp.zeros((256, 96)), jnp.zeros((96, 256))))
    assert reason(accumulation=low_rank) == "a matrix of 96 rows is not taken; multiples of 128 are"
    three = Accumulation((jnp.zeros((256, 256)),) * 3)
    assert reason(accumulation=three) == "3 matrices one after the other are not taken; up to 2 are"
    assert (
        reason(stream=blocks_of(StreamSpec(256, 2, group=64), 1))
        == "the stream has groups of 64 channels; it takes multiples of 128: choose group=128"
    )
    with target.compiling_for("gpu", "NVIDIA B200"):
        assert reason() == "Triton's compiler fails on the products of sums for compute capability 10.0"
    monkeypatch.setattr(accumulate.launching, "CAN_UPDATE", False)
    assert reason() == "jax-triton before 0.4 cannot update arrays in place; pip install --upgrade jax-triton"


def test_what_cannot_be_taken_is_refused_with_a_reason() -> None:
    def reason(case: Case) -> str | None:
        with target.interpreted():
            return decode_attention.refuse(case.call())

    def key_of(spec: StreamSpec) -> str | None:
        key = jax.eval_shape(lambda: quantize(jnp.zeros((1, 4, 1, 128, 128)), spec))
        with target.interpreted():
            return decode_attention.refuse(Case(form="identity").call().replace(key_stream=key))

    assert reason(Case()) is None
    assert reason(Case(dim=96)) == "a head dimension of 96 is not taken; 64, 128 and 256 are"
    assert reason(Case(new=17)) == "17 new tokens are not taken; up to 16 are"
    assert key_of(StreamSpec(128, 16)) == "the key stream is not quantized"
    assert key_of(StreamSpec(128, 8, format="e4m3")) == "the key stream has format e4m3; it takes uniform"
    assert (
        key_of(StreamSpec(128, 4, "channel", group=32))
        == "the key stream has groups of 32 tokens; it takes whole blocks of 128"
    )
    assert (
        key_of(StreamSpec(128, 4, "token", group=16))
        == "the key stream has groups of 16 channels; it takes multiples of 32: choose group=128"
    )


def test_where_keys_are_not_rebuilt_in_eight_bits_is_said() -> None:
    def reason(form: str, **changes: Any) -> str | None:
        case = Case(
            **{"form": "dense", "key_axis": "token", "value_heads": 1, "shared_stream": True, "dim": 128} | changes
        )
        call = case.call(dtype=jnp.bfloat16)
        small = {name: a[0] for name, a in quantize_matrix(call.key_rebuild.matrix[None], form, 128).items()}
        return decode_attention.refuse(call.replace(key_rebuild=call.key_rebuild.replace(**small)))

    assert reason("int8") is None
    assert reason("fp8") is None
    assert reason("int8", bits=8) is None
    assert reason("fp8", bits=8) == "keys of 8 bits are not rebuilt in fp8, which holds codes of up to 4"
    assert "along the channel are not rebuilt in int8" in (reason("int8", key_axis="channel") or "")
    assert "where all heads read the whole value stream" in (reason("int8", value_heads=KV_HEADS) or "")
    with target.compiling_for("gpu", "NVIDIA L40S"):
        assert "compute capability 9.0 (Hopper) and newer, and this GPU has 8.9" in (reason("fp8") or "")


def test_tiles_are_those_of_the_gpu_that_is_compiled_for() -> None:
    shape = tiling.Shape("decode", "dense", 128)
    chunks = {}
    for kind in ("NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 9999"):
        with target.compiling_for("gpu", kind):
            chunks[kind] = (tiling.choose(shape).chunk, tiling.splits(1, 10_000, 1))
    ampere, hopper, unknown = chunks.values()
    assert ampere == unknown == (16, 4 * 108)
    assert hopper == (64, 4 * 132)


def test_float32_is_for_the_interpreter_only() -> None:
    assert decode_attention.refuse(Case().call()) == "float32 is not taken; bfloat16 and float16 are"


def test_the_interpreter_leaves_the_language_as_it_was() -> None:
    """Or else nothing could be compiled afterwards."""
    import triton.language as tl

    before = [dict(vars(thing)) for thing in (tl, tl.core, tl.math, tl.tensor, tl.dtype)]
    blocks = quantized(jnp.asarray(random(1, 1, 128, 128)), StreamSpec(128, 4))
    with target.interpreted():
        jax.block_until_ready(remat_project.run(RematProject(blocks, jnp.asarray(random(128, 8)))))
    assert [dict(vars(thing)) for thing in (tl, tl.core, tl.math, tl.tensor, tl.dtype)] == before


def test_kernels_lower_into_a_program_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the part of jaxlib that only its CUDA plugin has; in a scan over layers."""
    plugin = mock.MagicMock()
    plugin.get_compute_capability.return_value = 90
    plugin.TritonKernelCall.return_value.to_proto.return_value = b""
    monkeypatch.setattr(jax_triton.triton_lib, "triton_kernel_call_lib", plugin)
    call = Case(dim=128).call(dtype=jnp.bfloat16)

    def layers(call: DecodeAttention) -> jax.Array:
        def layer(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            of_layer = call.replace(layer=number)
            assert decode_attention.refuse(of_layer) is None
            return total + decode_attention.run(of_layer).out, None

        return jax.lax.scan(layer, jnp.zeros((*call.q.shape[:3], 128)), jnp.arange(LAYERS))[0]

    with target.compiling_for("gpu"):
        lowered = jax.jit(layers).trace(call).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()
    (name, warps, *_), _ = plugin.TritonKernel.call_args
    assert (name, warps) == ("decode_values", 4)
