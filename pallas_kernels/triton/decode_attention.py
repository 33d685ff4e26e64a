"""`decode_attention`: one kernel, or two that hand scores over.

Where each kv head has values of its own, one kernel reads a head's blocks and does everything. Where all heads read the
whole value stream (X itself, a joint basis), its accumulator would not fit: one kernel computes scores, which are few,
and a second one weighs values with them, a tile of channels at a time. Sequences are split over programs, and the parts
are merged by their log-sum-exp.
"""

import math

import jax
import jax.numpy as jnp
import triton
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import eight_bits, gpus
from pallas_kernels.calls import MOST_NEW_TOKENS, DecodeAttention
from pallas_kernels.operands import KeyRebuild
from pallas_kernels.streams import refuse_stream
from pallas_kernels.triton import launching, operands, tiling
from xquant_jax.numerics import rope
from xquant_jax.numerics.attention import LOWEST, Part
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import StreamSpec

HEAD_DIMS = (64, 128, 256)
LEAST_QUERIES = 8  # of a program: what one matrix instruction takes
VALUE_CHANNELS = 128  # of one program, where all heads read the whole value stream
VALUE_QUERIES = 32  # of one program
EIGHT_BIT_CHANNELS = 128  # at once, where keys are rebuilt in 8 bits
MOST_GROUPS = 128  # of such a key stream


