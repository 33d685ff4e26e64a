"""`decode_attention` for TPU: one kernel that reads packed blocks of one layer and attends to them.

A step of the grid takes a *tile* of blocks of one sequence, and within it *chunks* of a few of them. For each chunk and
bundle of heads: codes -> x^ -> keys (matrix unit) -> RoPE -> scores; then, for all heads, softmax and the product with
the values' codes.

- Keys of a chunk are rebuilt while the chunk before it is scored and its values are weighed: the vector unit is busy
  with the one while the matrix units wait for the other. Scores take keys as the stationary operand, which takes long
  to load, so that it alternates with products of many rows. A tile's first chunk goes with the last one of the tile
  before, whose words and scales are kept; only the last chunk of a sequence is attended to with nothing beside it.
  Where bundles are a loop nothing overlaps, and chunks follow one another.
- A *bundle* is as many heads as are as wide as the matrix unit; their rebuild matrices stand on the diagonal of one.
  Its columns are ordered so that the first halves of all its heads come first: then RoPE is one roll by half the width.
- Rows are tokens in the order of `unpack.interleaved`; with a matrix of int8 (`rebuild8`) keys have another order, and
  the scores are permuted.
- Keys are rotated by their place in the chunk, with constant tables; queries by the distance to the chunk, which is
  turned on from chunk to chunk and from tile to tile. Where the vector unit is the narrower one
  (`DecodeTiling.sines_apart`), keys times cosine and keys times sine meet the queries and the queries' rolled halves
  apart: no key is rolled.
- Values are never scaled: their scale goes onto the probabilities, and what zero and `unpack.offset` add is the same
  for all channels of a group: one number per query.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import eight_bits, target
from pallas_kernels.calls import MOST_NEW_TOKENS, DecodeAttention
from pallas_kernels.pallas_tpu import chip, rebuild8, unpack
from pallas_kernels.pallas_tpu.decode_attention_kernel import Seen, kernel, tiles
from pallas_kernels.pallas_tpu.decode_attention_tiling import WORKING_ROOM, DecodeTiling, result_bytes
from pallas_kernels.pallas_tpu.streams import LANES, by_block
from pallas_kernels.streams import refuse_stream
from xquant_jax.numerics import rope
from xquant_jax.numerics.attention import Part, merge
from xquant_jax.numerics.packing import BLOCK


def refuse(call: DecodeAttention) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    _, new, heads, dim = call.q.shape
    key, value, num_kv_heads = call.key_stream.spec, call.values.spec, call.num_kv_heads
    if new > MOST_NEW_TOKENS:
        return f"it takes up to {MOST_NEW_TOKENS} new tokens, and these are {new}"
    if dim != 64 and dim % LANES:
        return f"head dimension {dim} is neither 64 nor a multiple of 128"
    if num_kv_heads * dim % LANES:
        return (
            f"{num_kv_heads} key/value heads of dimension {dim} are {num_kv_heads * dim} channels, no multiple of 128; "
            "with an even number of heads on a device they would be"
        )
    for name, spec in {"key": key, "value": value}.items():
        if reason := refuse_stream(f"the {name} stream", spec, LANES):
            return reason
    if value.axis != "token":
        return "the value stream is quantized along the channel; it takes values along the token"
    matrix = call.key_rebuild.matrix
    if (matrix is None or matrix.ndim == 3) and key.width != num_kv_heads * dim:
        return f"the key stream is {key.width} wide, and {num_kv_heads} heads of dimension {dim} are rebuilt one by one"
    if matrix is not None and call.key_rebuild.scale is not None:
        small, takes = eight_bits.name_of(matrix.dtype), chip.current().eight_bits
        if small is None or small != takes:
            multiplied = "bfloat16" if takes is None else f"bfloat16 and {takes}"
            return f"keys are rebuilt with a matrix of {matrix.dtype}; the matrix unit of this TPU takes {multiplied}"
        if reason := eight_bits.refuse_keys(small, key):
            return reason
    if matrix is not None and matrix.ndim == 2:
        dense = matrix.size * (1 if eight_bits.name_of(matrix.dtype) else 2)
        results = result_bytes(new * heads, value.width)
        if dense + results + WORKING_ROOM > chip.current().vmem * 7 // 8:
            return (
                f"the key rebuild matrix {matrix.shape} and the results of {new} new tokens take "
                f"{dense + results:,} bytes of vector memory, too many"
            )
    return None


def run(call: DecodeAttention) -> Part:
    """Attends with the kernel, one piece of a sequence's history for each core of the chip."""
    tiling = DecodeTiling.of(call)
    q, key_rebuild, history_blocks, geometry = call.q, call.key_rebuild, call.history_blocks, call.geometry
    positions = geometry.positions.astype(jnp.int32)
    window = jnp.asarray(geometry.sliding_window, jnp.int32)
    tile_tokens = tiling.tile * BLOCK
    oldest = jnp.maximum(geometry.earliest() - window + 1, 0)
    last = -(-history_blocks // tiling.tile)  # one past the last tile
    first = jnp.minimum(oldest // tile_tokens, jnp.maximum(last - 1, 0))
    steps = -(-(last - first) // tiling.splits)
    q, positions, history_blocks, skip, first, share = (
        jnp.repeat(x, tiling.splits, axis=0) for x in (q, positions, history_blocks, call.skip, first, steps)
    )
    first = first + share * (jnp.arange(tiling.pieces) % tiling.splits)
    seen = Seen(first, jnp.minimum(history_blocks, (first + share) * tiling.tile), skip, window[None])

    half_frequencies = jnp.zeros_like(geometry.frequencies) if tiling.rotated else geometry.frequencies
    frequencies = jnp.tile(half_frequencies, 2 * tiling.head_bundle)  # in the order of a bundle's columns
    place = np.concatenate([block * BLOCK + unpack.interleaved(tiling.ways) for block in range(tiling.turn)])
    weights = jnp.ones(tiling.dim) if key_rebuild.norm is None else key_rebuild.norm.astype(jnp.float32)
    inputs: dict[str, Any] = {
        "q": _queries(tiling, q, positions - (first * tile_tokens)[:, None], half_frequencies),
        "position": _row_positions(tiling, positions),
        "matrix": _matrix(tiling, key_rebuild.matrix),
    }
    if tiling.eight_bits:
        inputs |= rebuild8.inputs(tiling, key_rebuild, _columns)
    if key_rebuild.bias is not None:
        inputs["bias"] = _columns(tiling, key_rebuild.bias.astype(jnp.float32)[None])
    if tiling.norm_eps is not None:
        inputs["members"] = _members(tiling)
    if not tiling.rotated or key_rebuild.norm is not None:
        table = jnp.bfloat16 if tiling.chip.bf16_alu else jnp.float32
        wide = _columns(tiling, jnp.tile(weights, tiling.kv_heads)[None])[0]
        cos, sin = _tables(tiling, jnp.asarray(place), frequencies)
        sin = sin * jnp.roll(wide, tiling.width // 2)
        if tiling.sines_apart:
            sin = jnp.roll(sin, tiling.width // 2, axis=1)
        inputs["cos"], inputs["sin"] = (cos * wide).astype(table), sin.astype(table)
    if not tiling.rotated:
        # of a query: from the chunk before a tile, up to the next tile
        turns = BLOCK * (tiling.behind - jnp.arange(0, tiling.behind + tiling.tile + 1, tiling.turn))
        inputs["turn_cos"], inputs["turn_sin"] = (x[:, None] for x in _tables(tiling, turns, frequencies))
    out, lse = _call(tiling, inputs, call, seen, jnp.maximum(steps.max(), 1))
    part = _part(tiling, out, lse)
    return merge(*(Part(part.out[i :: tiling.splits], part.lse[i :: tiling.splits]) for i in range(tiling.splits)))


def _columns(tiling: DecodeTiling, x: Array) -> Array:
    """[rows, K d], head after head -> [K/g, rows, g d]: in a bundle, the first halves of all heads, then the second."""
    rows = x.shape[0]
    x = x.reshape(rows, tiling.bundles, tiling.head_bundle, 2, tiling.dim // 2)
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(tiling.bundles, rows, tiling.width)


def _matrix(tiling: DecodeTiling, matrix: Array | None) -> Array:
    """The rebuild matrix of each bundle, bfloat16 [K/g, channels, g d], or side by side [channels, K d] if dense (then
    in 8 bits too); the identity where keys are stored."""
    if tiling.dense:
        assert matrix is not None
        x = matrix if tiling.eight_bits else matrix.astype(jnp.bfloat16)
        x = x.reshape(-1, tiling.bundles, tiling.head_bundle, 2, tiling.dim // 2)
        return jnp.swapaxes(x, 2, 3).reshape(matrix.shape)  # nothing moves where a bundle is one head
    if matrix is None:
        matrix = jnp.broadcast_to(jnp.eye(tiling.dim), (tiling.kv_heads, tiling.dim, tiling.dim))
    per_bundle = matrix.astype(jnp.bfloat16).reshape(tiling.bundles, tiling.head_bundle, *matrix.shape[1:])
    diagonal = jnp.einsum("ngec,gh->ngehc", per_bundle, jnp.eye(tiling.head_bundle, dtype=jnp.bfloat16))
    diagonal = diagonal.reshape(tiling.bundles, tiling.bundle_channels, tiling.head_bundle, 2, tiling.dim // 2)
    return jnp.swapaxes(diagonal, 2, 3).reshape(tiling.bundles, tiling.bundle_channels, tiling.width)


def _queries(tiling: DecodeTiling, q: Array, relative: Array, frequencies: Array) -> Array:
    """Rotated by their distance to the first tile, float32 [pieces, K/g, rows of a bundle, g d]: each row has its own
    head's columns and zeros elsewhere. They are scaled so that scores are exponents of two."""
    q = rope.rotate_heads(q.astype(jnp.float32) * (tiling.scale * math.log2(math.e)), relative, frequencies)
    q = q.reshape(tiling.pieces, tiling.new, tiling.bundles, tiling.head_bundle, -1, 2, tiling.dim // 2)
    q = jnp.einsum("btngqsc,gh->bngtqshc", q, jnp.eye(tiling.head_bundle))
    q = q.reshape(tiling.pieces, tiling.bundles, tiling.bundle_rows, tiling.width)
    return jnp.pad(q, ((0, 0), (0, 0), (0, tiling.padded_rows - tiling.bundle_rows), (0, 0)))


def _row_positions(tiling: DecodeTiling, positions: Array) -> Array:
    """The position of every query, int32 [pieces, rows, 128], the same in all lanes; -1 where there is none."""
    per_head = jnp.repeat(positions, tiling.heads // tiling.kv_heads, axis=1)  # [B, T * H/K]
    rows = jnp.tile(per_head, (1, tiling.kv_heads))
    rows = jnp.pad(rows, ((0, 0), (0, tiling.rows - rows.shape[1])), constant_values=-1)
    return jnp.broadcast_to(rows[..., None], (tiling.pieces, tiling.rows, LANES))


def _members(tiling: DecodeTiling) -> Array:
    """Ones where a query's row has its head's columns, bfloat16 [rows of a bundle, g d]: sums a head's squares."""
    row, column = np.arange(tiling.padded_rows), np.arange(tiling.width)
    same = row[:, None] // tiling.head_rows == column[None] % (tiling.width // 2) // (tiling.dim // 2)
    return jnp.asarray(same, jnp.bfloat16)


def _tables(tiling: DecodeTiling, places: Array, frequencies: Array) -> tuple[Array, Array]:
    """Cosine and signed sine [places, g d]: rotated = x * cos + roll(x, g d / 2) * sin."""
    cos, sin = rope.rotation(places, frequencies)
    sign = np.repeat(np.asarray([-1, 1], np.float32), tiling.width // 2)
    return cos, sin * sign[None]


def _call(
    tiling: DecodeTiling,
    inputs: dict[str, Array],
    call: DecodeAttention,
    seen: Seen,
    steps: Array,
) -> tuple[Array, Array]:
    """The kernel, in so many steps for each piece."""
    arrays, specs, names = [], [], []

    def add(name: str, array: Array, spec: pl.BlockSpec) -> None:
        names.append(name)
        arrays.append(array)
        specs.append(spec)

    for name, array in inputs.items():
        if name in ("q", "position"):
            rest = array.shape[1:]
            add(name, array, pl.BlockSpec((None, *rest), lambda b, j, *_, rest=rest: (b, *(0 for _ in rest))))
        else:
            once = pl.Buffered(1)
            zeros = (0,) * array.ndim
            add(name, array, pl.BlockSpec(array.shape, lambda b, j, *_, zeros=zeros: zeros, pipeline_mode=once))

    def tile_of(rest: tuple[int, ...]) -> pl.BlockSpec:
        def index(b: Array, j: Array, layer: Any, first: Any, end: Any, *_: Any) -> tuple:
            tile = jnp.minimum(first[b] + j, jnp.maximum(tiles(end[b], tiling.tile) - 1, 0))
            return (layer[0], lax.div(b, jnp.int32(tiling.splits)), tile, *[0] * len(rest))

        return pl.BlockSpec((None, None, tiling.tile, *rest), index)

    streams = {"key": call.key_stream} | ({} if call.value_stream is None else {"value": call.value_stream})
    for name, stream in streams.items():
        for number, words in enumerate(stream.planes):
            add(f"{name}_words{number}", words, tile_of(words.shape[3:]))
        for what in ("scale", "zero"):
            array = by_block(getattr(stream, what), stream.spec.axis, leading=2)
            if array.shape[3] == 1:  # one group of channels: XLA would copy all of it to pad that axis
                array = array[:, :, :, 0]
            add(f"{name}_{what}", array, tile_of(array.shape[3:]))

    rows, cover, value_tiles = tiling.rows, tiling.cover, tiling.value_tiles
    tokens = max(tiling.chunks) * BLOCK
    token_groups = tiling.value.width // tiling.value.group
    scratch = {
        "turned": pltpu.VMEM((tiling.bundles, tiling.padded_rows, tiling.width), jnp.float32),
        "keys": _keys_scratch(tiling, tokens),
        "scores": pltpu.VMEM((rows, tokens), jnp.float32),
        "top": pltpu.VMEM((rows, LANES), jnp.float32),
        "total": pltpu.VMEM((rows, LANES), jnp.float32),
        "sums": pltpu.VMEM((value_tiles, cover, tiling.value_lanes), jnp.float32),
        "shifts": pltpu.VMEM((value_tiles, cover, LANES), jnp.float32),
        "value_scales": pltpu.VMEM((tiling.behind + tiling.tile, token_groups, LANES), jnp.float32),
        "value_zeros": pltpu.VMEM((tiling.behind + tiling.tile, token_groups, LANES), jnp.float32),
    }
    if not tiling.looped:
        for plane, words in enumerate(call.values.planes):
            scratch[f"words_behind{plane}"] = pltpu.VMEM((tiling.behind, *words.shape[3:]), jnp.uint32)
    if tiling.eight_bits:
        scratch |= rebuild8.scratch(tiling, tokens)
    else:
        for what in ("key_scales", "key_zeros"):  # rows that may be picked by a number known only when it runs
            if tiling.key.axis == "channel":
                scratch[what] = pltpu.VMEM((-(-tiling.tile // 2), 1, tiling.key.width), jnp.uint32)
            else:
                scratch[what] = pltpu.VMEM((tiling.tile, tiling.key_groups, 1, LANES), jnp.float32)
    if tiling.looped and not tiling.eight_bits:
        scratch["x"] = pltpu.VMEM((tokens // 2, tiling.key.width), jnp.uint32)  # likewise
    if tiling.sines_apart and "cos" in inputs:
        scratch["sines"] = scratch["keys"]
    if tiling.norm_eps is not None:
        scratch["squares"] = scratch["keys"]
    outputs = [
        jax.ShapeDtypeStruct((tiling.pieces, value_tiles, cover, tiling.value_lanes), jnp.float32),
        jax.ShapeDtypeStruct((tiling.pieces, rows, LANES), jnp.float32),
    ]
    out_specs = [
        pl.BlockSpec((None, value_tiles, cover, tiling.value_lanes), lambda b, j, *_: (b, 0, 0, 0)),
        pl.BlockSpec((None, rows, LANES), lambda b, j, *_: (b, 0, 0)),
    ]

    scalars = jnp.asarray(call.layer, jnp.int32).reshape(1), *(x.astype(jnp.int32) for x in seen)

    def body(*refs: Any) -> None:
        split = iter(refs[len(scalars) :])
        named = {name: next(split) for name in (*names, "out", "lse", *scratch)}
        if tiling.shared:
            named |= {name.replace("key", "value"): named[name] for name in names if name.startswith("key")}
        kernel(tiling, Seen(*refs[1 : len(scalars)]), named)

    return pl.pallas_call(
        body,
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tiling.pieces, steps),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiling.chip.vmem * 7 // 8
        ),
        name="decode_attention",
        interpret=pltpu.InterpretParams() if target.current().interpret else False,
    )(*scalars, *arrays)


def _part(tiling: DecodeTiling, out: Array, lse: Array) -> Part:
    """The kernel's rows as [pieces, T, H, C] and [pieces, T, H]."""
    count = tiling.kv_heads * tiling.head_rows

    def by_query(x: Array, rest: tuple[int, ...]) -> Array:
        x = x.reshape(tiling.pieces, tiling.kv_heads, tiling.new, -1, *rest)
        return jnp.moveaxis(x, 2, 1).reshape(tiling.pieces, tiling.new, tiling.heads, *rest)

    lse = by_query(lse[:, :count, 0], ())
    if tiling.value_heads == 1:
        wide = jnp.moveaxis(out[:, :, :count], 1, 2).reshape(tiling.pieces, count, tiling.value.width)
        return Part(by_query(wide, (tiling.value.width,)), lse)
    width = tiling.value.width // tiling.kv_heads
    heads = []
    for head in range(tiling.kv_heads):
        pieces, at = [], head * width
        while at < (head + 1) * width:
            tile, lane = divmod(at, tiling.value_lanes)
            size = min(tiling.value_lanes - lane, (head + 1) * width - at)
            start = head * tiling.head_rows - tiling.cover_start(tile)
            pieces.append(out[:, tile, start : start + tiling.head_rows, lane : lane + size])
            at += size
        heads.append(jnp.concatenate(pieces, axis=-1))
    return Part(by_query(jnp.concatenate(heads, axis=1), (width,)), lse)


def _keys_scratch(tiling: DecodeTiling, tokens: int) -> Any:
    """Room for rotated keys: bfloat16, in pairs where registers of it are twice as high as tiles in memory."""
    if tiling.chip.bf16_alu:
        return pltpu.VMEM((tiling.bundles, tokens // 2, tiling.width), jnp.uint32)
    return pltpu.VMEM((tiling.bundles, tokens, tiling.width), jnp.bfloat16)
