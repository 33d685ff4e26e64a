"""The kernel of `accumulate` for TPU; `accumulate` says how it works and hands over what it reads."""

import itertools
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


def kernel(tiling: SumTiling, history_blocks: Any, steps: Any, refs: dict[str, Any]) -> None:
    b, j = pl.program_id(0), pl.program_id(2)
    tile = pl.program_id(1) * steps[0] + j
    count = jnp.clip(history_blocks[b] - tile * tiling.tile, 0, tiling.tile)

    @pl.when((count > 0) | (j == 0))
    def _tile() -> None:
        for what in ("scales", "zeros"):
            refs[f"new_{what}"][...] = jnp.zeros_like(refs[f"new_{what}"])
            for name, spec in {"sum": tiling.sum, "stored": tiling.stream}.items():
                if name == "sum" and tiling.predict is None:
                    continue
                given = refs[f"{name}_{what[:-1]}"][...].astype(jnp.float32)
                rows = given.reshape(tiling.tile, -1, LANES) if spec.axis == "channel" else given
                refs[f"{name}_{what}"][...] = rows[:, :, None]
        lax.fori_loop(0, pl.cdiv(count, tiling.chunk), lambda i, _: _chunk(tiling, i * tiling.chunk, refs), None)
        for what in ("scale", "zero"):
            refs[f"out_sum_{what}"][...] = jnp.squeeze(refs[f"new_{what}s"][...], 2).astype(jnp.bfloat16)


def _chunk(tiling: SumTiling, first: Array, refs: dict[str, Any]) -> None:
    for name in ("sum", "stored"):
        if name in tiling.left:
            _dequantize(tiling, name, first, refs)
    products = [name for name in tiling.left if name != "stored"]
    for number, (name, between) in enumerate(itertools.pairwise(products)):
        _multiply(tiling, name, f"predict{number}", between, refs)

    def multiply(number: Array | int) -> None:
        lanes = _lanes(number, tiling.strip)
        terms = []
        if products:
            terms.append(_product(tiling, products[-1], f"predict{len(products) - 1}", lanes, refs))
        if tiling.lift is not None:
            terms.append(_product(tiling, "stored", "lift", lanes, refs))
        if terms:
            refs["products"][number % 2] = sum(terms[1:], terms[0])

    def quantize(number: Array | int) -> None:
        for group in range(tiling.strip // LANES):
            at = number * (tiling.strip // LANES) + group
            for i in range(tiling.chunk):
                terms = []
                if tiling.left:
                    rows, lanes = slice(i * BLOCK, (i + 1) * BLOCK), slice(group * LANES, (group + 1) * LANES)
                    terms.append(refs["products"][number % 2, rows, lanes])
                if tiling.predict == ():
                    terms.append(_numbers(tiling, "sum", first + i, at, refs))
                if tiling.lift is None:
                    terms.append(_numbers(tiling, "stored", first + i, at, refs))
                _quantize(sum(terms[1:], terms[0]), first + i, at, refs)

    def both(number: Array, _: None) -> None:
        quantize(number - 1)  # first, so that its loads wait for no store
        multiply(number)

    strips = tiling.sum.width // tiling.strip
    multiply(0)
    lax.fori_loop(1, strips, both, None)
    quantize(strips - 1)


def _lanes(number: Array | int, size: int) -> Any:
    return pl.ds(number * size, size) if isinstance(number, int) else pl.ds(pl.multiple_of(number * size, size), size)


def _numbers(tiling: SumTiling, name: str, block: Array, group: Array | int, refs: dict[str, Any]) -> Array:
    """128 channels of a block of the sum or the stream, float32 [128, 128]."""
    spec = tiling.sum if name == "sum" else tiling.stream
    lanes = _lanes(group, LANES)
    planes = [refs[f"{name}_words{n}"][block, :, lanes] for n in range(len(PLANES[spec.bits]))]
    scale, zero = (refs[f"{name}_{what}"][block, group] for what in ("scales", "zeros"))
    if spec.axis == "token":
        scale, zero = unpack.columns(scale, zero)
    codes = jnp.concatenate(unpack.halves(unpack.pairs(planes, spec.bits), spec.bits), axis=0)
    return (codes - unpack.offset(spec.bits)) * scale + zero


def _dequantize(tiling: SumTiling, name: str, first: Array, refs: dict[str, Any]) -> None:
    """A chunk of the sum or the stream to vector memory, as a left operand."""

    def strip(number: Array, _: None) -> None:
        for i in range(tiling.chunk):
            numbers = _numbers(tiling, name, first + i, number, refs)
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


def _quantize(x: Array, block: Array, group: Array | int, refs: dict[str, Any]) -> None:
    """128 channels of a block [128, 128] to the sum, at 8 bits along the token."""
    scale, zero = grid_of(*lowest_highest(x, along_tokens=True), 8)
    lanes = _lanes(group, LANES)
    for plane, words in enumerate(packed(x, *by_token(scale, zero), 8)):
        refs[f"out_sum_words{plane}"][block, :, lanes] = words
    refs["new_scales"][block, group], refs["new_zeros"][block, group] = scale, zero
