"""Calls of shapes instead of arrays: nothing here is allocated, and nothing knows a model or a method.

`benchmarks/models.py` fills these in from the configs of real models, by running the cache methods on them. Tests,
benchmarks and static costs take their calls from there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.calls import Accumulate, DecodeAttention
from pallas_kernels.operands import Accumulation, KeyRebuild
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, StreamSpec, allocate_blocks


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """`decode_attention` to one layer: H query heads on K key/value heads of dimension d.

    key, value: the streams; value is None where one stream is both
    rebuild: how keys come from the key stream, of `jax.ShapeDtypeStruct`
    value_heads: K if each head reads its own part of the value stream, 1 if it reads all of it
    scale: what scores are multiplied with
    """

    heads: int
    kv_heads: int
    dim: int
    key: StreamSpec
    value: StreamSpec | None
    rebuild: KeyRebuild
    value_heads: int
    scale: float

    @property
    def form(self) -> str:
        """Of the matrix that keys are rebuilt with: `identity` (there is none), `per_head` or `dense`."""
        if self.rebuild.matrix is None:
            return "identity"
        return "per_head" if self.rebuild.matrix.ndim == 3 else "dense"

    @property
    def rebuild_macs(self) -> int:
        """Multiply-adds that rebuild the keys of one token."""
        columns = self.kv_heads * self.dim
        return {"identity": 0, "per_head": self.dim, "dense": self.key.width}[self.form] * columns

    @property
    def macs(self) -> int:
        """Multiply-adds of one token and one query: keys rebuilt, scored, and values weighed without being rebuilt."""
        value = (self.value or self.key).width // self.value_heads
        return self.rebuild_macs + self.heads * (self.dim + value)

    @property
    def bytes(self) -> float:
        """Bytes of history that one token has in this layer."""
        return sum(bytes_per_token(spec) for spec in (self.key, self.value) if spec)

    def call(self, *, layers: int, batch: int, blocks: int, new: int = 1) -> DecodeAttention:
        """Of `new` tokens of each of `batch` sequences, to one of `layers` with so many blocks of history."""
        return DecodeAttention(
            jax.ShapeDtypeStruct((batch, new, self.heads, self.dim), jnp.bfloat16),
            history(self.key, layers, batch, blocks),
            self.rebuild,
            history(self.value, layers, batch, blocks) if self.value else None,
            integers(batch),
            Geometry(integers(batch, new), integers(), jax.ShapeDtypeStruct((self.dim // 2,), jnp.float32), self.scale),
            integers(),
            num_kv_heads=self.kv_heads,
            value_heads=self.value_heads,
            skip=integers(batch),
        )


@dataclasses.dataclass(frozen=True)
class SumShape:
    """`accumulate` of one layer: `stream` is what layers store, `accumulation` of `jax.ShapeDtypeStruct`."""

    running_sum: StreamSpec
    stream: StreamSpec
    accumulation: Accumulation

    @property
    def matrices(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """All that is multiplied with."""
        lift = self.accumulation.lift
        return (*(self.accumulation.predict or ()), *([] if lift is None else [lift]))

    @property
    def macs(self) -> int:
        """Multiply-adds of one token."""
        return sum(matrix.size for matrix in self.matrices)

    @property
    def bytes(self) -> float:
        """Bytes of one token: what the layer stores is read, the sum is read and written."""
        return bytes_per_token(self.stream) + 2 * bytes_per_token(self.running_sum)

    def call(self, *, layers: int, batch: int, blocks: int) -> Accumulate:
        """For `batch` sequences, of one of `layers` with so many blocks of history."""
        return Accumulate(
            history(self.running_sum, batch, blocks),
            history(self.stream, layers, batch, blocks),
            self.accumulation,
            integers(batch),
            integers(),
        )


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def history(spec: StreamSpec, *leading: int) -> Blocks:
    """Shapes of a stream's blocks with these leading axes."""
    return jax.eval_shape(lambda: allocate_blocks(spec, leading))


def bytes_per_token(spec: StreamSpec) -> float:
    """Bytes that a stream's codes, scales and zeros take, of one token."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(history(spec, 1))) / BLOCK
