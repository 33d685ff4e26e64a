"""The kernel of `accumulate` for TPU; `accumulate` says how it works and hands over what it reads."""

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.pallas_tpu import unpack
from pallas_kernels.pallas_tpu.accumulate_tiling import SumTiling
from pallas_kernels.pallas_tpu.quantize_kernel import by_token, grid_of, lowest_highest, packed
from pallas_kernels.pallas_tpu.streams import LANES
from xquant_jax.numerics.packing import BLOCK, PLANES

type Scales = list[tuple[Array, Array]]
"""Scale and zero of each of `_units`."""


def kernel(tiling: SumTiling, history_blocks: Any, steps: Any, refs: dict[str, Any]) -> None:
    b, j = pl.program_id(0), pl.program_id(2)
    tile = pl.program_id(1) * steps[0] + j
    count = jnp.clip(history_blocks[b] - tile * tiling.tile, 0, tiling.tile)

    @pl.when((count > 0) | (j == 0))
    def _tile() -> None:
        for name in ("stored",) if tiling.predict is None else ("sum", "stored"):
            scale, zero = (refs[f"{name}_{what}"][...].astype(jnp.float32) for what in ("scale", "zero"))
            words = unpack.together(scale, zero)
            refs[f"{name}_scales"][...] = words.reshape(tiling.tile, -1, 1, LANES)
        _strips(tiling, pl.cdiv(count, tiling.chunk), refs)
        for what in ("scale", "zero"):
            rows = jnp.squeeze(refs[f"new_{what}s"][...], 2)
            block = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
            refs[f"out_sum_{what}"][...] = jnp.where(block < count, rows, 0.0).astype(jnp.bfloat16)


def _strips(tiling: SumTiling, chunks: Array, refs: dict[str, Any]) -> None:
    """Strip after strip of chunk after chunk: one is added up while the one before is measured, and the one before that
    packed. At both ends a strip is done twice instead of nothing, the first time from what was there before."""
    strips = tiling.sum.width // tiling.strip
    last = chunks * strips - 1

    def place(strip: Array) -> tuple[Array, Array, Array]:
        """First block of a strip's chunk, its number therein, and where its totals are."""
        strip = jnp.clip(strip, 0, last)
        first = lax.div(strip, jnp.int32(strips)) * tiling.chunk
        return first, lax.rem(strip, jnp.int32(strips)), lax.rem(strip, jnp.int32(3))

    def step(strip: Array, _: None) -> None:
        first, number, slot = place(strip)

        @pl.when((number == 0) & (strip <= last))
        def _next_chunk() -> None:
            _lay_out(tiling, first, refs)

        _pack(tiling, *place(strip - 2), refs)  # in this order no load waits for a store
        scales = _scales(tiling, first, number, refs)
        _measure(tiling, *place(strip - 1), refs)
        _add_up(tiling, first, number, slot, scales, refs)

    lax.fori_loop(0, jnp.where(chunks > 0, last + 3, 0), step, None)


def _lay_out(tiling: SumTiling, first: Array, refs: dict[str, Any]) -> None:
    """What is multiplied of a chunk to vector memory, and the products before the last."""
    for name in ("sum", "stored"):
        if name in tiling.left:
            _dequantize(tiling, name, first, refs)
    products = [name for name in tiling.left if name != "stored"]
    for number, (name, between) in enumerate(itertools.pairwise(products)):
        _multiply(tiling, name, f"predict{number}", between, refs)


def _add_up(
    tiling: SumTiling, first: Array, number: Array, slot: Array, scales: dict[str, Scales], refs: dict[str, Any]
) -> None:
    """A strip of a chunk of the new sum to `totals`: products, and what is only added, with its `_scales`."""
    lanes = _lanes(number, tiling.strip)
    products = [name for name in tiling.left if name != "stored"]
    terms = []
    if products:
        terms.append(_product(tiling, products[-1], f"predict{len(products) - 1}", lanes, refs))
    if tiling.lift is not None:
        terms.append(_product(tiling, "stored", "lift", lanes, refs))
    for at, (i, group) in enumerate(_units(tiling)):
        rows, columns = slice(i * BLOCK, (i + 1) * BLOCK), slice(group * LANES, (group + 1) * LANES)
        total = [term[rows, columns] for term in terms]
        for name in scales:
            scale, zero = scales[name][at]
            total.append(_numbers(tiling, name, first + i, _group(tiling, number, group), scale, zero, refs))
        refs["totals"][slot, rows, columns] = sum(total[1:], total[0])


