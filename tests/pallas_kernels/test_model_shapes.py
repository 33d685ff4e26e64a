"""`decode_attention` at the shapes of real models: every backend is as the definition, or says why it does not run.

Heads, dimensions and groups are the models' own, with few heads; every group has a scale and a zero of its own, so that
those of a neighbour would show.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import DecodeAttention, KeyRebuild, api, target
from pallas_kernels.shapes import history
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import Blocks, StreamSpec
from xquant_jax.numerics.rope import Rope

BACKENDS = [name for name, backend in api.BACKENDS.items() if "decode_attention" in backend.kernels]
BLOCKS, EXIST = 2, 1
TOLERANCE = 1e-2  # of the largest output: kernels multiply in bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """H query heads on K key/value heads of dimension d; how they are cached; channels of a group, 0: the default."""

    heads: int
    kv_heads: int
    dim: int
    cache: str
    group: int = 0
    bits: int = 4

    def __str__(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))

    @property
    def key(self) -> StreamSpec:
        width = self.kv_heads * self.dim * (2 if self.cache == "cl" else 1)
        if self.cache in ("x", "cl", "int8"):
            return StreamSpec(width, self.bits, group=self.group)
        return StreamSpec(width, self.bits, "channel")

    @property
    def value(self) -> StreamSpec | None:
        one_stream = self.cache in ("x", "cl")
        return None if one_stream else StreamSpec(self.kv_heads * self.dim, self.bits, group=self.group)

    @property
    def streams(self) -> list[StreamSpec]:
        return [spec for spec in (self.key, self.value) if spec]

    def call(self) -> DecodeAttention:
        """Of one query to the second of two layers."""
        rng = np.random.default_rng(0)
        columns = self.kv_heads * self.dim

        def array(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        def stream(spec: StreamSpec) -> Blocks:
            shapes = history(spec, 2, 1, BLOCKS)
            words = tuple(jnp.asarray(rng.integers(0, 2**32, w.shape, np.uint32)) for w in shapes.planes)
            scale = rng.uniform(0.5, 2.0, shapes.scale.shape) * 2 / 2**spec.bits
            zero = rng.uniform(-2.0, 1.0, shapes.scale.shape)
            return Blocks(words, jnp.asarray(scale, jnp.bfloat16), jnp.asarray(zero, jnp.bfloat16), spec)

        matrix = None
        if self.cache == "per_head":
            matrix = array(self.kv_heads, self.dim, self.dim) / self.dim**0.5
        elif self.cache in ("joint", "x", "cl"):
            matrix = array(self.key.width, columns) / self.key.width**0.5
        return DecodeAttention(
            array(1, 1, self.heads, self.dim),
            stream(self.key),
            KeyRebuild(matrix),
            self.value and stream(self.value),
            jnp.full(1, EXIST, jnp.int32),
            Geometry(
                jnp.full((1, 1), EXIST * 128 + 3, jnp.int32),
                jnp.int32(2**30),
                jnp.asarray(Rope().frequencies(self.dim)),
                self.dim**-0.5,
            ),
            jnp.int32(1),
            num_kv_heads=self.kv_heads,
            value_heads=self.kv_heads if self.cache in ("per_head", "kivi", "int8") else 1,
            skip=jnp.zeros(1, jnp.int32),
        )

    def must_run(self, backend: str) -> bool:
        """Whether a backend may not refuse it."""
        groups = [spec.group for spec in self.streams if spec.axis == "token"]
        if backend == "triton":  # a half of a head's keys has one scale, where these are read as they are
            return self.cache != "int8" or groups[0] % (self.dim // 2) == 0
        if backend == "pallas_gpu":  # a head's own part of the streams, whose groups are no smaller
            return self.cache in ("per_head", "kivi") and all(size % self.dim == 0 for size in groups)
        return not any(size % 128 for size in (self.kv_heads * self.dim, *groups))


CASES = [
    Case(4, 1, 64, "per_head"),  # Llama 3.2 1B on eight devices
    Case(16, 1, 128, "per_head", bits=2),  # Llama 3.1 405B on eight devices
    Case(4, 1, 256, "per_head"),  # Gemma 3 1B
    Case(14, 2, 64, "per_head", bits=3),  # Qwen2.5 0.5B
    Case(9, 3, 64, "per_head"),  # SmolLM2 135M: groups of 96
    Case(9, 3, 64, "per_head", 64, 2),
    Case(15, 5, 64, "per_head"),  # SmolLM2 360M: groups of 80
    Case(28, 4, 128, "per_head", bits=3),  # Qwen2.5 7B
    Case(16, 2, 128, "per_head", 64),
    Case(4, 2, 256, "per_head", bits=8),  # Gemma 3 4B, half of it
    Case(32, 8, 64, "per_head", bits=2),  # Llama 3.2 1B
    Case(4, 1, 256, "kivi", bits=2),
    Case(9, 3, 64, "kivi"),
    Case(4, 1, 64, "kivi", 64, 3),
    Case(8, 2, 128, "kivi", 256),
    Case(32, 32, 64, "kivi", bits=2),
    Case(4, 1, 256, "int8", bits=8),
    Case(4, 2, 256, "int8", 256, 8),
    Case(9, 3, 64, "int8", bits=8),
    Case(15, 5, 64, "int8", bits=8),  # groups of 80 are no halves of heads
    Case(16, 8, 128, "int8", 64, 8),  # Qwen3 0.6B
    Case(4, 1, 64, "joint"),
    Case(4, 1, 256, "joint", bits=2),
    Case(9, 3, 64, "joint"),
    Case(4, 2, 128, "joint", 256, bits=3),
    Case(3, 3, 64, "x"),  # groups of 96
    Case(4, 4, 64, "x", bits=3),
    Case(16, 1, 128, "cl", bits=8),
    Case(4, 1, 64, "cl", bits=8),
    Case(4, 1, 256, "cl", 256, 8),
    Case(15, 5, 64, "cl", bits=8),
    Case(28, 4, 128, "cl", 64, 8),
]

ON_HOPPER = Case(16, 1, 128, "per_head", bits=2), Case(9, 3, 64, "per_head"), Case(8, 2, 128, "kivi", 256)
"""Of those, what `pallas_gpu` is asked for, whose interpreter takes long; it multiplies bfloat16 only."""

run = jax.jit(pallas_kernels.run, static_argnames="implementation")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shape_is_right_or_refused_with_a_reason(case: Case) -> None:
    call = case.call()
    expected = run(call, "xla")
    for backend in BACKENDS:
        if api.not_installed(backend) or (backend == "pallas_gpu" and case not in ON_HOPPER):
            continue
        given = in_bfloat16(call) if backend == "pallas_gpu" else call
        with target.interpreted():
            reason = _refusal(backend, given)
            if reason:
                assert not case.must_run(backend), f"{backend}: {reason}"
                continue
            got = run(given, backend)
        for name in ("out", "lse"):
            a, b = np.asarray(getattr(got, name)), np.asarray(getattr(expected, name))
            np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max(), err_msg=f"{backend}: {name}")


def in_bfloat16(call: DecodeAttention) -> DecodeAttention:
    """The same with queries and matrix rounded to bfloat16."""
    rebuild = jax.tree.map(lambda a: a.astype(jnp.bfloat16), call.key_rebuild)
    return dataclasses.replace(call, q=call.q.astype(jnp.bfloat16), key_rebuild=rebuild)


def _refusal(backend: str, call: Any) -> str | None:
    return api._module(backend, "decode_attention").refuse(call)
