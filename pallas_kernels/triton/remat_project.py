"""`remat_project`: blocks of one layer are dequantized and multiplied."""

from typing import Any

import jax
import triton
from jaxtyping import Array, Float

from pallas_kernels.triton import launching, operands, tiling
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks

COLUMNS = 128  # of the weight at once


def refuse_remat_project(stream: Blocks, weight: Float[Array, "C N"], *, dtype: Any = None) -> str | None:
    """Why the kernel cannot take these, or None."""
    return (
        operands.refuse_device()
        or operands.refuse_type(weight)
        or operands.refuse_stream("the", stream.spec, at_once=64)
    )


def remat_project(stream: Blocks, weight: Float[Array, "C N"], *, dtype: Any = None) -> Float[Array, "B S N"]:
    """See `pallas_kernels.api.remat_project`."""
    batch, blocks = stream.planes[0].shape[:2]
    columns = weight.shape[1]
    tiles = tiling.choose(tiling.Shape("project", "dense", bits=stream.spec.bits, width=stream.spec.width))
    (out,) = launching.run(
        "project",
        *operands.arrays(stream),
        operands.operand(weight),
        grid=(triton.cdiv(columns, COLUMNS), triton.cdiv(batch * blocks, tiles.blocks)),
        outputs=[jax.ShapeDtypeStruct((batch * blocks * BLOCK, columns), dtype or weight.dtype)],
        warps=tiles.warps,
        stages=tiles.stages,
        NUM_BLOCKS=batch * blocks,
        COLUMNS=columns,
        **operands.stream_constants(stream.spec),
        BLOCKS=tiles.blocks,
        CHUNK=operands.chunk(tiles, stream.spec),
        TILE=COLUMNS,
        **operands.types(),
    )
    return out.reshape(batch, blocks * BLOCK, columns)
