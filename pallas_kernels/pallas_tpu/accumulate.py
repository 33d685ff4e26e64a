"""`accumulate` for TPU: the running sum of the history read, added to and quantized again, in place.

A step of the grid takes a *tile* of blocks of one sequence, with the matrices whole in vector memory, and within it
*chunks* of blocks. For each chunk: what is multiplied with a matrix -> bfloat16 in vector memory; then by strips of
as many channels as the matrix unit is wide, three strips at once: one is added up (products, and what is only added),
of the one before every block and group of 128 channels is measured (minimum and maximum), and the one before that is
packed. Each of these waits for another unit.

Rows are tokens in their own order, so that packing is shifts of whole registers; what is known for each token (minimum,
maximum, scale, zero) lies along the lanes, one register for a block. The transposing unit turns it around, a register
of rows in the time of one of 128 equal ones; where nothing is multiplied, the matrix unit takes over most of that: it
spreads many rows, turned around together, over lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import target
from pallas_kernels.calls import Accumulate
from pallas_kernels.pallas_tpu.accumulate_kernel import kernel
from pallas_kernels.pallas_tpu.accumulate_tiling import SumTiling
from pallas_kernels.pallas_tpu.streams import LANES, by_block
from pallas_kernels.streams import refuse_stream
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks


def refuse(call: Accumulate) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    for name, spec in {"sum": call.running_sum.spec, "stream": call.stream.spec}.items():
        if reason := refuse_stream(f"the {name}", spec, LANES):
            return reason
        if spec.axis == "token" and spec.group != LANES:
            return f"the {name} has groups of {spec.group} channels; it takes 128: group=128"
    total = call.running_sum.spec
    if total.bits != 8 or total.axis != "token":
        return f"the sum has {total.bits} bits along the {total.axis}; it takes 8 along the token"
    tiling = SumTiling.of(call)
    narrow = [width for width in tiling.left.values() if width % LANES]
    if narrow:
        return f"a matrix has {narrow[0]} rows, which is no multiple of 128"
    if tiling.bytes > tiling.chip.vmem * 3 // 4:
        return f"its matrices and words take {tiling.bytes:,} bytes of vector memory, too many"
    return None


def run(call: Accumulate) -> Blocks:
    """Adds with the kernel, in place."""
    tiling = SumTiling.of(call)
    running_sum, stream, accumulation = call.running_sum, call.stream, call.accumulation
    history_blocks = call.history_blocks.astype(jnp.int32)
    batch, tile = len(history_blocks), tiling.tile
    # of a sequence, one a core
    splits = tiling.chip.cores if batch % tiling.chip.cores and tiling.num_blocks > tile else 1
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
        array = by_block(getattr(stream, what), tiling.stream.axis, leading=2)
        add(f"stored_{what}", array, of_tile(array.shape[3:], layered=True))
    sums = {f"sum_words{number}": words for number, words in enumerate(running_sum.planes)}
    sums |= {f"sum_{what}": by_block(getattr(running_sum, what), "token", leading=1) for what in ("scale", "zero")}
    aliases = {}
    for number, (name, array) in enumerate(sums.items()):
        aliases[3 + len(arrays)] = number
        spec = of_tile(array.shape[2:], layered=False)
        add(name, array, spec if tiling.predict is not None else pl.BlockSpec(memory_space=pl.ANY))

    scratch = {name: pltpu.VMEM((tiling.chunk, BLOCK // 2, width), jnp.uint32) for name, width in tiling.left.items()}
    scratch["totals"] = pltpu.VMEM((3, tiling.chunk * BLOCK, tiling.strip), jnp.float32)
    rows = (tile, tiling.sum.width // LANES, 1, LANES)
    scratch |= {
        "sum_scales": pltpu.VMEM(rows, jnp.uint32),  # and zeros, in the halves of words
        "stored_scales": pltpu.VMEM((tile, tiling.stream.width // LANES, 1, LANES), jnp.uint32),
        "new_scales": pltpu.VMEM(rows, jnp.float32),
        "new_zeros": pltpu.VMEM(rows, jnp.float32),
    }

    def body(layer: Any, history_blocks: Any, steps: Any, *refs: Any) -> None:
        del layer
        every = (*names, *(f"out_{name}" for name in sums), *scratch)
        kernel(tiling, history_blocks, steps, dict(zip(every, refs, strict=True)))

    interpret = target.current().interpret
    if interpret and tiling.num_blocks % tile:  # which cannot alias what it pads to whole tiles
        aliases = {}
    out = pl.pallas_call(
        body,
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
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiling.chip.vmem * 7 // 8
        ),
        name="accumulate",
        interpret=pltpu.InterpretParams() if interpret else False,
    )(jnp.asarray(call.layer, jnp.int32).reshape(1), history_blocks, steps.reshape(1), *arrays)
    *words, scale, zero = out
    return Blocks(tuple(words), jnp.swapaxes(scale, -1, -2), jnp.swapaxes(zero, -1, -2), running_sum.spec)