def _units(tiling: SumTiling) -> list[tuple[int, int]]:
    """Blocks of a chunk and, of a strip, groups of 128 channels."""
    return [(i, group) for group in range(tiling.strip // LANES) for i in range(tiling.chunk)]


def _group(tiling: SumTiling, number: Array, group: int) -> Array:
    """A strip's group, counted through the whole width."""
    return number * (tiling.strip // LANES) + group


def _scales(tiling: SumTiling, first: Array, number: Array, refs: dict[str, Any]) -> dict[str, Scales]:
    """Of the sum and the stream, if they are only added: scale and zero of every unit of a strip, to be multiplied with
    numbers [128, 128]."""
    scales: dict[str, Scales] = {}
    for name in ["sum"] * (tiling.predict == ()) + ["stored"] * (tiling.lift is None):
        given = [refs[f"{name}_scales"][first + i, _group(tiling, number, group)] for i, group in _units(tiling)]
        if (tiling.sum if name == "sum" else tiling.stream).axis == "channel":
            scales[name] = [unpack.apart(row) for row in given]
        elif tiling.left or name == "sum":  # the matrix unit has more to do than the transposing one, or as much
            scales[name] = [unpack.apart(unpack.turned(row)) for row in given]
        else:
            spread = _spread([row for words in given for row in unpack.apart(words)], 2 * len(given), lambda row: row)
            scales[name] = list(zip(spread[::2], spread[1::2], strict=True))
    return scales


def _lanes(number: Array | int, size: int) -> Any:
    return pl.ds(number * size, size) if isinstance(number, int) else pl.ds(pl.multiple_of(number * size, size), size)


def _numbers(
    tiling: SumTiling, name: str, block: Array, group: Array, scale: Array, zero: Array, refs: dict[str, Any]
) -> Array:
    """128 channels of a block of the sum or the stream, float32 [128, 128]."""
    spec = tiling.sum if name == "sum" else tiling.stream
    lanes = _lanes(group, LANES)
    planes = [refs[f"{name}_words{n}"][block, :, lanes] for n in range(len(PLANES[spec.bits]))]
    codes = jnp.concatenate(unpack.halves(unpack.pairs(planes, spec.bits), spec.bits), axis=0)
    return (codes - unpack.offset(spec.bits)) * scale + zero


def _dequantize(tiling: SumTiling, name: str, first: Array, refs: dict[str, Any]) -> None:
    """A chunk of the sum or the stream to vector memory, as a left operand."""
    spec = tiling.sum if name == "sum" else tiling.stream

    def strip(number: Array, _: None) -> None:
        for i in range(tiling.chunk):
            words = refs[f"{name}_scales"][first + i, number]
            scale, zero = unpack.apart(unpack.turned(words) if spec.axis == "token" else words)
            numbers = _numbers(tiling, name, first + i, number, scale, zero, refs)
            refs[name][i, :, _lanes(number, LANES)] = _in_pairs(numbers)

    lax.fori_loop(0, tiling.left[name] // LANES, strip, None, unroll=2 - tiling.left[name] // LANES % 2)


def _multiply(tiling: SumTiling, name: str, matrix: str, into: str, refs: dict[str, Any]) -> None:
    def strip(number: Array, _: None) -> None:
        lanes = _lanes(number, LANES)
        product = _product(tiling, name, matrix, lanes, refs)
        for i in range(tiling.chunk):
            refs[into][i, :, lanes] = _in_pairs(product[i * BLOCK : (i + 1) * BLOCK])

    lax.fori_loop(0, tiling.left[into] // LANES, strip, None)


def _product(tiling: SumTiling, name: str, matrix: str, lanes: Any, refs: dict[str, Any]) -> Array:
    left = jnp.concatenate([pltpu.bitcast(refs[name][i], jnp.bfloat16) for i in range(tiling.chunk)], axis=0)
    return jnp.dot(left, refs[matrix][:, lanes], preferred_element_type=jnp.float32)


def _in_pairs(x: Array) -> Array:
    """Float32 [128, W] as bfloat16, two rows in a word, uint32 [64, W]: memory's tiles of words are registers."""
    return pltpu.bitcast(x.astype(jnp.bfloat16), jnp.uint32)


def _total(slot: Array, i: int, group: int, refs: dict[str, Any]) -> Array:
    """128 channels of a block of a strip, float32 [128, 128]."""
    return refs["totals"][slot, i * BLOCK : (i + 1) * BLOCK, group * LANES : (group + 1) * LANES]


def _measure(tiling: SumTiling, first: Array, number: Array, slot: Array, refs: dict[str, Any]) -> None:
    """Scales and zeros of a strip of a chunk, for 8 bits along the token."""
    for i, group in _units(tiling):
        scale, zero = grid_of(*lowest_highest(_total(slot, i, group, refs), along_tokens=True), 8)
        at = first + i, _group(tiling, number, group)
        refs["new_scales"][at], refs["new_zeros"][at] = scale, zero


def _pack(tiling: SumTiling, first: Array, number: Array, slot: Array, refs: dict[str, Any]) -> None:
    """Codes of a strip of a chunk, by its scales and zeros."""
    places = [(first + i, _group(tiling, number, group)) for i, group in _units(tiling)]
    grids = [(refs["new_scales"][at], refs["new_zeros"][at]) for at in places]
    if tiling.left:  # the matrix unit has more to do than the transposing one
        to_units = [by_token(scale, zero) for scale, zero in grids]
    else:
        rows = []
        for scale, zero in grids:
            rows += [*_thirds(1 / scale), zero]
        # what is no number would be none in every row; it stays so in the scale
        rows = [jnp.where(jnp.abs(row) < jnp.inf, row, 0.0) for row in rows]
        spread = _spread(rows, 2 * len(grids), lambda row: 2 * (row >> 2) + jnp.where(row & 3 == 3, 1, 0))
        to_units = list(zip(spread[::2], spread[1::2], strict=True))
    for (i, group), (block, lanes), of_unit in zip(_units(tiling), places, to_units, strict=True):
        for plane, words in enumerate(packed(_total(slot, i, group, refs), *of_unit, 8)):
            refs[f"out_sum_words{plane}"][block, :, _lanes(lanes, LANES)] = words


def _spread(rows: list[Array], count: int, place: Callable[[Array], Array]) -> list[Array]:
    """Rows [1, 128] of numbers that bfloat16 can hold, with a token in each lane -> `count` arrays [128, 128] with a
    token in each row, the same in all lanes: each the exact sum of the rows that `place` gives its number.

    All rows are turned around together, and a product with ones and zeros spreads each of them over lanes.
    """
    padded = -(-len(rows) // 16) * 16
    stacked = jnp.concatenate([*rows, *[jnp.zeros_like(rows[0])] * (padded - len(rows))])
    row, lane = (lax.broadcasted_iota(jnp.int32, (padded, count * LANES), axis) for axis in (0, 1))
    ones = (place(row) == lax.div(lane, jnp.int32(LANES))).astype(jnp.bfloat16)
    spread = jnp.dot(stacked.T.astype(jnp.bfloat16), ones, preferred_element_type=jnp.float32)
    return [spread[:, lane : lane + LANES] for lane in range(0, count * LANES, LANES)]


def _thirds(x: Array) -> list[Array]:
    """Three numbers that bfloat16 can hold, of which float32 is the sum."""
    high = _truncated(x)
    middle = _truncated(x - high)
    return [high, middle, x - high - middle]


def _truncated(x: Array) -> Array:
    return pltpu.bitcast(pltpu.bitcast(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32)
