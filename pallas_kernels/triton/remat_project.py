"""`remat_project`: blocks of one layer are dequantized and multiplied."""

import jax
import triton
from jaxtyping import Array

from pallas_kernels.calls import RematProject
from pallas_kernels.streams import refuse_stream
from pallas_kernels.triton import launching, operands, tiling
from xquant_jax.numerics.packing import BLOCK

COLUMNS = 128  # of the weight at once


def refuse(call: RematProject) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    return (
        operands.refuse_device()
        or operands.refuse_type(call.weight)
        or refuse_stream("the stream", call.stream.spec, operands.LEAST_CHANNELS)
    )


def run(call: RematProject) -> Array:
    """Multiplies with the kernel."""
    stream, weight = call.stream, call.weight
    batch, blocks = stream.planes[0].shape[:2]
    columns = weight.shape[1]
    tiles = tiling.choose(tiling.Shape("project", "dense", bits=stream.spec.bits, width=stream.spec.width))
    (out,) = launching.run(
        "project",
        *operands.arrays(stream),
        operands.operand(weight),
        grid=(triton.cdiv(columns, COLUMNS) * triton.cdiv(batch * blocks, tiles.blocks),),
        outputs=[jax.ShapeDtypeStruct((batch * blocks * BLOCK, columns), call.result_dtype)],
        warps=tiles.warps,
        stages=tiles.stages,
        NUM_BLOCKS=batch * blocks,
        COLUMNS=columns,
        **operands.stream_constants(stream.spec),
        BLOCKS=tiles.blocks,
        CHUNK=operands.channels(stream.spec, tiles.chunk),
        TILE=COLUMNS,
        **operands.types(),
    )
    return out.reshape(batch, blocks * BLOCK, columns)
