"""`accumulate` for TPU: the running sum of the history read, added to and quantized again, in place.

A step of the grid takes a *tile* of blocks of one sequence, with the matrices whole in vector memory, and within it
*chunks* of blocks. For each chunk: what is multiplied with a matrix -> bfloat16 in vector memory; then, strip by strip
of as many channels as the matrix unit is wide: products, while those of the strip before are added to and, in every
block and group of 128 channels, quantized. Rows are tokens in their own order, so that packing is shifts of whole
registers; what is known for each token (minimum, maximum, scale, zero) lies along the lanes, one register for a block.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels import chips, target
from pallas_kernels.operands import Accumulation
from pallas_kernels.pallas_tpu import chip, unpack
from pallas_kernels.pallas_tpu.quantizing import by_token, grid_of, lowest_highest, packed
from pallas_kernels.pallas_tpu.streams import LANES, by_block, refuse_stream
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import Blocks, StreamSpec

TILE = 8
"""Blocks of a step of the grid."""
AT_ONCE = 2**16
"""Values of the sum that are worked on together: with more, more registers spill than products hide."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static side of a call."""

    stream: StreamSpec
    sum: StreamSpec
    num_blocks: int
    predict: tuple[tuple[int, int], ...] | None  # shapes of the matrices
    lift: tuple[int, int] | None
    chip: chips.TPU

    @property
    def tile(self) -> int:
        return min(TILE, self.num_blocks)

    @property
    def chunk(self) -> int:
        """Blocks of a tile that are worked on together."""
        return math.gcd(AT_ONCE // (BLOCK * self.strip), self.tile)

    @property
    def strip(self) -> int:
        """Channels of the sum that are worked on together."""
        return self.chip.mxu if self.sum.width % self.chip.mxu == 0 else LANES

    @property
    def left(self) -> dict[str, int]:
        """What is multiplied with a matrix, and how wide it is: `sum`, `between0` ..., `stored`."""
        widths = {}
        for number, (width, _) in enumerate(self.predict or ()):
            widths["sum" if number == 0 else f"between{number - 1}"] = width
        if self.lift is not None:
            widths["stored"] = self.lift[0]
        return widths

    @property
    def bytes(self) -> int:
        """Of vector memory: matrices, left operands, words of a step and of the next, as they come and as they go."""
        matrices = [*(self.predict or ()), *([self.lift] if self.lift else [])]
        words = BLOCK * (self.stream.width * self.stream.bits + 2 * self.sum.width * self.sum.bits) // 8
        scales = 3 * 8 * self.sum.width
        return (
            sum(2 * a * b for a, b in matrices)
            + 2 * self.chunk * BLOCK * sum(self.left.values())
            + 2 * self.tile * (words + scales)
        )


def make_plan(running_sum: Blocks, stream: Blocks, accumulation: Accumulation) -> Plan:
    predict, lift = accumulation.predict, accumulation.lift
    return Plan(
        stream=stream.spec,
        sum=running_sum.spec,
        num_blocks=running_sum.planes[0].shape[1],
        predict=None if predict is None else tuple(matrix.shape for matrix in predict),
        lift=None if lift is None else lift.shape,
        chip=chip.current(),
    )


def refuse_accumulate(
    running_sum: Blocks, stream: Blocks, accumulation: Accumulation, history_blocks: Array, *, layer: Any
) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    for name, spec in {"sum": running_sum.spec, "stream": stream.spec}.items():
        if reason := refuse_stream(spec):
            return f"the {name} {reason}"
        if spec.axis == "token" and spec.group != LANES:
            return f"the {name} has groups of {spec.group} channels; it takes 128"
    if running_sum.spec.bits != 8 or running_sum.spec.axis != "token":
        return f"the sum has {running_sum.spec.bits} bits along the {running_sum.spec.axis}; it takes 8 along the token"
    plan = make_plan(running_sum, stream, accumulation)
    narrow = [width for width in plan.left.values() if width % LANES]
    if narrow:
        return f"a matrix has {narrow[0]} rows, which is no multiple of 128"
    if plan.bytes > plan.chip.vmem * 3 // 4:
        return f"its matrices and words take {plan.bytes:,} bytes of vector memory, too many"
    return None


def accumulate(
    running_sum: Blocks,
    stream: Blocks,
    accumulation: Accumulation,
    history_blocks: Int[Array, " B"],
    *,
    layer: Int[Array, ""] | int,
) -> Blocks:
    """See `pallas_kernels.api.accumulate`."""
    plan = make_plan(running_sum, stream, accumulation)
    batch, tile = len(history_blocks), plan.tile
    history_blocks = history_blocks.astype(jnp.int32)
    splits = plan.chip.cores if batch % plan.chip.cores and plan.num_blocks > tile else 1  # of a sequence, one a core
    steps = jnp.maximum(lax.div(history_blocks.max() + (tile * splits - 1), jnp.int32(tile * splits)), 1)
    names, arrays, specs = [], [], []

    def add(name: str, array: Array, spec: pl.BlockSpec) -> None:
        names.append(name)
        arrays.append(array)
        specs.append(spec)

    def of_tile(rest: tuple[int, ...], *, layered: bool) -> pl.BlockSpec:
        def index(b: Array, split: Array, j: Array, layer: Any, history_blocks: Any, steps: Any) -> tuple:
            first = split * steps[0]
            last = jnp.maximum(lax.div(history_blocks[b] + (tile - 1), jnp.int32(tile)) - 1, first)
            at = (b, jnp.minimum(first + j, last), *[0] * len(rest))
            return (layer[0], *at) if layered else at

        return pl.BlockSpec((None, None, tile, *rest) if layered else (None, tile, *rest), index)

    once = pl.Buffered(1)
    matrices = {f"predict{n}": matrix for n, matrix in enumerate(accumulation.predict or ())}
    if accumulation.lift is not None:
        matrices["lift"] = accumulation.lift
    for name, matrix in matrices.items():
        spec = pl.BlockSpec(matrix.shape, lambda b, split, j, *_: (0, 0), pipeline_mode=once)
        add(name, matrix.astype(jnp.bfloat16), spec)
    for number, words in enumerate(stream.planes):
        add(f"stored_words{number}", words, of_tile(words.shape[3:], layered=True))
    for what in ("scale", "zero"):
        array = by_block(getattr(stream, what), plan.stream.axis, leading=2)
        add(f"stored_{what}", array, of_tile(array.shape[3:], layered=True))
    sums = {f"sum_words{number}": words for number, words in enumerate(running_sum.planes)}
    sums |= {f"sum_{what}": by_block(getattr(running_sum, what), "token", leading=1) for what in ("scale", "zero")}
    aliases = {}
    for number, (name, array) in enumerate(sums.items()):
        aliases[3 + len(arrays)] = number
        spec = of_tile(array.shape[2:], layered=False)
        add(name, array, spec if plan.predict is not None else pl.BlockSpec(memory_space=pl.ANY))

    scratch = {name: pltpu.VMEM((plan.chunk, BLOCK // 2, width), jnp.uint32) for name, width in plan.left.items()}
    scratch["products"] = pltpu.VMEM((2, plan.chunk * BLOCK, plan.strip), jnp.float32)
    rows = (tile, plan.sum.width // LANES, 1, LANES)
    scratch |= {
        f"{which}_{what}s": pltpu.VMEM(rows, jnp.float32) for which in ("sum", "new") for what in ("scale", "zero")
    }
    by_row = (plan.stream.width // LANES, 1, LANES)
    scratch |= {f"stored_{what}s": pltpu.VMEM((tile, *by_row), jnp.float32) for what in ("scale", "zero")}

    def kernel(layer: Any, history_blocks: Any, steps: Any, *refs: Any) -> None:
        del layer
        every = (*names, *(f"out_{name}" for name in sums), *scratch)
        _kernel(plan, history_blocks, steps, dict(zip(every, refs, strict=True)))

    interpret = target.current().interpret
    if interpret and plan.num_blocks % tile:  # which cannot alias what it pads to whole tiles
        aliases = {}
    out = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in sums.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, splits, steps),
            in_specs=specs,
            out_specs=[of_tile(array.shape[2:], layered=False) for array in sums.values()],
            scratch_shapes=list(scratch.values()),
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=plan.chip.vmem * 7 // 8
        ),
        name="accumulate",
        interpret=pltpu.InterpretParams() if interpret else False,
    )(jnp.asarray(layer, jnp.int32).reshape(1), history_blocks, steps.reshape(1), *arrays)
    *words, scale, zero = out
    return Blocks(tuple(words), jnp.swapaxes(scale, -1, -2), jnp.swapaxes(zero, -1, -2), running_sum.spec)


def _kernel(plan: Plan, history_blocks: Any, steps: Any, refs: dict[str, Any]) -> None:
    b, j = pl.program_id(0), pl.program_id(2)
    tile = pl.program_id(1) * steps[0] + j
    count = jnp.clip(history_blocks[b] - tile * plan.tile, 0, plan.tile)

    @pl.when((count > 0) | (j == 0))
    def _tile() -> None:
        for what in ("scales", "zeros"):
            refs[f"new_{what}"][...] = jnp.zeros_like(refs[f"new_{what}"])
            for name, spec in {"sum": plan.sum, "stored": plan.stream}.items():
                if name == "sum" and plan.predict is None:
                    continue
                given = refs[f"{name}_{what[:-1]}"][...].astype(jnp.float32)
                rows = given.reshape(plan.tile, -1, LANES) if spec.axis == "channel" else given
                refs[f"{name}_{what}"][...] = rows[:, :, None]
        lax.fori_loop(0, pl.cdiv(count, plan.chunk), lambda i, _: _chunk(plan, i * plan.chunk, refs), None)
        for what in ("scale", "zero"):
            refs[f"out_sum_{what}"][...] = jnp.squeeze(refs[f"new_{what}s"][...], 2).astype(jnp.bfloat16)


def _chunk(plan: Plan, first: Array, refs: dict[str, Any]) -> None:
    for name in ("sum", "stored"):
        if name in plan.left:
            _dequantize(plan, name, first, refs)
    products = [name for name in plan.left if name != "stored"]
    for number, (name, between) in enumerate(itertools.pairwise(products)):
        _multiply(plan, name, f"predict{number}", between, refs)

    def multiply(number: Array | int) -> None:
        lanes = _lanes(number, plan.strip)
        terms = []
        if products:
            terms.append(_product(plan, products[-1], f"predict{len(products) - 1}", lanes, refs))
        if plan.lift is not None:
            terms.append(_product(plan, "stored", "lift", lanes, refs))
        if terms:
            refs["products"][number % 2] = sum(terms[1:], terms[0])

    def quantize(number: Array | int) -> None:
        for group in range(plan.strip // LANES):
            at = number * (plan.strip // LANES) + group
            for i in range(plan.chunk):
                terms = []
                if plan.left:
                    rows, lanes = slice(i * BLOCK, (i + 1) * BLOCK), slice(group * LANES, (group + 1) * LANES)
                    terms.append(refs["products"][number % 2, rows, lanes])
                if plan.predict == ():
                    terms.append(_numbers(plan, "sum", first + i, at, refs))
                if plan.lift is None:
                    terms.append(_numbers(plan, "stored", first + i, at, refs))
                _quantize(sum(terms[1:], terms[0]), first + i, at, refs)

    def both(number: Array, _: None) -> None:
        quantize(number - 1)  # first, so that its loads wait for no store
        multiply(number)

    strips = plan.sum.width // plan.strip
    multiply(0)
    lax.fori_loop(1, strips, both, None)
    quantize(strips - 1)


def _lanes(number: Array | int, size: int) -> Any:
    return pl.ds(number * size, size) if isinstance(number, int) else pl.ds(pl.multiple_of(number * size, size), size)


def _numbers(plan: Plan, name: str, block: Array, group: Array | int, refs: dict[str, Any]) -> Array:
    """128 channels of a block of the sum or the stream, float32 [128, 128]."""
    spec = plan.sum if name == "sum" else plan.stream
    lanes = _lanes(group, LANES)
    planes = [refs[f"{name}_words{n}"][block, :, lanes] for n in range(len(PLANES[spec.bits]))]
    scale, zero = (refs[f"{name}_{what}"][block, group] for what in ("scales", "zeros"))
    if spec.axis == "token":
        scale, zero = unpack.columns(scale, zero)
    codes = jnp.concatenate(unpack.halves(unpack.pairs(planes, spec.bits), spec.bits), axis=0)
    return (codes - unpack.offset(spec.bits)) * scale + zero


def _dequantize(plan: Plan, name: str, first: Array, refs: dict[str, Any]) -> None:
    """A chunk of the sum or the stream to vector memory, as a left operand."""

    def strip(number: Array, _: None) -> None:
        for i in range(plan.chunk):
            numbers = _numbers(plan, name, first + i, number, refs)
            refs[name][i, :, _lanes(number, LANES)] = _in_pairs(numbers)

    lax.fori_loop(0, plan.left[name] // LANES, strip, None, unroll=2 - plan.left[name] // LANES % 2)


def _multiply(plan: Plan, name: str, matrix: str, into: str, refs: dict[str, Any]) -> None:
    def strip(number: Array, _: None) -> None:
        lanes = _lanes(number, LANES)
        product = _product(plan, name, matrix, lanes, refs)
        for i in range(plan.chunk):
            refs[into][i, :, lanes] = _in_pairs(product[i * BLOCK : (i + 1) * BLOCK])

    lax.fori_loop(0, plan.left[into] // LANES, strip, None)


def _product(plan: Plan, name: str, matrix: str, lanes: Any, refs: dict[str, Any]) -> Array:
    left = jnp.concatenate([pltpu.bitcast(refs[name][i], jnp.bfloat16) for i in range(plan.chunk)], axis=0)
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
