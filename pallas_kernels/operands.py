"""What calls hold besides streams: how keys are rebuilt, how a running sum goes on."""

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from xquant_jax.numerics.broadcast import along_last
from xquant_jax.numerics.quantization import Leaf


@struct.dataclass
class KeyRebuild:
    """How keys before RoPE come from stored vectors z of width C.

    matrix: dense [C, R], per head [K, e, d] with C = K e, or None where z are the keys already
    bias [R] (Qwen2) is added and the RMS norm with scale `norm` [d] (Qwen3) applied afterwards
    scale, sums: of a dense matrix in int8 or e4m3 (`eight_bits`), float32 [R] and [C/G, R]: what columns are multiplied
        with, and sums of the rows of each of the stream's groups of channels, which kernels multiply zeros with
    """

    matrix: Leaf | None = None
    bias: Leaf | None = None
    norm: Leaf | None = None
    norm_eps: float = struct.field(pytree_node=False, default=0.0)
    scale: Leaf | None = None
    sums: Leaf | None = None

    def __call__(self, z: Float[Array, "B S C"], num_kv_heads: int) -> Float[Array, "B S K d"]:
        if self.matrix is None or self.scale is None:
            k = expand(z, self.matrix, num_kv_heads)
        else:  # what 8 bits hold, every type of z holds exactly
            wide = jnp.matmul(z, self.matrix.astype(z.dtype), preferred_element_type=jnp.float32)
            k = (wide * along_last(self.scale, wide)).astype(z.dtype).reshape(*z.shape[:2], num_kv_heads, -1)
        if self.bias is not None:
            k = k + self.bias.reshape(1, 1, num_kv_heads, -1).astype(k.dtype)
        if self.norm is not None:
            wide = k.astype(jnp.float32)
            mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
            norm = along_last(self.norm.astype(jnp.float32), wide)
            k = (wide * lax.rsqrt(mean_square + self.norm_eps) * norm).astype(z.dtype)
        return k


@struct.dataclass
class Accumulation:
    """How a running sum x^ goes from a layer to the next: x^ <- x^ P_1 P_2 ... + d^ L, d being what the layer stores.

    predict: the matrices P [C, n], ..., [n, C]; an empty tuple: the sum stays as it is. None: a new sum begins
    lift: L [c, C], or None where d is as wide as the sum
    """

    predict: tuple[Leaf, ...] | None = ()
    lift: Leaf | None = None

    def __call__(self, below: Float[Array, "B S C"], stored: Float[Array, "B S c"]) -> Float[Array, "B S C"]:
        total = stored.astype(jnp.float32) if self.lift is None else times(stored, self.lift)
        return total if self.predict is None else self.predicted(below) + total

    def predicted(self, below: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        for matrix in self.predict or ():
            below = times(below, matrix)
        return below


def times(x: Float[Array, "... C"], matrix: Float[Array, "C N"]) -> Float[Array, "... N"]:
    """x in the matrix' type times the matrix, summed in float32: the same in decode and at a flush."""
    return jnp.matmul(x.astype(matrix.dtype), matrix, preferred_element_type=jnp.float32)


def expand(z: Float[Array, "B S C"], matrix: Array | None, num_kv_heads: int) -> Float[Array, "B S K d"]:
    """z times a dense [C, R] or a per-head [K, e, d] matrix, split into heads; no matrix: only split."""
    split = (*z.shape[:2], num_kv_heads, -1)
    if matrix is None:
        return z.reshape(split)
    if matrix.ndim == 2:
        return (z @ matrix).reshape(split)
    return jnp.swapaxes(jnp.matmul(jnp.swapaxes(z.reshape(split), 1, 2), matrix), 1, 2)
