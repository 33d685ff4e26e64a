"""`remat_project` for TPU: x^ W of whole blocks, codes unpacked into the left operand of the matrix unit.

A step of the grid takes a tile of blocks and some columns of W. x^ of the tile is dequantized once, before its first
columns, and kept in vector memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import target
from pallas_kernels.calls import RematProject
from pallas_kernels.pallas_tpu import chip
from pallas_kernels.pallas_tpu.remat_project_kernel import kernel
from pallas_kernels.pallas_tpu.streams import LANES, by_block
from pallas_kernels.streams import refuse_stream
from xquant_jax.numerics.packing import BLOCK

TILE = 8  # blocks
COLUMNS = 256


def refuse(call: RematProject) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    if reason := refuse_stream("the stream", call.stream.spec, LANES):
        return reason
    if (needed := _bytes(call.stream.spec.width)) > chip.current().vmem:
        return f"a stream {call.stream.spec.width} wide takes {needed:,} bytes of vector memory"
    return None


def _bytes(width: int) -> int:
    """Vector memory for x^ of a tile, its words, and columns of W, these twice."""
    return 2 * width * (TILE * BLOCK + 2 * COLUMNS) + 2 * TILE * BLOCK * width + 8 * TILE * BLOCK * COLUMNS


def run(call: RematProject) -> Array:
    """Multiplies with the kernel, columns padded to whole registers."""
    stream, weight, spec = call.stream, call.weight, call.stream.spec
    batch, blocks = stream.planes[0].shape[:2]
    tile = min(TILE, blocks)
    width, columns = weight.shape[0], -(-weight.shape[1] // LANES) * LANES
    part = math.gcd(COLUMNS, columns)
    padded = jnp.pad(weight.astype(jnp.bfloat16), ((0, 0), (0, columns - weight.shape[1])))
    arrays = [*stream.planes, *(by_block(x, spec.axis, leading=1) for x in (stream.scale, stream.zero))]

    rows = (tile, width // (LANES if spec.axis == "channel" else spec.group), 1, LANES)

    def of_tile(rest: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, tile, *rest), lambda b, t, n: (b, t, *[0] * len(rest)))

    out = pl.pallas_call(
        functools.partial(kernel, spec, tile),
        out_shape=jax.ShapeDtypeStruct((batch, blocks, BLOCK, columns), call.result_dtype),
        grid=(batch, pl.cdiv(blocks, tile), columns // part),
        in_specs=[
            *(of_tile(a.shape[2:]) for a in arrays),
            pl.BlockSpec((width, part), lambda b, t, n: (0, n)),
        ],
        out_specs=pl.BlockSpec((None, tile, BLOCK, part), lambda b, t, n: (b, t, 0, n)),
        scratch_shapes=[pltpu.VMEM((tile, BLOCK, width), jnp.bfloat16), *[pltpu.VMEM(rows, jnp.float32)] * 2],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=chip.current().vmem * 7 // 8
        ),
        name="remat_project",
        interpret=pltpu.InterpretParams() if target.current().interpret else False,
    )(*arrays, padded)
    return out.reshape(batch, blocks * BLOCK, columns)[..., : weight.shape[1]]
