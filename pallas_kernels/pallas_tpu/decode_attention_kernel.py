"""The kernel of `decode_attention` for TPU; `decode_attention` says how it works and hands over what it reads."""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.pallas_tpu import rebuild8, unpack
from pallas_kernels.pallas_tpu.decode_attention_tiling import DecodeTiling
from pallas_kernels.pallas_tpu.streams import LANES
from xquant_jax.numerics.attention import AFTER_ALL, LOWEST
from xquant_jax.numerics.packing import BLOCK, PLANES


def tiles(blocks: Array, size: int) -> Array:
    """How many tiles hold so many blocks; both are never negative."""
    return lax.div(blocks + (size - 1), jnp.int32(size))


class Seen(NamedTuple):
    """What each piece attends to, int32 [pieces]: from tile `first` up to block `end`, but for the first `skip` tokens
    of its sequence; and the sliding window of all, int32 [1]."""

    first: Any
    end: Any
    skip: Any
    window: Any


class History(NamedTuple):
    """What of a sequence is seen, as scalars: blocks of all its tiles from `first` up to `end`, of which this tile has
    those from `tile` on; tokens within the sliding window, and those that are not skipped."""

    first: Array
    end: Array
    tile: Array
    window: Array
    skip: Array


def kernel(tiling: DecodeTiling, seen: Seen, refs: dict[str, Any]) -> None:
    b, j = pl.program_id(0), pl.program_id(1)
    end, tile = seen.end[b], seen.first[b] + j

    @pl.when(j == 0)
    def _start() -> None:
        refs["turned"][...] = refs["q"][...]
        refs["top"][...] = jnp.full_like(refs["top"], LOWEST)
        for name in ("total", "sums", "shifts", "value_scales", "value_zeros"):
            refs[name][...] = jnp.zeros_like(refs[name])

    history = History(seen.first[b] * tiling.tile, end, tile * tiling.tile, seen.window[0], seen.skip[b])
    count = jnp.minimum(end - history.tile, tiling.tile)  # blocks of this tile that exist

    @pl.when(count > 0)
    def _tile() -> None:
        _read_scales(tiling, count, refs)
        if tiling.looped:
            _one_after_another(tiling, count, history, refs)
        else:
            _pipelined(tiling, count, history, refs)
        if not tiling.rotated:
            refs["turned"][...] = _turn(tiling, refs["turned"][...], tiling.tile, refs)

    @pl.when(j == pl.num_programs(1) - 1)
    def _finish() -> None:
        total = jnp.sum(refs["total"][...], axis=1, keepdims=True)
        refs["lse"][...] = refs["top"][...] * math.log(2) + jnp.log(jnp.broadcast_to(total, refs["top"].shape))
        for tile in range(tiling.value_tiles):
            start = tiling.cover_start(tile)
            rows = total[start : start + tiling.cover]
            sums = refs["sums"][tile] + jnp.sum(refs["shifts"][tile], axis=1, keepdims=True)
            refs["out"][tile] = sums / jnp.where(rows > 0, rows, 1.0)


