"""The four operations as calls: one frozen object holds what an operation is called with, and checks that it fits.

A call is a pytree. What is not an array is static, so calls may be traced, and made of `jax.ShapeDtypeStruct`s to ask
a backend whether it takes them. `pallas_kernels.xla` defines what each one returns; `pallas_kernels.run` runs them.
"""

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from pallas_kernels.operands import Accumulation, KeyRebuild
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.attention import Geometry, Part
from xquant_jax.numerics.quantization import Blocks, Leaf, StreamSpec

MOST_NEW_TOKENS = 16
"""New tokens of a step up to which values are absorbed and kernels decode (drafts included); beyond, rebuilding values
is cheaper than carrying a whole stream's width for every query."""


class Call[Result](abc.ABC):
    """What an operation is called with; `Result` is what it returns."""

    operation: ClassVar[str]

    @abc.abstractmethod
    def check(self) -> None:
        """Raises `ConfigError` if the shapes do not fit each other."""


@struct.dataclass
class RematProject(Call[Array]):
    """Rematerializes x^ W from the history blocks of one layer (paper, section 3.1): [B, 128 N, columns].

    stream: blocks of one layer [B, N, ...]
    weight: W [C, columns]
    dtype: of the result, which is summed in float32; None: the weight's
    """

    operation: ClassVar[str] = "remat_project"

    stream: Blocks
    weight: Leaf
    dtype: Any = struct.field(pytree_node=False, default=None)

    @property
    def result_dtype(self) -> Any:
        return self.dtype or self.weight.dtype

    def check(self) -> None:
        if self.stream.spec.width != self.weight.shape[0]:
            raise ConfigError(
                f"a stream of width {self.stream.spec.width} cannot be multiplied by a {self.weight.shape} weight; "
                f"its rows must be as many as the stream is wide"
            )


@struct.dataclass
class DecodeAttention(Call[Part]):
    """Attention of a few new queries to one layer of quantized history, keys rebuilt and values absorbed.

    The result lies in the value stream's space, C wide per query head: o_h = p_h z^ (the caller multiplies by the value
    rebuild matrix of head h), with the log-sum-exp.

    q: queries [B, T, H, d], before RoPE unless `geometry.rotated`
    key_stream: history of all layers, unsliced, leading axes [L, B, N]
    key_rebuild: how keys come from vectors of the key stream
    value_stream: likewise; None if values are read from the key stream too
    history_blocks: int32 [B], whole blocks of each sequence that exist; the rest is neither read nor attended to
    layer: int32 [], which layer of the streams
    num_kv_heads: K, which divides H
    value_heads: K if the value stream holds each kv head's part side by side, 1 if all heads read the whole of it
    skip: int32 [B], how many tokens at the beginning of each sequence are not attended to; below 0 is as 0

    A query that sees no key, as all do whose position is below 0, has out = 0 and lse = -inf.
    """

    operation: ClassVar[str] = "decode_attention"

    q: Leaf
    key_stream: Blocks
    key_rebuild: KeyRebuild
    value_stream: Blocks | None
    history_blocks: Leaf
    geometry: Geometry
    layer: Leaf
    num_kv_heads: int = struct.field(pytree_node=False)
    value_heads: int = struct.field(pytree_node=False)
    skip: Leaf

    @property
    def values(self) -> Blocks:
        """The stream that values are read from."""
        return self.key_stream if self.value_stream is None else self.value_stream

    def check(self) -> None:
        batch, heads, width = self.q.shape[0], self.q.shape[2], self.values.spec.width
        if jnp.shape(self.skip) != (batch,):
            raise ConfigError(
                f"skip has shape {jnp.shape(self.skip)}, and there are {batch} sequences; give one number for each"
            )
        if heads % self.num_kv_heads:
            raise ConfigError(
                f"{heads} query heads cannot share {self.num_kv_heads} key/value heads; these must divide them"
            )
        if self.value_heads not in (1, self.num_kv_heads) or width % self.value_heads:
            raise ConfigError(
                f"a value stream of width {width} cannot be split into {self.value_heads} heads; "
                f"value_heads is 1, or num_kv_heads={self.num_kv_heads} where that divides the width"
            )


@struct.dataclass
class Accumulate(Call[Blocks]):
    """The running sum of the history with one layer in it (paper, section 3.3): read, added to, quantized again.

    running_sum: the sum of the layers below [B, N, ...], along the token; ignored if `accumulation.predict` is None
    stream: what the layers store, of all layers, unsliced, leading axes [L, B, N]
    accumulation: how the sum goes on
    history_blocks: int32 [B], whole blocks of each sequence that exist; what the others hold afterwards means nothing
    layer: int32 [], which layer of the stream
    """

    operation: ClassVar[str] = "accumulate"

    running_sum: Blocks
    stream: Blocks
    accumulation: Accumulation
    history_blocks: Leaf
    layer: Leaf

    def check(self) -> None:
        lift, predict = self.accumulation.lift, self.accumulation.predict
        widths = [self.stream.spec.width if lift is None else lift.shape[1]]
        widths += [matrix.shape[1] for matrix in (predict or ())[-1:]]
        if any(width != self.running_sum.spec.width for width in widths):
            raise ConfigError(
                f"a sum of width {self.running_sum.spec.width} cannot be had from parts of width {widths}; "
                f"they must be as wide"
            )


@struct.dataclass
class Quantize(Call[Blocks]):
    """Quantizes and packs whole blocks, as `xquant_jax.numerics.quantization.quantize` defines it.

    Vectors in bfloat16 have the same scales and zeros from a kernel, and the same codes but where a value lies half way
    between two. Of clipped ranges, one scale in 250,000 may be the next smaller number: kernels divide less exactly.

    x: vectors [B, N, 128, C]
    codebook: levels [2^bits], for a stream of that format
    """

    operation: ClassVar[str] = "quantize"

    x: Leaf
    spec: StreamSpec = struct.field(pytree_node=False)
    codebook: Leaf = None

    def check(self) -> None:
        if self.x.shape[-1] != self.spec.width:
            raise ConfigError(f"vectors of width {self.x.shape[-1]} are no stream of width {self.spec.width}")
