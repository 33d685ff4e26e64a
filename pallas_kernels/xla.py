"""The operations in plain XLA: their definition, and what runs where no kernel does."""

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from xquant_jax.attention import Geometry, Part
from xquant_jax.history import attend_history
from xquant_jax.quantization import Blocks, Leaf, dequantize


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
            k = (wide * self.scale).astype(z.dtype).reshape(*z.shape[:2], num_kv_heads, -1)
        if self.bias is not None:
            k = k + self.bias.reshape(num_kv_heads, -1).astype(k.dtype)
        if self.norm is not None:
            wide = k.astype(jnp.float32)
            mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
            k = (wide * lax.rsqrt(mean_square + self.norm_eps) * self.norm).astype(z.dtype)
        return k


def expand(z: Float[Array, "B S C"], matrix: Array | None, num_kv_heads: int) -> Float[Array, "B S K d"]:
    """z times a dense [C, R] or a per-head [K, e, d] matrix, split into heads; no matrix: only split."""
    split = (*z.shape[:2], num_kv_heads, -1)
    if matrix is None:
        return z.reshape(split)
    if matrix.ndim == 2:
        return (z @ matrix).reshape(split)
    return jnp.einsum("bske,ked->bskd", z.reshape(split), matrix)


def remat_project(stream: Blocks, weight: Float[Array, "C N"]) -> Float[Array, "B S N"]:
    """Dequantizes the blocks [B, N, ...] of one layer and multiplies: x^ W."""
    x = dequantize(stream)
    return x.reshape(x.shape[0], -1, x.shape[-1]).astype(weight.dtype) @ weight


def decode_attention(
    q: Float[Array, "B T H d"],
    key_stream: Blocks,
    key_rebuild: KeyRebuild,
    value_stream: Blocks,
    flushed: Int[Array, " B"],
    geometry: Geometry,
    *,
    layer: Int[Array, ""] | int,
    num_kv_heads: int,
    value_heads: int,
) -> Part:
    """See `pallas_kernels.api.decode_attention`."""

    def read(vectors: dict[str, Array], running: Blocks | None) -> tuple[Array, Array, Blocks | None]:
        z = vectors["value"]
        return key_rebuild(vectors["key"], num_kv_heads), z.reshape(*z.shape[:2], value_heads, -1), running

    streams = {"key": key_stream, "value": value_stream}
    part, _ = attend_history(q, streams, layer, flushed, read, geometry)
    return part