def _read_scales(tiling: DecodeTiling, count: Array, refs: dict[str, Any]) -> None:
    """Scales of a tile as float32; those of values in the order of unpacked rows, and zero where no block exists."""
    token, lane = (lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    order = (token == unpack.token_of(lane, 2)).astype(jnp.bfloat16)
    for what in ("scale", "zero"):
        if tiling.key.axis == "channel":
            rows = refs[f"key_{what}"][...]
            if tiling.tile % 2:
                rows = jnp.concatenate([rows, rows[-1:]])
            refs[f"key_{what}s"][...] = pltpu.bitcast(rows, jnp.uint32)[:, None]
        elif not tiling.eight_bits:
            by_group = refs[f"key_{what}"][...].astype(jnp.float32)
            refs[f"key_{what}s"][...] = by_group.reshape(tiling.tile, -1, 1, LANES)
        given = refs[f"value_{what}"][...].astype(jnp.float32).reshape(tiling.tile, -1, LANES)
        flat = given.reshape(-1, LANES).astype(jnp.bfloat16)
        ordered = jnp.dot(flat, order, preferred_element_type=jnp.float32).reshape(given.shape)
        block = lax.broadcasted_iota(jnp.int32, given.shape, 0)
        scales = refs[f"value_{what}s"]
        if tiling.behind:
            scales[: tiling.behind] = scales[tiling.tile :]
        scales[tiling.behind :] = jnp.where(block < count, ordered, 0.0)


def _one_after_another(tiling: DecodeTiling, count: Array, history: History, refs: dict[str, Any]) -> None:
    """Attends to the tile's chunks, each from its codes to its values; the last few blocks are smaller chunks."""

    def chunk(size: int, number: Array) -> None:
        _rebuild_in_loop(tiling, size, number * size, refs)
        for n in range(tiling.bundles):
            _score(tiling, size, number * size, n, refs)
        _attend(tiling, size, number * size, history, refs)

    large, small = tiling.chunks
    done = jnp.int32(0)
    if large > small:
        whole = lax.div(count, jnp.int32(large))
        lax.fori_loop(0, whole, lambda i, _: chunk(large, i), None)
        done = whole * (large // small)
    lax.fori_loop(done, tiles(count, small), lambda i, _: chunk(small, i), None)


def _pipelined(tiling: DecodeTiling, count: Array, history: History, refs: dict[str, Any]) -> None:
    """Rebuilds keys of the tile's chunks, each beside the scores and values of the chunk before it, which for the first
    is the last of the tile before. Blocks that do not exist are masked."""
    size, channels = tiling.chunks[0], tiling.bundle_channels

    def step(number: Array, _: None) -> None:
        block = number * size
        x = []
        for n in range(tiling.bundles):
            if n == 0 or not tiling.dense:
                x = _dequantized(tiling, size, block, n * channels, channels, refs)
            _rebuild(tiling, size, block, n, x, refs)
            if n + 1 < tiling.bundles:
                _score(tiling, size, block - size, n + 1, refs)
        probability, shrunk = _softmax(tiling, size, history.tile + block - size, history, refs)
        _score(tiling, size, block, 0, refs)  # these keys are there, and the matrix units have nothing else to do
        _weigh_all(tiling, size, block - size, probability, shrunk, refs)
        for plane in range(len(PLANES[tiling.value.bits])):
            refs[f"words_behind{plane}"][...] = refs[f"value_words{plane}"][pl.ds(block, size)]

    steps = tiles(count, size)
    lax.fori_loop(0, steps, step, None)

    @pl.when(history.tile + tiling.tile >= history.end)
    def _drain() -> None:
        for n in range(1, tiling.bundles):
            _score(tiling, size, (steps - 1) * size, n, refs)
        _attend(tiling, size, (steps - 1) * size, history, refs)


def _rebuild_in_loop(tiling: DecodeTiling, size: int, block: Array, refs: dict[str, Any]) -> None:
    """Keys of `size` blocks from `block` of the tile to scratch, a loop over bundles."""
    if tiling.eight_bits:
        rebuild8.read(tiling, size, block, refs)

        def multiply(n: Array, _: None) -> None:
            _rebuild(tiling, size, block, n, None, refs)

        lax.fori_loop(0, tiling.bundles, multiply, None, unroll=tiling.unroll)
        return

    def strip(number: Array, _: None) -> None:
        lanes = pl.ds(pl.multiple_of(number * LANES, LANES), LANES)
        for i, x in enumerate(_dequantized(tiling, size, block, lanes.start, LANES, refs)):
            refs["x"][i * unpack.PAIRS : (i + 1) * unpack.PAIRS, lanes] = pltpu.bitcast(x, jnp.uint32)

    def rebuild(n: Array, _: None) -> None:
        x = [pltpu.bitcast(refs["x"][i * unpack.PAIRS : (i + 1) * unpack.PAIRS], jnp.bfloat16) for i in range(size)]
        _rebuild(tiling, size, block, n, x, refs)

    lax.fori_loop(0, tiling.key.width // LANES, strip, None)
    lax.fori_loop(0, tiling.bundles, rebuild, None)


def _attend(tiling: DecodeTiling, size: int, block: Array, history: History, refs: dict[str, Any]) -> None:
    """From scores to sums of values, of `size` blocks from `block` of the tile."""
    probability, shrunk = _softmax(tiling, size, history.tile + block, history, refs)
    _weigh_all(tiling, size, block, probability, shrunk, refs)


def _scale_row(scales: Any, block: Array, lanes: Any, odd: Any) -> Array:
    """A block's scales or zeros, float32 [1, channels], out of words that two blocks share; odd: whether it is the
    second of them."""
    words = scales[lax.div(block, jnp.int32(2)), :, lanes]
    low, high = words << 16, words & jnp.uint32(0xFFFF0000)
    return pltpu.bitcast((high if odd else low) if isinstance(odd, bool) else jnp.where(odd, high, low), jnp.float32)


def _dequantized(
    tiling: DecodeTiling, size: int, block: Array, first: Any, channels: int, refs: dict[str, Any]
) -> list[Array]:
    """Some channels of `size` blocks of the key stream, each bfloat16 [128, channels], rows interleaved."""
    # a chunk of an even number of blocks begins with one of even number
    odd = [i % 2 == 1 if size % 2 == 0 else lax.rem(block + i, jnp.int32(2)) == 1 for i in range(size)]
    return [_dequantized_block(tiling, block + i, odd[i], first, channels, refs) for i in range(size)]


def _dequantized_block(
    tiling: DecodeTiling, block: Array, odd: Any, first: Any, channels: int, refs: dict[str, Any]
) -> Array:
    """One of them; odd: whether its number is, for `_scale_row`."""
    key, lanes = tiling.key, pl.ds(first, channels)
    planes = [refs[f"key_words{n}"][block, :, lanes] for n in range(len(PLANES[key.bits]))]
    if key.axis == "channel":
        scale, zero = (_scale_row(refs[f"key_{what}s"], block, lanes, odd) for what in ("scale", "zero"))
        return unpack.scaled_along_channels(planes, key.bits, scale, zero, bf16_alu=tiling.chip.bf16_alu)
    scales = []
    for lane in range(0, channels, min(key.group, channels)):
        group = (first + lane) // key.group if isinstance(first, int) else lax.div(first, jnp.int32(key.group))
        scales.append(unpack.columns(*(refs[f"key_{what}s"][block, group] for what in ("scale", "zero"))))
    return unpack.scaled_along_tokens(planes, key.bits, scales)


def _rebuild(
    tiling: DecodeTiling, size: int, block: Array, n: Array | int, blocks: list[Array] | None, refs: dict[str, Any]
) -> None:
    """Keys of a bundle to scratch, rotated by their place, and the inverse of their norms. `blocks`: x^ of the `size`
    blocks from `block` of the tile, unless codes are multiplied."""
    step = min(size, tiling.product)
    column = n * tiling.width if isinstance(n, int) else pl.multiple_of(n * tiling.width, tiling.width)
    if blocks is None:
        products = iter([rebuild8.product(tiling, size, n, column, refs)])
    else:
        matrix = refs["matrix"][:, pl.ds(column, tiling.width)] if tiling.dense else refs["matrix"][n]
        chunks = (blocks[first : first + step] for first in range(0, size, step))
        products = (jnp.dot(jnp.concatenate(x), matrix, preferred_element_type=jnp.float32) for x in chunks)
    for number, k in enumerate(products):
        first = number * step
        if size == tiling.turn:
            places = slice(first * BLOCK, (first + step) * BLOCK)
        else:  # a chunk within a turn
            places = pl.ds(pl.multiple_of(lax.rem(block + first, jnp.int32(tiling.turn)) * BLOCK, BLOCK), step * BLOCK)
        if tiling.bias:
            k = k + refs["bias"][n]
        if tiling.norm_eps is not None:
            _to_scratch(tiling, refs["squares"], n, first, (k * k).astype(jnp.bfloat16))
        if "cos" in refs:
            if tiling.chip.bf16_alu:
                k = k.astype(jnp.bfloat16)
            sine = (k if tiling.sines_apart else pltpu.roll(k, tiling.width // 2, 1)) * refs["sin"][places]
            k = k * refs["cos"][places]
            if tiling.sines_apart:
                _to_scratch(tiling, refs["sines"], n, first, sine.astype(jnp.bfloat16))
            else:
                k = k + sine
        _to_scratch(tiling, refs["keys"], n, first, k.astype(jnp.bfloat16))


def _to_scratch(tiling: DecodeTiling, ref: Any, n: Array | int, first: int, k: Array) -> None:
    """Keys from block `first` of a chunk on."""
    if tiling.chip.bf16_alu:
        k = pltpu.bitcast(k, jnp.uint32)
    row = first * (unpack.PAIRS if tiling.chip.bf16_alu else BLOCK)
    ref[n, row : row + k.shape[0]] = k


def _from_scratch(tiling: DecodeTiling, ref: Any, n: int, first: int, size: int) -> Array:
    """`size` blocks, bfloat16."""
    if tiling.chip.bf16_alu:
        return pltpu.bitcast(ref[n, first * unpack.PAIRS : (first + size) * unpack.PAIRS], jnp.bfloat16)
    return ref[n, first * BLOCK : (first + size) * BLOCK]


def _score(tiling: DecodeTiling, size: int, block: Array, n: int, refs: dict[str, Any]) -> None:
    """Products of a bundle's queries and keys to scratch."""
    q = refs["turned"][n]
    if not tiling.rotated:
        q = _turn(tiling, q, block, refs)
    rolled = pltpu.roll(q, tiling.width // 2, 1).astype(jnp.bfloat16) if "sines" in refs else None
    q = q.astype(jnp.bfloat16)
    step = min(size, tiling.product)
    for first in range(0, size, step):
        scores = _dot_transposed(q, _from_scratch(tiling, refs["keys"], n, first, step))
        if rolled is not None:
            scores += _dot_transposed(rolled, _from_scratch(tiling, refs["sines"], n, first, step))
        if tiling.norm_eps is not None:  # a key's norm is one number: it divides the scores
            squares = _dot_transposed(refs["members"][...], _from_scratch(tiling, refs["squares"], n, first, step))
            scores = scores * lax.rsqrt(squares / tiling.dim + tiling.norm_eps)
        tokens = slice(first * BLOCK, (first + step) * BLOCK)
        refs["scores"][n * tiling.bundle_rows : (n + 1) * tiling.bundle_rows, tokens] = scores[: tiling.bundle_rows]


def _dot_transposed(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _turn(tiling: DecodeTiling, q: Array, blocks: Array | int, refs: dict[str, Any]) -> Array:
    """Rotates queries from the tile's first key towards later ones, so many blocks: a multiple of `tiling.turn`."""
    row = lax.div(blocks + tiling.behind, jnp.int32(tiling.turn))
    cos, sin = (refs[f"turn_{what}"][row] for what in ("cos", "sin"))
    if q.ndim > cos.ndim:
        cos, sin = cos[None], sin[None]
    return q * cos + pltpu.roll(q, tiling.width // 2, q.ndim - 1) * sin


def _softmax(
    tiling: DecodeTiling, size: int, block: Array, history: History, refs: dict[str, Any]
) -> tuple[list[Array], Array]:
    """Probabilities relative to the running maximum, float32 [rows, 128] for each of `size` blocks from `block` of the
    sequence, and what the sums so far shrink by."""
    token = unpack.token_of(lax.broadcasted_iota(jnp.int32, (1, LANES), 1), 2)
    row, column = (lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    reorder = (unpack.token_of(row, tiling.ways) == unpack.token_of(column, 2)).astype(jnp.float32)
    scores = []
    for i in range(size):
        place = token + (block + i) * BLOCK
        exists = (block + i >= history.first) & (block + i < history.end)
        place = jnp.where((place >= history.skip) & exists, place, AFTER_ALL)
        distance = pltpu.bitcast(refs["position"][...] - place, jnp.uint32)  # beyond any window if negative
        seen = distance < history.window.astype(jnp.uint32)
        score = refs["scores"][:, i * BLOCK : (i + 1) * BLOCK]
        if tiling.ways == 4:  # from the keys' order to that of the values
            score = jnp.dot(score, reorder, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        scores.append(jnp.where(seen, score, -jnp.inf))
    largest = functools.reduce(jnp.maximum, scores)
    before = refs["top"][...]
    top = jnp.maximum(before, jnp.max(largest, axis=1, keepdims=True))
    probability = [jnp.exp2(score - top) for score in scores]
    shrunk = jnp.exp2(before - top)
    refs["top"][...] = top
    refs["total"][...] = refs["total"][...] * shrunk + functools.reduce(jnp.add, probability)
    return probability, shrunk


def _weigh_all(
    tiling: DecodeTiling, size: int, block: Array, probability: list[Array], shrunk: Array, refs: dict[str, Any]
) -> None:
    """Adds a chunk's probabilities times its values."""
    for tile in range(tiling.value_tiles):
        _weigh(tiling, size, block, tile, probability, shrunk, refs)


def _weigh(
    tiling: DecodeTiling,
    size: int,
    block: Array,
    tile: int,
    probability: list[Array],
    shrunk: Array,
    refs: dict[str, Any],
) -> None:
    """Adds a chunk's probabilities times a tile of its values."""
    rows = slice(tiling.cover_start(tile), tiling.cover_start(tile) + tiling.cover)
    lanes = slice(tile * tiling.value_lanes, (tile + 1) * tiling.value_lanes)
    bits = tiling.value.bits
    shrunk = shrunk[rows]
    weights, values = [], []
    shift = refs["shifts"][tile] * shrunk
    for i in range(size):
        if tiling.looped:
            planes = [refs[f"value_words{n}"][block + i, :, lanes] for n in range(len(PLANES[bits]))]
        else:
            planes = [refs[f"words_behind{n}"][i, :, lanes] for n in range(len(PLANES[bits]))]
        values.append(unpack.numbers(planes, bits))
        at = block + tiling.behind + i
        scale, zero = (_row_scales(tiling, tile, refs[f"value_{what}"], at) for what in ("scales", "zeros"))
        weight = (probability[i][rows] * scale).astype(jnp.bfloat16)
        weights.append(weight)
        shift = shift + probability[i][rows] * zero - unpack.offset(bits) * weight.astype(jnp.float32)
    refs["shifts"][tile] = shift
    weight, value = jnp.concatenate(weights, axis=1), jnp.concatenate(values, axis=0)
    product = jnp.dot(weight, value, preferred_element_type=jnp.float32)
    widened = jnp.concatenate([shrunk] * (tiling.value_lanes // LANES), axis=1)
    refs["sums"][tile] = refs["sums"][tile] * widened + product


def _row_scales(tiling: DecodeTiling, tile: int, scales: Any, block: Array) -> Array:
    """Scales (or zeros) of the values that each row reads in a tile, one for each token: [1 or cover, 128]."""
    first, last = tile * tiling.value_lanes, (tile + 1) * tiling.value_lanes
    lowest = first // tiling.value.group
    scale = scales[block, lowest : lowest + 1]
    row = tiling.cover_start(tile) + lax.broadcasted_iota(jnp.int32, (tiling.cover, LANES), 0)
    for group in range(lowest + 1, (last - 1) // tiling.value.group + 1):
        start = tiling.readers(group * tiling.value.group, last)[0] * tiling.head_rows
        scale = jnp.where(row < start, scale, scales[block, group : group + 1])
    return scale
