"""`decode_attention` of `pallas_gpu` without a GPU: on its interpreter, which runs the definitions that
`test_pallas_gpu_fragments` holds the threads' instructions to, against XLA; and lowered for an H200."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from benchmarks.models import decode_shape
from pallas_kernels import DecodeAttention, target
from pallas_kernels.operands import KeyRebuild
from tests.compiled import quantized
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import Blocks, StreamSpec
from xquant_jax.numerics.rope import Rope

FORMS = {
    # a window, a sequence that is behind, tokens that are not attended to; 12 queries of a kv head
    "per_head": (
        {"bits": 4, "value_bits": 2},
        {"window": 300, "skip": (70, 0), "lengths": (3, 1), "heads": 8, "new": 3, "normed": True},
    ),
    # keys along the token, as int8 has them; a sequence without blocks, a query without a position
    "identity": (
        {"bits": 8, "value_bits": 3, "axis": "token"},
        {"rotated": True, "lengths": (0, 2), "heads": 2, "new": 2, "absent": True},
    ),
}


def call(
    form: str,
    *,
    bits: int = 4,
    value_bits: int = 4,
    axis: Literal["token", "channel"] = "channel",
    new: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    dim: int = 64,
    lengths: tuple[int, ...] = (1,),
    window: int = 2**30,
    skip: tuple[int, ...] | None = None,
    absent: bool = False,
    rotated: bool = False,
    normed: bool = False,
) -> DecodeAttention:
    """Of random numbers, to the second of two layers."""
    rng = np.random.default_rng(bits)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    def stream(spec: StreamSpec) -> Blocks:
        return quantized(random(2, len(lengths), max(lengths), 128, spec.width), spec)

    width, blocks = kv_heads * dim, jnp.array(lengths, jnp.int32)
    matrix = random(kv_heads, dim, dim) * jnp.bfloat16(dim**-0.5) if form == "per_head" else None
    rebuild = KeyRebuild(matrix)
    if normed:
        rebuild = KeyRebuild(matrix, bias=random(width), norm=random(dim), norm_eps=1e-6)
    positions = 128 * blocks[:, None] + 5 + jnp.arange(new)[None]
    if absent:
        positions = positions.at[-1, -1].set(-1)
    return DecodeAttention(
        random(len(lengths), new, heads, dim),
        stream(StreamSpec(width, bits, axis, 128 if axis == "channel" else dim)),
        rebuild,
        stream(StreamSpec(width, value_bits, "token", dim)),
        blocks,
        Geometry(positions, jnp.int32(window), jnp.asarray(Rope().frequencies(dim)), dim**-0.5, rotated),
        jnp.int32(1),
        num_kv_heads=kv_heads,
        value_heads=kv_heads,
        skip=jnp.zeros_like(blocks) if skip is None else jnp.array(skip, jnp.int32),
    )


@pytest.mark.parametrize("form", FORMS)
def test_interpreted(form: str) -> None:
    streams, rest = FORMS[form]
    case = call(form, **streams, **rest)
    with target.interpreted():
        found = pallas_kernels.run(case, "pallas_gpu")
    expected = pallas_kernels.run(case, "xla")
    np.testing.assert_allclose(found.out, expected.out, atol=1e-2)
    np.testing.assert_allclose(found.lse, expected.lse, atol=1e-2)


@pytest.mark.parametrize(
    ("model", "cache"), [("Llama-3.1-8B", "xquant:4"), ("Llama-3.1-8B", "kivi:2"), ("Llama-2-7B", "int8")]
)
def test_lowers_for_an_h200(model: str, cache: str) -> None:
    shape = decode_shape(model, cache)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    attend = jax.jit(lambda call: pallas_kernels.run(call, "pallas_gpu"))
    with jax.sharding.use_abstract_mesh(mesh), target.compiling_for("gpu", "NVIDIA H200"):
        lowered = attend.trace(shape.call(layers=32, batch=8, blocks=256)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("model", "cache", "changes", "gpu", "reason"),
    [
        (
            "Llama-3.1-8B",
            "xquant:4",
            {},
            "NVIDIA L40S",
            r"needs compute capability 9.0 \(Hopper\), and this GPU has 8.9",
        ),
        ("Llama-3.1-8B", "xquant:4", {"dim": 256}, "NVIDIA H200", "a head dimension of 256 for each head is not taken"),
        ("Llama-3.1-8B", "xquant:4,basis=joint", {}, "NVIDIA H200", "by a matrix for each kv head"),
        ("Llama-3.1-8B", "xquant:4,group=64", {}, "NVIDIA H200", "groups of 64 channels; it takes multiples of 128"),
    ],
)
def test_what_it_does_not_take(model: str, cache: str, changes: dict[str, Any], gpu: str, reason: str) -> None:
    shape = dataclasses.replace(decode_shape(model, cache), **changes)
    with target.compiling_for("gpu", gpu), pytest.raises(ConfigError, match=reason):
        jax.eval_shape(lambda call: pallas_kernels.run(call, "pallas_gpu"), shape.call(layers=1, batch=1, blocks=8))
