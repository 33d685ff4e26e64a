"""The public operations: they check what they are given and choose the backend.

`implementation=None` takes the best that the device supports and always works; a name takes that backend or raises.
"""

from types import ModuleType

from jaxtyping import Array, Float, Int

from pallas_kernels import xla
from pallas_kernels.xla import KeyRebuild
from xquant_jax.attention import Geometry, Part
from xquant_jax.errors import ConfigError
from xquant_jax.quantization import Blocks

BACKENDS: dict[str, ModuleType] = {"xla": xla}


def backend(implementation: str | None) -> ModuleType:
    """The module that implements the operations."""
    if implementation is None:
        return xla
    if implementation not in BACKENDS:
        raise ConfigError(f"implementation={implementation!r} is not available; choose None or {sorted(BACKENDS)}")
    return BACKENDS[implementation]


def remat_project(
    stream: Blocks, weight: Float[Array, "C N"], *, implementation: str | None = None
) -> Float[Array, "B S N"]:
    """Rematerializes x^ W from the history blocks [B, N, ...] of one layer (paper, section 3.1).

    Raises `ConfigError` if the widths differ or the implementation is not available.
    """
    if stream.spec.width != weight.shape[0]:
        raise ConfigError(f"a stream of width {stream.spec.width} cannot be multiplied by a {weight.shape} weight")
    return backend(implementation).remat_project(stream, weight)


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
    implementation: str | None = None,
) -> Part:
    """Attention of a few new queries to one layer of quantized history, keys rebuilt and values absorbed.

    q: queries, before RoPE unless `geometry.rotated`
    key_stream, value_stream: history of all layers, unsliced, leading axes [L, B, N]; may be the same array
    flushed: whole blocks of each sequence that exist; the rest is neither read nor attended to
    layer: which layer of the streams
    value_heads: K if the value stream holds each kv head's part side by side, 1 if all heads read the whole of it

    Returns attention in the value stream's space, C wide per query head: o_h = p_h z^ (the caller multiplies by
    the value rebuild matrix of head h), with the log-sum-exp. Raises `ConfigError` for shapes that do not fit.
    """
    if q.shape[2] % num_kv_heads:
        raise ConfigError(f"{q.shape[2]} query heads cannot share {num_kv_heads} key/value heads evenly")
    if value_stream.spec.width % value_heads:
        raise ConfigError(f"a value stream of width {value_stream.spec.width} cannot be split into {value_heads} heads")
    return backend(implementation).decode_attention(
        q,
        key_stream,
        key_rebuild,
        value_stream,
        flushed,
        geometry,
        layer=layer,
        num_kv_heads=num_kv_heads,
        value_heads=value_heads,
    )