def refuse(call: DecodeAttention) -> str | None:
    """Why the kernels cannot take a call; None if they can."""
    length, dim = call.q.shape[1], call.q.shape[3]
    num_kv_heads, value_heads, key, value = call.num_kv_heads, call.value_heads, call.key_stream.spec, call.values.spec
    value_dim = value.width // value_heads
    if dim not in HEAD_DIMS:
        return f"a head dimension of {dim} is not taken; 64, 128 and 256 are"
    if length > MOST_NEW_TOKENS:
        return f"{length} new tokens are not taken; up to {MOST_NEW_TOKENS} are"
    form = _form(call.key_rebuild)
    latent = key.width // num_kv_heads
    if form == "per_head" and latent not in HEAD_DIMS:
        return f"a latent of {latent} for each head is not taken; 64, 128 and 256 are"
    if form in eight_bits.TYPES and (reason := _refuse_eight_bits(form, key, value_heads)):
        return reason
    if value_heads not in (1, num_kv_heads):
        return f"values in {value_heads} parts are not taken; 1 and {num_kv_heads} are"
    if value.axis != "token":
        return "values quantized along the channel are not taken; along the token they are"
    if value_heads > 1 and value_dim not in HEAD_DIMS:
        return f"values of {value_dim} for each head are not taken; 64, 128 and 256 are"
    keys_at_once = {"identity": dim // 2, **dict.fromkeys(eight_bits.TYPES, EIGHT_BIT_CHANNELS)}
    return (
        operands.refuse_device()
        or operands.refuse_type(call.q)
        or refuse_stream("the key stream", key, keys_at_once.get(form, operands.LEAST_CHANNELS))
        or refuse_stream("the value stream", value, operands.LEAST_CHANNELS)
    )


def run(call: DecodeAttention) -> Part:
    """Attends with one kernel, or with two."""
    q, key_stream, key_rebuild, value_stream = call.q, call.key_stream, call.key_rebuild, call.values
    history_blocks, geometry = call.history_blocks, call.geometry
    num_kv_heads, value_heads = call.num_kv_heads, call.value_heads
    batch, length, heads, dim = q.shape
    num_blocks = key_stream.planes[0].shape[2]
    width = value_stream.spec.width
    shared = heads // num_kv_heads
    queries = min(tiling.most_queries(dim), max(LEAST_QUERIES, triton.next_power_of_2(length * shared)))
    query_tiles = triton.cdiv(length * shared, queries)
    form = _form(key_rebuild)
    # a program reads values that have one scale and zero for each token
    value_dim = width // value_heads
    channels = operands.channels(value_stream.spec, value_dim if value_heads > 1 else VALUE_CHANNELS)
    has_norm = key_rebuild.norm is not None
    spec = key_stream.spec
    tiles = tiling.choose(tiling.Shape("decode", form, dim, spec.bits, queries, has_norm, spec.width))

    turned = q.astype(jnp.float32) * (geometry.scale * math.log2(math.e))
    if not geometry.rotated:
        turned = rope.rotate_heads(turned, geometry.positions, geometry.frequencies)
    turned = turned.reshape(batch, length, num_kv_heads, shared, dim).swapaxes(1, 2)
    turned = _pad(turned.reshape(batch, num_kv_heads, length * shared, dim), query_tiles * queries, axis=2)
    positions = jnp.repeat(geometry.positions.astype(jnp.int32), shared, axis=1)
    positions = _pad(positions, query_tiles * queries, axis=1, value=-1)
    earliest, latest = geometry.earliest(), geometry.positions.max(axis=1)
    oldest = jnp.maximum(earliest - geometry.sliding_window + 1, 0) // BLOCK
    seen_from = jnp.maximum(latest - geometry.sliding_window + 1, call.skip)
    # queries that see something lie behind all blocks; if some did not, no token would count as seen by all
    seen_from = jnp.where(earliest >= history_blocks * BLOCK, seen_from, num_blocks * BLOCK)
    bounds = jnp.stack([oldest, history_blocks, seen_from, call.skip], axis=1).astype(jnp.int32)
    scalars = jnp.stack([jnp.asarray(a, jnp.int32) for a in (call.layer, geometry.sliding_window)])
    scalars = jnp.concatenate([scalars, jnp.arange(16, dtype=jnp.int32)])
    number = jnp.arange(tiles.blocks * BLOCK // 2)
    in_tile = number // 64 * BLOCK + number % 64  # the low tokens of the tile's blocks
    rotations = [
        jnp.stack(rope.rotation(at, geometry.frequencies)) for at in (in_tile, 64 * jnp.arange(2 * num_blocks))
    ]
    bias, norm = (turned if a is None else operands.operand(a) for a in (key_rebuild.bias, key_rebuild.norm))
    if form in eight_bits.TYPES:
        matrices = _eight_bits(key_rebuild)
    else:
        matrix = turned if key_rebuild.matrix is None else operands.operand(key_rebuild.matrix)
        matrices = (matrix,) * 3
    inputs = (scalars, bounds, turned, positions, *rotations, *operands.arrays(key_stream))
    constants = {
        "NUM_BLOCKS": num_blocks,
        "BATCH": batch,
        "ROWS": triton.next_power_of_2(batch),
        "KV_HEADS": num_kv_heads,
        "QUERIES": queries,
        "LENGTH": length,
        "SHARED": shared,
        "DIM": dim,
        "NORM_EPS": key_rebuild.norm_eps,
        "FORM": form,
        "HAS_BIAS": key_rebuild.bias is not None,
        "HAS_NORM": has_norm,
        "ROPE": not geometry.rotated,
        "BLOCKS": tiles.blocks,
        "CHUNK": operands.channels(spec, tiles.chunk or spec.width // num_kv_heads),
        **operands.types(),
    }
    splits = tiling.splits(batch * num_kv_heads * query_tiles, num_blocks, tiles.blocks)
    parts = _number_of_parts(batch, splits)
    if tiles.fused and value_heads == num_kv_heads and channels == value_dim:
        out, lse, owners = launching.run(
            "decode",
            *inputs,
            matrices[0],
            bias,
            norm,
            *operands.arrays(value_stream),
            grid=(num_kv_heads, parts, query_tiles),
            outputs=_parts(parts, length * heads, value_dim),
            warps=tiles.warps,
            stages=tiles.stages,
            **constants,
            **operands.stream_constants(key_stream.spec, "KEY_"),
            **operands.stream_constants(value_stream.spec, "VALUE_"),
        )
    else:
        (scores,) = launching.run(
            "decode_scores",
            *inputs,
            *matrices,
            bias,
            norm,
            grid=(num_kv_heads, parts, query_tiles),
            outputs=[jax.ShapeDtypeStruct((batch, length * heads, num_blocks * BLOCK), jnp.float32)],
            warps=tiles.warps,
            stages=tiles.stages,
            **constants,
            **operands.stream_constants(key_stream.spec),
        )
        rows = length * (heads if value_heads == 1 else shared)
        at_once = min(VALUE_QUERIES, max(LEAST_QUERIES, triton.next_power_of_2(rows)))
        tiles = tiling.choose(tiling.Shape("values", "", channels, value_stream.spec.bits, at_once, width=width))
        programs = width // channels, triton.cdiv(rows, at_once)
        splits = tiling.splits(batch * math.prod(programs), num_blocks, tiles.blocks)
        parts = _number_of_parts(batch, splits)
        out, lse, owners = launching.run(
            "decode_values",
            scalars,
            bounds,
            scores,
            *operands.arrays(value_stream),
            grid=(programs[0], parts, programs[1]),
            outputs=_parts(parts, length * heads, value_dim),
            warps=tiles.warps,
            stages=tiles.stages,
            NUM_BLOCKS=num_blocks,
            BATCH=batch,
            ROWS=triton.next_power_of_2(batch),
            KV_HEADS=num_kv_heads,
            QUERIES=at_once,
            LENGTH=length,
            SHARED=shared,
            VALUE_HEADS=value_heads,
            CHANNELS=channels,
            BLOCKS=tiles.blocks,
            **operands.stream_constants(value_stream.spec),
            **operands.types(),
        )
    part = _merge(out, lse, owners, jnp.repeat(geometry.positions >= 0, heads, axis=1))
    return Part(part.out.reshape(batch, length, heads, -1), part.lse.reshape(batch, length, heads))


def _merge(
    out: Float[Array, "parts rows C"],
    lse: Float[Array, "parts rows"],
    owners: Int[Array, " parts"],
    sees: Bool[Array, "B rows"],
) -> Part:
    """Attention of each sequence over its parts; as `attention.merge`, of parts that lie in one array. Rows that do not
    see anything are masked here: kernels mask no tile that all others see."""
    own = owners[None] == jnp.arange(len(sees))[:, None]
    lse = jnp.where(own[..., None] & sees[:, None], lse[None], -jnp.inf)  # [B, parts, rows]
    top = jnp.maximum(lse.max(axis=1), LOWEST)
    weights = jnp.exp(lse - top[:, None])
    total = weights.sum(axis=1)
    merged = jnp.einsum("bpr,prc->brc", weights, out, precision="highest")
    return Part(merged / jnp.where(total > 0, total, 1.0)[..., None], top + jnp.log(total))


def _number_of_parts(batch: int, splits: int) -> int:
    """Of all sequences. Unequal ones make up to as many more, of one size, as there are sequences."""
    return batch * (splits + 1) if splits > 1 else batch


def _parts(parts: int, rows: int, width: int) -> list[jax.ShapeDtypeStruct]:
    """Of attention, its log-sum-exp, and whose it is."""
    attention = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((parts, rows, width), (parts, rows))]
    return [*attention, jax.ShapeDtypeStruct((parts,), jnp.int32)]


def _form(rebuild: KeyRebuild) -> str:
    if rebuild.matrix is None:
        return "identity"
    if small := eight_bits.name_of(rebuild.matrix.dtype):
        return small
    return "dense" if rebuild.matrix.ndim == 2 else "per_head"


def _eight_bits(rebuild: KeyRebuild) -> tuple[Array, Array, Array]:
    """The matrix as int8 [R, C], its sums in two halves that bfloat16 holds [2, C/G, R], scales of columns [R]."""
    assert rebuild.matrix is not None
    assert rebuild.sums is not None
    assert rebuild.scale is not None
    high = lax.reduce_precision(rebuild.sums, exponent_bits=8, mantissa_bits=7)
    sums = operands.operand(jnp.stack([high, rebuild.sums - high]))
    return lax.bitcast_convert_type(rebuild.matrix, jnp.int8).T, sums, rebuild.scale


def _pad(a: Array, size: int, axis: int, value: int = 0) -> Array:
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(a.shape)]
    return jnp.pad(a, widths, constant_values=value)


def _refuse_eight_bits(form: str, key: StreamSpec, value_heads: int) -> str | None:
    capability = gpus.current().capability
    if capability < 9:
        return f"keys are rebuilt in {form} on compute capability 9.0 (Hopper) and newer, and this GPU has {capability}"
    if reason := eight_bits.refuse_keys(form, key):
        return reason
    if key.width // key.group > MOST_GROUPS:
        return f"keys in {key.width // key.group} groups are not rebuilt in {form}; up to {MOST_GROUPS} groups are"
    if value_heads > 1:
        return f"keys are rebuilt in {form} where all heads read the whole value stream, and these have one each"
    return None
