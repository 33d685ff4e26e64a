"""The operations in Triton, for NVIDIA GPUs since Ampere and for AMD GPUs as far as Triton carries them.

Where each kv head has values of its own, one kernel reads a head's blocks and does everything. Where all heads read the
whole value stream (X itself, a joint basis), its accumulator would not fit: one kernel computes scores, which are few,
and a second one weighs values with them, a tile of channels at a time. Sequences are split over programs, and the parts
are merged by their log-sum-exp.

A running sum is read by the programs of all its columns before one of them may overwrite it: one kernel lays out what
is multiplied, a range of blocks at a time, and a second one multiplies, adds and quantizes in place.

Kernels multiply in bfloat16 and accumulate in float32; float16 queries and matrices are rounded to bfloat16.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import eight_bits, target, triton_tiles
from pallas_kernels.triton_launch import CAN_UPDATE, launch
from pallas_kernels.triton_tiles import Shape, Tiles
from pallas_kernels.xla import Accumulation, KeyRebuild
from pallas_kernels.xla import quantize as quantize  # see `refuse_quantize`
from xquant_jax import rope
from xquant_jax.attention import LOWEST, Geometry, Part
from xquant_jax.packing import BLOCK
from xquant_jax.quantization import UNQUANTIZED, Blocks, StreamSpec

PLATFORM = "gpu"

HEAD_DIMS = (64, 128, 256)
LEAST_QUERIES = 8  # of a kv head: what one matrix instruction takes
LONGEST = 16  # new tokens
MOST_QUERIES = 128  # of a kv head: new tokens times query heads that share it
VALUE_CHANNELS = 128  # of one program, where all heads read the whole value stream
VALUE_QUERIES = 64  # likewise
EIGHT_BIT_CHANNELS = 128  # at once, where keys are rebuilt in 8 bits
MOST_GROUPS = 128  # of such a key stream
COLUMNS = 128  # of a weight at once, in `remat_project`
TILES_PER_SPLIT = 4  # at least: less work does not pay for a program of its own
SUM_COLUMNS = 128  # of a program of `accumulate`: the group of its sum
RANGES = 8  # of blocks, that `accumulate` lays out one after the other, at most
LEAST_RANGE = 256  # blocks of all sequences: enough for the launch of a range not to count


def refuse_quantize(x: Array, spec: StreamSpec, codebook: Array | None = None) -> str | None:
    """Never: XLA for GPU fuses the passes over the vectors, and `quantize` is its own."""
    return None


def refuse_remat_project(stream: Blocks, weight: Float[Array, "C N"], *, dtype: Any = None) -> str | None:
    """Why the kernel cannot take these, or None."""
    return _refuse_device() or _refuse_type(weight) or _refuse_stream("the", stream.spec, at_once=64)


def remat_project(stream: Blocks, weight: Float[Array, "C N"], *, dtype: Any = None) -> Float[Array, "B S N"]:
    """See `pallas_kernels.api.remat_project`."""
    batch, blocks = stream.words[0].shape[:2]
    columns = weight.shape[1]
    tiles = triton_tiles.choose(Shape("project", "dense", bits=stream.spec.bits))
    (out,) = launch(
        "project",
        *_arrays(stream),
        _operand(weight),
        grid=(triton.cdiv(columns, COLUMNS), triton.cdiv(batch * blocks, tiles.blocks)),
        outputs=[jax.ShapeDtypeStruct((batch * blocks * BLOCK, columns), dtype or weight.dtype)],
        warps=tiles.warps,
        stages=tiles.stages,
        NUM_BLOCKS=batch * blocks,
        COLUMNS=columns,
        **_stream_constants(stream.spec),
        BLOCKS=tiles.blocks,
        CHUNK=_chunk(tiles, stream.spec),
        TILE=COLUMNS,
        **_types(),
    )
    return out.reshape(batch, blocks * BLOCK, columns)


def refuse_decode_attention(
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
) -> str | None:
    """Why the kernels cannot take these, or None."""
    length, heads, dim = q.shape[1:]
    queries = length * heads // num_kv_heads
    value_dim = value_stream.spec.width // value_heads
    if dim not in HEAD_DIMS:
        return f"a head dimension of {dim} is not taken; 64, 128 and 256 are"
    if length > LONGEST:
        return f"{length} new tokens are not taken; up to {LONGEST} are"
    if queries > MOST_QUERIES:
        return f"{queries} queries for one kv head are not taken; up to {MOST_QUERIES} are"
    form = _form(key_rebuild)
    latent = key_stream.spec.width // num_kv_heads
    if form == "per_head" and latent not in HEAD_DIMS:
        return f"a latent of {latent} for each head is not taken; 64, 128 and 256 are"
    if form in eight_bits.TYPES and (reason := _refuse_eight_bits(form, key_stream.spec, value_heads)):
        return reason
    if value_heads not in (1, num_kv_heads):
        return f"values in {value_heads} parts are not taken; 1 and {num_kv_heads} are"
    if value_stream.spec.axis != "token":
        return "values quantized along the channel are not taken; along the token they are"
    if value_heads > 1 and value_dim not in HEAD_DIMS:
        return f"values of {value_dim} for each head are not taken; 64, 128 and 256 are"
    return (
        _refuse_device()
        or _refuse_type(q)
        or _refuse_stream(
            "the key",
            key_stream.spec,
            at_once={"dense": 64, "int8": EIGHT_BIT_CHANNELS, "fp8": EIGHT_BIT_CHANNELS, "identity": dim // 2}.get(
                form, latent
            ),
        )
        or _refuse_stream("the value", value_stream.spec, value_dim if value_heads > 1 else VALUE_CHANNELS)
    )


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
    batch, length, heads, dim = q.shape
    num_blocks = key_stream.words[0].shape[2]
    width = value_stream.spec.width
    shared = heads // num_kv_heads
    queries = max(LEAST_QUERIES, triton.next_power_of_2(length * shared))
    form = _form(key_rebuild)
    per_head = value_heads == num_kv_heads and width // value_heads in HEAD_DIMS
    has_norm = key_rebuild.norm is not None
    tiles = triton_tiles.choose(Shape("decode", form, dim, key_stream.spec.bits, queries, has_norm))

    turned = q.astype(jnp.float32) * (geometry.scale * math.log2(math.e))
    if not geometry.rotated:
        turned = rope.rotate_heads(turned, geometry.positions, geometry.frequencies)
    turned = turned.reshape(batch, length, num_kv_heads, shared, dim).swapaxes(1, 2)
    turned = _pad(turned.reshape(batch, num_kv_heads, length * shared, dim), queries, axis=2)
    positions = _pad(jnp.repeat(geometry.positions.astype(jnp.int32), shared, axis=1), queries, axis=1, value=-1)
    earliest, latest = geometry.positions.min(axis=1), geometry.positions.max(axis=1)
    oldest = jnp.maximum(earliest - geometry.sliding_window + 1, 0) // BLOCK
    bounds = jnp.stack([oldest, flushed, earliest, latest], axis=1).astype(jnp.int32)
    scalars = jnp.stack([jnp.asarray(layer), jnp.asarray(geometry.sliding_window)]).astype(jnp.int32)
    number = jnp.arange(tiles.blocks * BLOCK // 2)
    in_tile = number // 64 * BLOCK + number % 64  # the low tokens of the tile's blocks
    rotations = [
        jnp.stack(rope.rotation(at, geometry.frequencies)) for at in (in_tile, 64 * jnp.arange(2 * num_blocks))
    ]
    bias, norm = (turned if a is None else _operand(a) for a in (key_rebuild.bias, key_rebuild.norm))
    if form in eight_bits.TYPES:
        matrices = _eight_bits(key_rebuild)
    else:
        matrix = turned if key_rebuild.matrix is None else _operand(key_rebuild.matrix)
        matrices = (matrix,) * 3
    inputs = (scalars, bounds, turned, positions, *rotations, *_arrays(key_stream))
    constants = {
        "NUM_BLOCKS": num_blocks,
        "BATCH": batch,
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
        "CHUNK": _chunk(tiles, key_stream.spec) or key_stream.spec.width // num_kv_heads,
        "ASSEMBLY": not target.current().interpret and not triton_tiles.is_amd(),
        **_types(),
    }
    splits = _splits(batch * num_kv_heads, num_blocks, tiles.blocks)
    if per_head and tiles.fused:
        out, lse = launch(
            "decode",
            *inputs,
            matrices[0],
            bias,
            norm,
            *_arrays(value_stream),
            grid=(batch * num_kv_heads, splits),
            outputs=_parts(batch, splits, length * heads, width // value_heads),
            warps=tiles.warps,
            stages=tiles.stages,
            **constants,
            **_stream_constants(key_stream.spec, "KEY_"),
            **_stream_constants(value_stream.spec, "VALUE_"),
        )
    else:
        (scores,) = launch(
            "decode_scores",
            *inputs,
            *matrices,
            bias,
            norm,
            grid=(batch * num_kv_heads, splits),
            outputs=[jax.ShapeDtypeStruct((batch, length * heads, num_blocks * BLOCK), jnp.float32)],
            warps=tiles.warps,
            stages=tiles.stages,
            **constants,
            **_stream_constants(key_stream.spec),
        )
        channels = width // value_heads if per_head else VALUE_CHANNELS
        rows = length * (shared if per_head else heads)
        at_once = min(VALUE_QUERIES, max(LEAST_QUERIES, triton.next_power_of_2(rows)))
        tiles = triton_tiles.choose(Shape("values", "", channels, value_stream.spec.bits, at_once))
        programs = batch * (width // channels), triton.cdiv(rows, at_once)
        splits = _splits(math.prod(programs), num_blocks, tiles.blocks)
        out, lse = launch(
            "decode_values",
            scalars,
            bounds,
            scores,
            *_arrays(value_stream),
            grid=(programs[0], splits, programs[1]),
            outputs=_parts(batch, splits, length * heads, channels if per_head else width),
            warps=tiles.warps,
            stages=tiles.stages,
            NUM_BLOCKS=num_blocks,
            BATCH=batch,
            KV_HEADS=num_kv_heads,
            QUERIES=at_once,
            LENGTH=length,
            SHARED=shared,
            PER_HEAD=per_head,
            CHANNELS=channels,
            BLOCKS=tiles.blocks,
            **_stream_constants(value_stream.spec),
            **_types(),
        )
    part = _merge(out, lse)
    return Part(part.out.reshape(batch, length, heads, -1), part.lse.reshape(batch, length, heads))


def refuse_accumulate(
    running: Blocks,
    stream: Blocks,
    accumulation: Accumulation,
    flushed: Int[Array, " B"],
    *,
    layer: Int[Array, ""] | int,
) -> str | None:
    """Why the kernels cannot take these, or None."""
    spec, predict, lift = running.spec, accumulation.predict or (), accumulation.lift
    if (spec.bits, spec.axis, spec.group) != (8, "token", SUM_COLUMNS):
        return (
            f"a sum of {spec.bits} bits along the {spec.axis} in groups of {spec.group} is not taken; "
            f"8 bits along the token in groups of {SUM_COLUMNS} are"
        )
    if len(predict) > 2:
        return f"{len(predict)} matrices one after the other are not taken; up to 2 are"
    matrices = [*predict, *([] if lift is None else [lift])]
    if narrow := [rows for rows, _ in (matrix.shape for matrix in matrices) if rows % SUM_COLUMNS]:
        return f"a matrix of {narrow[0]} rows is not taken; multiples of {SUM_COLUMNS} are"
    if not CAN_UPDATE:
        return "jax-triton before 0.4 cannot update arrays in place; pip install --upgrade jax-triton"
    return (
        _refuse_device()
        or next((reason for reason in map(_refuse_type, matrices) if reason), None)
        or _refuse_stream("the sum's", spec, SUM_COLUMNS)
        or _refuse_stream("the", stream.spec, SUM_COLUMNS)
    )


def accumulate(
    running: Blocks,
    stream: Blocks,
    accumulation: Accumulation,
    flushed: Int[Array, " B"],
    *,
    layer: Int[Array, ""] | int,
) -> Blocks:
    """See `pallas_kernels.api.accumulate`.

    In place; beside it what the last matrix and the lift are multiplied with is laid out in bfloat16, for an eighth of
    the blocks at a time, or 256 of all sequences if that is more.
    """
    batch, num_blocks = running.words[0].shape[:2]
    predict, lift = accumulation.predict or (), accumulation.lift
    tiles = triton_tiles.choose(Shape("sum", "" if lift is None and not predict else "dense", bits=stream.spec.bits))
    size = num_blocks
    if predict or lift is not None:
        size = min(num_blocks, max(triton.cdiv(num_blocks, RANGES), triton.cdiv(LEAST_RANGE, batch)))
    in_range = triton.cdiv(size, tiles.blocks)
    shared: dict[str, Any] = {
        "NUM_BLOCKS": num_blocks,
        "BATCH": batch,
        "TILES": in_range,
        "BLOCKS": tiles.blocks,
        "CHUNK": tiles.chunk or SUM_COLUMNS,
        "warps": tiles.warps,
    }
    flushed, layer = flushed.astype(jnp.int32), jnp.asarray(layer, jnp.int32)

    def lay_out(blocks: Blocks, scalars: Array, matrix: Array | None) -> Array:
        width = blocks.spec.width if matrix is None else matrix.shape[1]
        shape = (batch, in_range * tiles.blocks * BLOCK, width)
        (out,) = launch(
            "lay_out",
            scalars,
            flushed,
            *_arrays(blocks),
            scalars if matrix is None else _operand(matrix),
            grid=(width // SUM_COLUMNS * batch * in_range,),
            outputs=[jax.ShapeDtypeStruct(shape, _operand_type())],
            stages=1,
            OUT_WIDTH=width,
            MULTIPLY=matrix is not None,
            **shared,
            **_stream_constants(blocks.spec),
            **_types(),
        )
        return out

    for first in range(0, num_blocks, in_range * tiles.blocks):
        of_sum, of_stream = (jnp.stack([number, jnp.int32(first)]) for number in (jnp.int32(0), layer))
        below = lay_out(running, of_sum, predict[0] if len(predict) == 2 else None) if predict else of_sum
        stored = of_sum if lift is None else lay_out(stream, of_stream, None)
        *words, scale, zero = launch(
            "add",
            of_stream,
            flushed,
            *_arrays(stream),
            below,
            _operand(predict[-1]) if predict else of_sum,
            stored,
            of_sum if lift is None else _operand(lift),
            grid=(running.spec.width // SUM_COLUMNS * batch * in_range,),
            updated=_arrays(running),
            stages=tiles.stages,
            SUM_WIDTH=running.spec.width,
            BELOW=predict[-1].shape[0] if predict else 0,
            STORED=0 if lift is None else lift.shape[0],
            ADD_SUM=accumulation.predict == (),
            PRECISION=_types()["PRECISION"],
            **shared,
            **_stream_constants(stream.spec),
        )
        running = Blocks(tuple(words), scale, zero, running.spec)
    return running


def _merge(out: Float[Array, "B splits rows C"], lse: Float[Array, "B splits rows"]) -> Part:
    """Attention over all splits; as `attention.merge`, of parts that lie in one array."""
    top = jnp.maximum(lse.max(axis=1), LOWEST)
    weights = jnp.exp(lse - top[:, None])
    total = weights.sum(axis=1)
    merged = jnp.einsum("bsr,bsrc->brc", weights, out, precision="highest")
    return Part(merged / jnp.where(total > 0, total, 1.0)[..., None], top + jnp.log(total))


def _splits(programs: int, num_blocks: int, blocks: int) -> int:
    """Parts to cut each sequence into, so that two rounds of programs fill the device."""
    wanted = triton.cdiv(4 * triton_tiles.multiprocessors(), programs)
    return max(1, min(wanted, num_blocks // (TILES_PER_SPLIT * blocks)))


def _parts(batch: int, splits: int, rows: int, width: int) -> list[jax.ShapeDtypeStruct]:
    shapes = (batch, splits, rows, width), (batch, splits, rows)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


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
    sums = _operand(jnp.stack([high, rebuild.sums - high]))
    return lax.bitcast_convert_type(rebuild.matrix, jnp.int8).T, sums, rebuild.scale


def _arrays(stream: Blocks) -> tuple[Array, ...]:
    """Words of the lower and the upper plane (or the lower one again), scales and zeros."""
    return stream.words[0], stream.words[-1], stream.scale, stream.zero


def _stream_constants(spec: StreamSpec, prefix: str = "") -> dict[str, Any]:
    group = 0 if spec.axis == "channel" else spec.group
    return {f"{prefix}WIDTH": spec.width, f"{prefix}BITS": spec.bits, f"{prefix}GROUP": group}


def _chunk(tiles: Tiles, spec: StreamSpec) -> int:
    """Channels of a rebuild at once: no more than one group of them."""
    return math.gcd(tiles.chunk, spec.group) if spec.axis == "token" and tiles.chunk else tiles.chunk


def _types() -> dict[str, Any]:
    """Types to multiply and to unpack in. The interpreter knows no bfloat16 arithmetic."""
    if target.current().interpret:
        return {"DTYPE": tl.float32, "ARITHMETIC": tl.float32, "PRECISION": "ieee"}
    return {"DTYPE": tl.bfloat16, "ARITHMETIC": tl.bfloat16, "PRECISION": "tf32"}


def _operand_type() -> Any:
    return jnp.float32 if target.current().interpret else jnp.bfloat16


def _operand(a: Array) -> Array:
    return a.astype(_operand_type())


def _pad(a: Array, size: int, axis: int, value: int = 0) -> Array:
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(a.shape)]
    return jnp.pad(a, widths, constant_values=value)


def _refuse_type(a: Array) -> str | None:
    if a.dtype in (jnp.bfloat16, jnp.float16) or target.current().interpret:
        return None
    return f"{a.dtype} is not taken; bfloat16 and float16 are"


def _refuse_device() -> str | None:
    capability = triton_tiles.capability()
    if capability and capability < 8:
        return f"a GPU of compute capability {capability} is not taken; 8.0 (Ampere) and newer are"
    return None


def _refuse_eight_bits(form: str, key: StreamSpec, value_heads: int) -> str | None:
    capability = triton_tiles.capability()
    if capability and capability < 9:
        return f"keys are rebuilt in {form} on compute capability 9.0 (Hopper) and newer, and this GPU has {capability}"
    if key.axis == "channel":
        return f"keys quantized along the channel are not rebuilt in {form}; those along the token are"
    if form == "fp8" and key.bits > 4:
        return f"keys of {key.bits} bits are not rebuilt in fp8; up to 4 bits are"
    if key.width // key.group > MOST_GROUPS:
        return f"keys in {key.width // key.group} groups are not rebuilt in {form}; up to {MOST_GROUPS} groups are"
    if value_heads > 1:
        return f"keys are rebuilt in {form} where all heads read the whole value stream, and these have one each"
    return None


def _refuse_stream(which: str, spec: StreamSpec, at_once: int) -> str | None:
    """A group must hold all the channels that are read at once, or be a channel's part of a block."""
    if spec.bits == UNQUANTIZED:
        return f"{which} stream is not quantized"
    if spec.format != "uniform":
        return f"{which} stream's format {spec.format} is not taken; uniform is"
    if spec.width % at_once:
        return f"{which} stream's width {spec.width} is not a multiple of {at_once}"
    if spec.axis == "channel":
        if spec.group != BLOCK:
            return f"{which} stream's groups of {spec.group} tokens are not taken; whole blocks of {BLOCK} are"
    elif spec.group % at_once:
        return f"{which} stream's groups of {spec.group} channels are not taken; multiples of {at_once} are"
    return None
