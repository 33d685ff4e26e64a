"""`quantize` for TPU: uniform codes of whole blocks, rounded and packed in registers in one pass over the vectors.

A step of the grid takes a tile of blocks of one sequence, and within it 128 channels of a block at a time. Rows are
tokens in their own order, so that packing is shifts of whole registers. What is known for each token (minimum, maximum,
scale, zero) lies along the lanes: tokens are turned around to compare their channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import target
from pallas_kernels.calls import Quantize
from pallas_kernels.pallas_tpu import chip
from pallas_kernels.pallas_tpu.quantize_kernel import kernel
from pallas_kernels.pallas_tpu.streams import LANES
from pallas_kernels.streams import refuse_stream
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import Blocks

TILE = 8
"""Blocks of a step of the grid."""


def refuse(call: Quantize) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    x, spec = call.x, call.spec
    if reason := refuse_stream("the stream", spec, LANES):
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the vectors are {x.dtype}; it takes bfloat16 and float32"
    needed = 2 * TILE * BLOCK * spec.width * (8 * x.dtype.itemsize + spec.bits) // 8
    if needed > chip.current().vmem * 3 // 4:
        return f"a stream {spec.width} wide takes {needed:,} bytes of vector memory, too many"
    return None


def run(call: Quantize) -> Blocks:
    """Quantizes and packs with the kernel."""
    x, spec = call.x, call.spec
    batch, blocks, _, width = x.shape
    tile = min(TILE, blocks)
    rows = (1, width) if spec.axis == "channel" else (width // spec.group, BLOCK)
    # along the channel XLA for TPU keeps no axis of one row between blocks and channels
    scales = rows[1:] if spec.axis == "channel" else rows
    outs = [((4 * p, width), jnp.uint32) for p in PLANES[spec.bits]] + [(scales, jnp.bfloat16)] * 2

    def of_tile(rest: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, tile, *rest), lambda b, t: (b, t, *[0] * len(rest)))

    kept = (width // LANES, tile, LANES) if spec.axis == "channel" else (tile, *rows)
    *words, scale, zero = pl.pallas_call(
        functools.partial(kernel, spec, tile),
        out_shape=[jax.ShapeDtypeStruct((batch, blocks, *rest), dtype) for rest, dtype in outs],
        grid=(batch, pl.cdiv(blocks, tile)),
        in_specs=[of_tile((BLOCK, width))],
        out_specs=[of_tile(rest) for rest, _ in outs],
        scratch_shapes=[pltpu.VMEM(kept, jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=chip.current().vmem * 7 // 8
        ),
        name="quantize",
        interpret=pltpu.InterpretParams() if target.current().interpret else False,
    )(x)
    if spec.axis == "channel":
        return Blocks(tuple(words), scale[:, :, None], zero[:, :, None], spec)
    return Blocks(tuple(words), jnp.swapaxes(scale, -1, -2), jnp.swapaxes(zero, -1, -2), spec)
