"""`decode_attention` for TPU: one kernel that reads packed blocks of one layer and attends to them.

A step of the grid takes a *tile* of up to 8 blocks of one sequence, and within it *chunks* of up to 2 blocks. For each
chunk and group of heads: codes -> x^ -> keys (matrix unit) -> RoPE -> scores; then, for all heads, softmax and the
product with the values' codes.

- A *group* is as many heads as are as wide as the matrix unit; their rebuild matrices stand on the diagonal of one.
  Its columns are ordered so that the first halves of all its heads come first: then RoPE is one roll by half the width.
- Rows are tokens in the order of `unpack.interleaved`; with a matrix of int8 (`rebuild8`) keys have another order, and
  the scores are permuted.
- Keys are rotated by their place in the chunk, with constant tables; queries by the distance to the chunk, which is
  turned on from chunk to chunk and from tile to tile. Where the vector unit is the narrower one (`Plan.sines_apart`),
  keys times cosine and keys times sine meet the queries and the queries' rolled halves apart: no key is rolled.
- Values are never scaled: their scale goes onto the probabilities, and what zero and `unpack.offset` add is the same
  for all channels of a group: one number per query.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import target
from pallas_kernels.operands import KeyRebuild
from pallas_kernels.pallas_tpu import rebuild8, unpack
from pallas_kernels.pallas_tpu.decode_attention_tiling import Plan, make_plan
from pallas_kernels.pallas_tpu.streams import LANES, by_block
from xquant_jax.numerics import rope
from xquant_jax.numerics.attention import LOWEST, Geometry, Part, merge
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import Blocks


def _tiles(blocks: Array, size: int) -> Array:
    """How many tiles hold so many blocks; both are never negative."""
    return lax.div(blocks + (size - 1), jnp.int32(size))


def decode_attention(
    q: Float[Array, "B T H d"],
    key_stream: Blocks,
    key_rebuild: KeyRebuild,
    value_stream: Blocks,
    history_blocks: Int[Array, " B"],
    geometry: Geometry,
    *,
    layer: Int[Array, ""] | int,
    num_kv_heads: int,
    value_heads: int,
) -> Part:
    """See `pallas_kernels.api.decode_attention`."""
    plan = make_plan(q, key_stream, key_rebuild, value_stream, geometry, num_kv_heads, value_heads)
    return _attend(
        plan, q, key_stream, key_rebuild, value_stream, history_blocks, geometry, jnp.asarray(layer, jnp.int32)
    )


def _attend(
    plan: Plan,
    q: Array,
    key_stream: Blocks,
    key_rebuild: KeyRebuild,
    value_stream: Blocks,
    history_blocks: Array,
    geometry: Geometry,
    layer: Array,
) -> Part:
    positions = geometry.positions.astype(jnp.int32)
    window = jnp.asarray(geometry.sliding_window, jnp.int32)
    tile_tokens = plan.tile * BLOCK
    oldest = jnp.maximum(positions.min(axis=1) - window + 1, 0)
    last = -(-history_blocks // plan.tile)  # one past the last tile
    first = jnp.minimum(oldest // tile_tokens, jnp.maximum(last - 1, 0))
    steps = -(-(last - first) // plan.splits)
    q, positions, history_blocks, first, share = (
        jnp.repeat(x, plan.splits, axis=0) for x in (q, positions, history_blocks.astype(jnp.int32), first, steps)
    )
    first = first + share * (jnp.arange(plan.pieces) % plan.splits)
    end = jnp.minimum(history_blocks, (first + share) * plan.tile)

    half_frequencies = jnp.zeros_like(geometry.frequencies) if plan.rotated else geometry.frequencies
    frequencies = jnp.tile(half_frequencies, 2 * plan.group)  # in the order of a group's columns
    place = np.concatenate([block * BLOCK + unpack.interleaved(plan.ways) for block in range(plan.turn)])
    weights = jnp.ones(plan.dim) if key_rebuild.norm is None else key_rebuild.norm.astype(jnp.float32)
    inputs: dict[str, Any] = {
        "q": _queries(plan, q, positions - (first * tile_tokens)[:, None], half_frequencies),
        "position": _row_positions(plan, positions),
        "matrix": _matrix(plan, key_rebuild.matrix),
    }
    if plan.eight_bits:
        inputs |= rebuild8.inputs(plan, key_rebuild, _columns)
    if key_rebuild.bias is not None:
        inputs["bias"] = _columns(plan, key_rebuild.bias.astype(jnp.float32)[None])
    if plan.norm_eps is not None:
        inputs["members"] = _members(plan)
    if not plan.rotated or key_rebuild.norm is not None:
        table = jnp.bfloat16 if plan.chip.bf16_alu else jnp.float32
        wide = _columns(plan, jnp.tile(weights, plan.kv_heads)[None])[0]
        cos, sin = _tables(plan, jnp.asarray(place), frequencies)
        sin = sin * jnp.roll(wide, plan.width // 2)
        if plan.sines_apart:
            sin = jnp.roll(sin, plan.width // 2, axis=1)
        inputs["cos"], inputs["sin"] = (cos * wide).astype(table), sin.astype(table)
    if not plan.rotated:
        turns = -plan.turn * BLOCK * jnp.arange(plan.tile // plan.turn + 1)  # of a query; the last, to the next tile
        inputs["turn_cos"], inputs["turn_sin"] = (x[:, None] for x in _tables(plan, turns, frequencies))
    out, lse = _call(plan, inputs, key_stream, value_stream, layer, end, first, window, jnp.maximum(steps.max(), 1))
    part = _part(plan, out, lse)
    return merge(*(Part(part.out[i :: plan.splits], part.lse[i :: plan.splits]) for i in range(plan.splits)))


def _columns(plan: Plan, x: Array) -> Array:
    """[rows, K d], head after head -> [K/g, rows, g d]: in a group, the first halves of all heads, then the second."""
    rows = x.shape[0]
    x = x.reshape(rows, plan.groups, plan.group, 2, plan.dim // 2)
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(plan.groups, rows, plan.width)


def _matrix(plan: Plan, matrix: Array | None) -> Array:
    """The rebuild matrix of each group, bfloat16 [K/g, channels, g d], or side by side [channels, K d] if dense (then
    in 8 bits too); the identity where keys are stored."""
    if plan.dense:
        assert matrix is not None
        x = matrix if plan.eight_bits else matrix.astype(jnp.bfloat16)
        x = x.reshape(-1, plan.groups, plan.group, 2, plan.dim // 2)
        return jnp.swapaxes(x, 2, 3).reshape(matrix.shape)  # nothing moves where a group is one head
    if matrix is None:
        matrix = jnp.broadcast_to(jnp.eye(plan.dim), (plan.kv_heads, plan.dim, plan.dim))
    per_group = matrix.astype(jnp.bfloat16).reshape(plan.groups, plan.group, *matrix.shape[1:])
    diagonal = jnp.einsum("ngec,gh->ngehc", per_group, jnp.eye(plan.group, dtype=jnp.bfloat16))
    diagonal = diagonal.reshape(plan.groups, plan.group_channels, plan.group, 2, plan.dim // 2)
    return jnp.swapaxes(diagonal, 2, 3).reshape(plan.groups, plan.group_channels, plan.width)


def _queries(plan: Plan, q: Array, relative: Array, frequencies: Array) -> Array:
    """Rotated by their distance to the first tile, float32 [pieces, K/g, rows of a group, g d]: each row has its own
    head's columns and zeros elsewhere."""
    q = rope.rotate_heads(q.astype(jnp.float32), relative, frequencies)
    q = q.reshape(plan.pieces, plan.new, plan.groups, plan.group, -1, 2, plan.dim // 2)
    q = jnp.einsum("btngqsc,gh->bngtqshc", q, jnp.eye(plan.group))
    q = q.reshape(plan.pieces, plan.groups, plan.group_rows, plan.width)
    return jnp.pad(q, ((0, 0), (0, 0), (0, plan.padded_rows - plan.group_rows), (0, 0)))


def _row_positions(plan: Plan, positions: Array) -> Array:
    """The position of every query, int32 [pieces, rows, 128], the same in all lanes; -1 where there is none."""
    per_head = jnp.repeat(positions, plan.heads // plan.kv_heads, axis=1)  # [B, T * H/K]
    rows = jnp.tile(per_head, (1, plan.kv_heads))
    rows = jnp.pad(rows, ((0, 0), (0, plan.rows - rows.shape[1])), constant_values=-1)
    return jnp.broadcast_to(rows[..., None], (plan.pieces, plan.rows, LANES))


def _members(plan: Plan) -> Array:
    """Ones where a query's row has its head's columns, bfloat16 [rows of a group, g d]: sums a head's squares."""
    row, column = np.arange(plan.padded_rows), np.arange(plan.width)
    same = row[:, None] // plan.head_rows == column[None] % (plan.width // 2) // (plan.dim // 2)
    return jnp.asarray(same, jnp.bfloat16)


def _tables(plan: Plan, places: Array, frequencies: Array) -> tuple[Array, Array]:
    """Cosine and signed sine [places, g d]: rotated = x * cos + roll(x, g d / 2) * sin."""
    cos, sin = rope.rotation(places, frequencies)
    sign = np.repeat(np.asarray([-1, 1], np.float32), plan.width // 2)
    return cos, sin * sign


def _call(
    plan: Plan,
    inputs: dict[str, Array],
    key_stream: Blocks,
    value_stream: Blocks,
    layer: Array,
    end: Array,
    first: Array,
    window: Array,
    steps: Array,
) -> tuple[Array, Array]:
    """The kernel: piece b attends to its tiles from `first[b]` up to block `end[b]`."""
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
        def index(b: Array, j: Array, layer: Any, end: Any, first: Any, window: Any) -> tuple:
            tile = jnp.minimum(first[b] + j, jnp.maximum(_tiles(end[b], plan.tile) - 1, 0))
            return (layer[0], lax.div(b, jnp.int32(plan.splits)), tile, *[0] * len(rest))

        return pl.BlockSpec((None, None, plan.tile, *rest), index)

    streams = {"key": key_stream} if plan.shared else {"key": key_stream, "value": value_stream}
    for name, stream in streams.items():
        for number, words in enumerate(stream.planes):
            add(f"{name}_words{number}", words, tile_of(words.shape[3:]))
        for what in ("scale", "zero"):
            array = by_block(getattr(stream, what), stream.spec.axis, leading=2)
            if array.shape[3] == 1:  # one group of channels: XLA would copy all of it to pad that axis
                array = array[:, :, :, 0]
            add(f"{name}_{what}", array, tile_of(array.shape[3:]))

    rows, cover, tiles = plan.rows, plan.cover, plan.value_tiles
    tokens = max(plan.chunks) * BLOCK
    token_groups = plan.value.width // plan.value.group
    scratch = {
        "turned": pltpu.VMEM((plan.groups, plan.padded_rows, plan.width), jnp.float32),
        "keys": _keys_scratch(plan, tokens),
        "scores": pltpu.VMEM((rows, tokens), jnp.float32),
        "top": pltpu.VMEM((rows, LANES), jnp.float32),
        "total": pltpu.VMEM((rows, LANES), jnp.float32),
        "sums": pltpu.VMEM((tiles, cover, plan.value_lanes), jnp.float32),
        "shifts": pltpu.VMEM((tiles, cover, LANES), jnp.float32),
        "value_scales": pltpu.VMEM((plan.tile, token_groups, LANES), jnp.float32),
        "value_zeros": pltpu.VMEM((plan.tile, token_groups, LANES), jnp.float32),
    }
    if plan.eight_bits:
        scratch |= rebuild8.scratch(plan, tokens)
    else:
        for what in ("key_scales", "key_zeros"):  # rows that may be picked by a number known only when it runs
            by_row = (1, plan.key.width) if plan.key.axis == "channel" else (plan.key_groups, 1, LANES)
            scratch[what] = pltpu.VMEM((plan.tile, *by_row), jnp.float32)
    if plan.looped and not plan.eight_bits:
        scratch["x"] = pltpu.VMEM((tokens // 2, plan.key.width), jnp.uint32)  # likewise
    if plan.sines_apart and "cos" in inputs:
        scratch["sines"] = scratch["keys"]
    if plan.norm_eps is not None:
        scratch["squares"] = scratch["keys"]
    outputs = [
        jax.ShapeDtypeStruct((plan.pieces, tiles, cover, plan.value_lanes), jnp.float32),
        jax.ShapeDtypeStruct((plan.pieces, rows, LANES), jnp.float32),
    ]
    out_specs = [
        pl.BlockSpec((None, tiles, cover, plan.value_lanes), lambda b, j, *_: (b, 0, 0, 0)),
        pl.BlockSpec((None, rows, LANES), lambda b, j, *_: (b, 0, 0)),
    ]

    def kernel(layer: Any, end: Any, first: Any, window: Any, *refs: Any) -> None:
        del layer
        split = iter(refs)
        named = {name: next(split) for name in (*names, "out", "lse", *scratch)}
        if plan.shared:
            named |= {name.replace("key", "value"): named[name] for name in names if name.startswith("key")}
        _kernel(plan, end, first, window, named)

    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(plan.pieces, steps),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.chip.vmem * 7 // 8
        ),
        name="decode_attention",
        interpret=pltpu.InterpretParams() if target.current().interpret else False,
    )(layer.reshape(1), end, first.astype(jnp.int32), window.reshape(1), *arrays)


def _part(plan: Plan, out: Array, lse: Array) -> Part:
    """The kernel's rows as [pieces, T, H, C] and [pieces, T, H]."""
    count = plan.kv_heads * plan.head_rows

    def by_query(x: Array, rest: tuple[int, ...]) -> Array:
        x = x.reshape(plan.pieces, plan.kv_heads, plan.new, -1, *rest)
        return jnp.moveaxis(x, 2, 1).reshape(plan.pieces, plan.new, plan.heads, *rest)

    lse = by_query(lse[:, :count, 0], ())
    if plan.value_heads == 1:
        wide = jnp.moveaxis(out[:, :, :count], 1, 2).reshape(plan.pieces, count, plan.value.width)
        return Part(by_query(wide, (plan.value.width,)), lse)
    width = plan.value.width // plan.kv_heads
    heads = []
    for head in range(plan.kv_heads):
        pieces, at = [], head * width
        while at < (head + 1) * width:
            tile, lane = divmod(at, plan.value_lanes)
            size = min(plan.value_lanes - lane, (head + 1) * width - at)
            start = head * plan.head_rows - plan.cover_start(tile)
            pieces.append(out[:, tile, start : start + plan.head_rows, lane : lane + size])
            at += size
        heads.append(jnp.concatenate(pieces, axis=-1))
    return Part(by_query(jnp.concatenate(heads, axis=1), (width,)), lse)


def _kernel(plan: Plan, end_ref: Any, first_ref: Any, window_ref: Any, refs: dict[str, Any]) -> None:
    b, j = pl.program_id(0), pl.program_id(1)
    end, tile = end_ref[b], first_ref[b] + j

    @pl.when(j == 0)
    def _start() -> None:
        refs["turned"][...] = refs["q"][...]
        refs["top"][...] = jnp.full_like(refs["top"], LOWEST)
        for name in ("total", "sums", "shifts"):
            refs[name][...] = jnp.zeros_like(refs[name])

    count = jnp.minimum(end - tile * plan.tile, plan.tile)  # blocks of this tile that exist

    @pl.when(count > 0)
    def _tile() -> None:
        _read_scales(plan, count, refs)

        def chunk(size: int, number: Array) -> None:
            _chunk(plan, size, number * size, tile * plan.tile, end, window_ref[0], refs)

        large, small = plan.chunks
        done = jnp.int32(0)
        if large > small:
            whole = lax.div(count, jnp.int32(large))
            lax.fori_loop(0, whole, lambda i, _: chunk(large, i), None)
            done = whole * (large // small)
        lax.fori_loop(done, _tiles(count, small), lambda i, _: chunk(small, i), None)
        if not plan.rotated:
            refs["turned"][...] = _turn(plan, refs["turned"][...], plan.tile // plan.turn, refs)

    @pl.when(j == pl.num_programs(1) - 1)
    def _finish() -> None:
        total = jnp.sum(refs["total"][...], axis=1, keepdims=True)
        refs["lse"][...] = refs["top"][...] + jnp.log(jnp.broadcast_to(total, refs["top"].shape))
        for tile in range(plan.value_tiles):
            start = plan.cover_start(tile)
            rows = total[start : start + plan.cover]
            sums = refs["sums"][tile] + jnp.sum(refs["shifts"][tile], axis=1, keepdims=True)
            refs["out"][tile] = sums / jnp.where(rows > 0, rows, 1.0)


def _read_scales(plan: Plan, count: Array, refs: dict[str, Any]) -> None:
    """Scales of a tile as float32; those of values in the order of unpacked rows, and zero where no block exists."""
    token, lane = (lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    order = (token == unpack.token_of(lane, 2)).astype(jnp.bfloat16)
    for what in ("scale", "zero"):
        if plan.key.axis == "channel":
            for block in range(plan.tile):
                refs[f"key_{what}s"][block] = refs[f"key_{what}"][block : block + 1].astype(jnp.float32)
        elif not plan.eight_bits:
            by_group = refs[f"key_{what}"][...].astype(jnp.float32)
            refs[f"key_{what}s"][...] = by_group.reshape(plan.tile, -1, 1, LANES)
        given = refs[f"value_{what}"][...].astype(jnp.float32).reshape(plan.tile, -1, LANES)
        flat = given.reshape(-1, LANES).astype(jnp.bfloat16)
        ordered = jnp.dot(flat, order, preferred_element_type=jnp.float32).reshape(given.shape)
        block = lax.broadcasted_iota(jnp.int32, given.shape, 0)
        refs[f"value_{what}s"][...] = jnp.where(block < count, ordered, 0.0)


def _chunk(plan: Plan, size: int, block: Array, tile: Array, end: Array, window: Array, refs: dict[str, Any]) -> None:
    """Attends to `size` blocks from `block` of the tile that begins with block `tile` of the sequence."""
    channels = plan.group_channels

    if plan.eight_bits:
        rebuild8.read(plan, size, block, refs)
        lax.fori_loop(0, plan.groups, lambda n, _: _rebuild(plan, size, block, n, None, refs), None, unroll=plan.unroll)
    elif plan.looped:

        def strip(number: Array, _: None) -> None:
            lanes = pl.ds(pl.multiple_of(number * LANES, LANES), LANES)
            for i in range(size):
                x = _dequantized(plan, block + i, lanes.start, LANES, refs)
                refs["x"][i * unpack.PAIRS : (i + 1) * unpack.PAIRS, lanes] = pltpu.bitcast(x, jnp.uint32)

        def rebuild(n: Array, _: None) -> None:
            x = [pltpu.bitcast(refs["x"][i * unpack.PAIRS : (i + 1) * unpack.PAIRS], jnp.bfloat16) for i in range(size)]
            _rebuild(plan, size, block, n, x, refs)

        lax.fori_loop(0, plan.key.width // LANES, strip, None)
        lax.fori_loop(0, plan.groups, rebuild, None)
    else:
        x = []
        for n in range(plan.groups):
            if n == 0 or not plan.dense:
                x = [_dequantized(plan, block + i, n * channels, channels, refs) for i in range(size)]
            _rebuild(plan, size, block, n, x, refs)
    for n in range(plan.groups):
        _score(plan, size, block, n, refs)
    probability, shrunk = _softmax(plan, size, tile + block, end, window, refs)
    for value_tile in range(plan.value_tiles):
        _weigh(plan, size, block, value_tile, probability, shrunk, refs)


def _dequantized(plan: Plan, block: Array, first: Any, channels: int, refs: dict[str, Any]) -> Array:
    """Some channels of a block of the key stream, bfloat16 [128, channels], rows interleaved."""
    key, lanes = plan.key, pl.ds(first, channels)
    planes = [refs[f"key_words{n}"][block, :, lanes] for n in range(len(PLANES[key.bits]))]
    if key.axis == "channel":
        scale, zero = (refs[f"key_{what}s"][block, :, lanes] for what in ("scale", "zero"))
        return unpack.scaled_along_channels(planes, key.bits, scale, zero, bf16_alu=plan.chip.bf16_alu)
    scales = []
    for lane in range(0, channels, min(key.group, channels)):
        group = (first + lane) // key.group if isinstance(first, int) else lax.div(first, jnp.int32(key.group))
        scales.append(unpack.columns(*(refs[f"key_{what}s"][block, group] for what in ("scale", "zero"))))
    return unpack.scaled_along_tokens(planes, key.bits, scales)


def _rebuild(
    plan: Plan, size: int, block: Array, n: Array | int, blocks: list[Array] | None, refs: dict[str, Any]
) -> None:
    """Keys of a group to scratch, rotated by their place, and the inverse of their norms. `blocks`: x^ of the `size`
    blocks from `block` of the tile, unless codes are multiplied."""
    step = min(size, plan.turn)
    if step == plan.turn:
        places = slice(None)
    else:  # a chunk within a turn
        places = pl.ds(pl.multiple_of(lax.rem(block, jnp.int32(plan.turn)) * BLOCK, BLOCK), step * BLOCK)
    column = n * plan.width if isinstance(n, int) else pl.multiple_of(n * plan.width, plan.width)
    if blocks is None:
        products = iter([rebuild8.product(plan, size, n, column, refs)])
    else:
        matrix = refs["matrix"][:, pl.ds(column, plan.width)] if plan.dense else refs["matrix"][n]
        chunks = (blocks[first : first + step] for first in range(0, size, step))
        products = (jnp.dot(jnp.concatenate(x), matrix, preferred_element_type=jnp.float32) for x in chunks)
    for number, k in enumerate(products):
        first = number * step
        if plan.bias:
            k = k + refs["bias"][n]
        if plan.norm_eps is not None:
            _to_scratch(plan, refs["squares"], n, first, (k * k).astype(jnp.bfloat16))
        if "cos" in refs:
            if plan.chip.bf16_alu:
                k = k.astype(jnp.bfloat16)
            sine = (k if plan.sines_apart else pltpu.roll(k, plan.width // 2, 1)) * refs["sin"][places]
            k = k * refs["cos"][places]
            if plan.sines_apart:
                _to_scratch(plan, refs["sines"], n, first, sine.astype(jnp.bfloat16))
            else:
                k = k + sine
        _to_scratch(plan, refs["keys"], n, first, k.astype(jnp.bfloat16))


def _keys_scratch(plan: Plan, tokens: int) -> Any:
    """Room for rotated keys: bfloat16, in pairs where registers of it are twice as high as tiles in memory."""
    if plan.chip.bf16_alu:
        return pltpu.VMEM((plan.groups, tokens // 2, plan.width), jnp.uint32)
    return pltpu.VMEM((plan.groups, tokens, plan.width), jnp.bfloat16)


def _to_scratch(plan: Plan, ref: Any, n: Array | int, first: int, k: Array) -> None:
    """Keys from block `first` of a chunk on."""
    if plan.chip.bf16_alu:
        k = pltpu.bitcast(k, jnp.uint32)
    row = first * (unpack.PAIRS if plan.chip.bf16_alu else BLOCK)
    ref[n, row : row + k.shape[0]] = k


def _from_scratch(plan: Plan, ref: Any, n: int, first: int, size: int) -> Array:
    """`size` blocks, bfloat16."""
    if plan.chip.bf16_alu:
        return pltpu.bitcast(ref[n, first * unpack.PAIRS : (first + size) * unpack.PAIRS], jnp.bfloat16)
    return ref[n, first * BLOCK : (first + size) * BLOCK]


def _score(plan: Plan, size: int, block: Array, n: int, refs: dict[str, Any]) -> None:
    """Products of a group's queries and keys to scratch."""
    step = min(size, plan.turn)
    for first in range(0, size, step):
        q = refs["turned"][n]
        if not plan.rotated:
            q = _turn(plan, q, lax.div(block, jnp.int32(plan.turn)) + first // plan.turn, refs)
        tokens = slice(first * BLOCK, (first + step) * BLOCK)
        scores = _dot_transposed(q.astype(jnp.bfloat16), _from_scratch(plan, refs["keys"], n, first, step))
        if "sines" in refs:
            q = pltpu.roll(q, plan.width // 2, 1)
            scores += _dot_transposed(q.astype(jnp.bfloat16), _from_scratch(plan, refs["sines"], n, first, step))
        if plan.norm_eps is not None:  # a key's norm is one number: it divides the scores
            squares = _dot_transposed(refs["members"][...], _from_scratch(plan, refs["squares"], n, first, step))
            scores = scores * lax.rsqrt(squares / plan.dim + plan.norm_eps)
        refs["scores"][n * plan.group_rows : (n + 1) * plan.group_rows, tokens] = scores[: plan.group_rows]


def _dot_transposed(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _turn(plan: Plan, q: Array, by: Array | int, refs: dict[str, Any]) -> Array:
    """Rotates queries towards later keys, by `by` times `plan.turn` blocks."""
    cos, sin = (refs[f"turn_{what}"][by] for what in ("cos", "sin"))
    return q * cos + pltpu.roll(q, plan.width // 2, q.ndim - 1) * sin


def _softmax(
    plan: Plan, size: int, block: Array, end: Array, window: Array, refs: dict[str, Any]
) -> tuple[list[Array], Array]:
    """Probabilities relative to the running maximum, float32 [rows, 128] for each block of a chunk, and what the sums
    so far shrink by."""
    token = unpack.token_of(lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1), 2)
    row, column = (lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    reorder = (unpack.token_of(row, plan.ways) == unpack.token_of(column, 2)).astype(jnp.float32)
    scores = []
    for i in range(size):
        distance = refs["position"][...] - (token + (block + i) * BLOCK)
        seen = (distance >= 0) & (distance < window) & (block + i < end)
        score = refs["scores"][:, i * BLOCK : (i + 1) * BLOCK] * plan.scale
        if plan.ways == 4:  # from the keys' order to that of the values
            score = jnp.dot(score, reorder, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        scores.append(jnp.where(seen, score, -jnp.inf))
    largest = functools.reduce(jnp.maximum, scores)
    before = refs["top"][...]
    top = jnp.maximum(before, jnp.max(largest, axis=1, keepdims=True))
    probability = [jnp.exp(score - top) for score in scores]
    shrunk = jnp.exp(before - top)
    refs["top"][...] = top
    refs["total"][...] = refs["total"][...] * shrunk + functools.reduce(jnp.add, probability)
    return probability, shrunk


def _weigh(
    plan: Plan,
    size: int,
    block: Array,
    tile: int,
    probability: list[Array],
    shrunk: Array,
    refs: dict[str, Any],
) -> None:
    """Adds a chunk's probabilities times a tile of its values."""
    rows = slice(plan.cover_start(tile), plan.cover_start(tile) + plan.cover)
    lanes = slice(tile * plan.value_lanes, (tile + 1) * plan.value_lanes)
    bits = plan.value.bits
    shrunk = shrunk[rows]
    weights, values = [], []
    shift = refs["shifts"][tile] * shrunk
    for i in range(size):
        planes = [refs[f"value_words{n}"][block + i, :, lanes] for n in range(len(PLANES[bits]))]
        values.append(unpack.numbers(planes, bits))
        scale, zero = (_row_scales(plan, tile, refs[f"value_{what}"], block + i) for what in ("scales", "zeros"))
        weight = (probability[i][rows] * scale).astype(jnp.bfloat16)
        weights.append(weight)
        shift = shift + probability[i][rows] * zero - unpack.offset(bits) * weight.astype(jnp.float32)
    refs["shifts"][tile] = shift
    weight, value = jnp.concatenate(weights, axis=1), jnp.concatenate(values, axis=0)
    product = jnp.dot(weight, value, preferred_element_type=jnp.float32)
    widened = jnp.concatenate([shrunk] * (plan.value_lanes // LANES), axis=1)
    refs["sums"][tile] = refs["sums"][tile] * widened + product


def _row_scales(plan: Plan, tile: int, scales: Any, block: Array) -> Array:
    """Scales (or zeros) of the values that each row reads in a tile, one for each token: [1 or cover, 128]."""
    first, last = tile * plan.value_lanes, (tile + 1) * plan.value_lanes
    lowest = first // plan.value.group
    scale = scales[block, lowest : lowest + 1]
    row = plan.cover_start(tile) + lax.broadcasted_iota(jnp.int32, (plan.cover, LANES), 0)
    for group in range(lowest + 1, (last - 1) // plan.value.group + 1):
        start = plan.readers(group * plan.value.group, last)[0] * plan.head_rows
        scale = jnp.where(row < start, scale, scales[block, group : group + 1])
    return scale
