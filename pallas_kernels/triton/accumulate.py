"""`accumulate`: a running sum is read by the programs of all its columns before one of them may overwrite it.

So one kernel lays out what is multiplied, a range of blocks at a time, and a second one multiplies, adds and quantizes
in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
from jaxtyping import Array

from pallas_kernels import gpus
from pallas_kernels.calls import Accumulate
from pallas_kernels.streams import refuse_stream
from pallas_kernels.triton import launching, operands, tiling
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks

COLUMNS = 128  # of a program: the group of the sum
RANGES = 8  # of blocks, that are laid out one after the other, at most
LEAST_RANGE = 256  # blocks of all sequences: enough for the launch of a range not to count


def refuse(call: Accumulate) -> str | None:
    """Why the kernels cannot take a call; None if they can."""
    spec, predict, lift = call.running_sum.spec, call.accumulation.predict or (), call.accumulation.lift
    if (spec.bits, spec.axis, spec.group) != (8, "token", COLUMNS):
        return (
            f"a sum of {spec.bits} bits along the {spec.axis} in groups of {spec.group} is not taken; "
            f"8 bits along the token in groups of {COLUMNS} are"
        )
    if len(predict) > 2:
        return f"{len(predict)} matrices one after the other are not taken; up to 2 are"
    matrices = [*predict, *([] if lift is None else [lift])]
    if narrow := [rows for rows, _ in (matrix.shape for matrix in matrices) if rows % COLUMNS]:
        return f"a matrix of {narrow[0]} rows is not taken; multiples of {COLUMNS} are"
    if not launching.CAN_UPDATE:
        return "jax-triton before 0.4 cannot update arrays in place; pip install --upgrade jax-triton"
    capability = gpus.current().capability
    if matrices and 10 <= capability < 11:
        return f"Triton's compiler fails on the products of sums for compute capability {capability}"
    return (
        operands.refuse_device()
        or next((reason for reason in map(operands.refuse_type, matrices) if reason), None)
        or refuse_stream("the sum", spec, COLUMNS)
        or refuse_stream("the stream", call.stream.spec, COLUMNS)
    )


def run(call: Accumulate) -> Blocks:
    """Adds in place.

    Beside the sum, what the last matrix and the lift are multiplied with is laid out in bfloat16, for an eighth of the
    blocks at a time, or 256 of all sequences if that is more.
    """
    running_sum, stream, accumulation = call.running_sum, call.stream, call.accumulation
    batch, num_blocks = running_sum.planes[0].shape[:2]
    predict, lift = accumulation.predict or (), accumulation.lift
    form = "dense" if predict or lift is not None else ""
    tiles = tiling.choose(tiling.Shape("sum", form, bits=stream.spec.bits, width=running_sum.spec.width))
    size = num_blocks
    if predict or lift is not None:
        size = min(num_blocks, max(triton.cdiv(num_blocks, RANGES), triton.cdiv(LEAST_RANGE, batch)))
    in_range = triton.cdiv(size, tiles.blocks)
    shared: dict[str, Any] = {
        "NUM_BLOCKS": num_blocks,
        "BATCH": batch,
        "TILES": in_range,
        "BLOCKS": tiles.blocks,
        "CHUNK": tiles.chunk or COLUMNS,
        "warps": tiles.warps,
    }
    history_blocks, layer = call.history_blocks.astype(jnp.int32), jnp.asarray(call.layer, jnp.int32)

    def lay_out(blocks: Blocks, scalars: Array, matrix: Array | None) -> Array:
        width = blocks.spec.width if matrix is None else matrix.shape[1]
        shape = (batch, in_range * tiles.blocks * BLOCK, width)
        (out,) = launching.run(
            "lay_out",
            scalars,
            history_blocks,
            *operands.arrays(blocks),
            scalars if matrix is None else operands.operand(matrix),
            grid=(width // COLUMNS * batch * in_range,),
            outputs=[jax.ShapeDtypeStruct(shape, operands.operand_type())],
            stages=1,
            OUT_WIDTH=width,
            MULTIPLY=matrix is not None,
            **shared,
            **operands.stream_constants(blocks.spec),
            **operands.types(),
        )
        return out

    for first in range(0, num_blocks, in_range * tiles.blocks):
        of_sum, of_stream = (jnp.stack([number, jnp.int32(first)]) for number in (jnp.int32(0), layer))
        below = lay_out(running_sum, of_sum, predict[0] if len(predict) == 2 else None) if predict else of_sum
        stored = of_sum if lift is None else lay_out(stream, of_stream, None)
        *words, scale, zero = launching.run(
            "add",
            of_stream,
            history_blocks,
            *operands.arrays(stream),
            below,
            operands.operand(predict[-1]) if predict else of_sum,
            stored,
            of_sum if lift is None else operands.operand(lift),
            grid=(running_sum.spec.width // COLUMNS * batch * in_range,),
            updated=operands.arrays(running_sum),
            stages=tiles.stages,
            SUM_WIDTH=running_sum.spec.width,
            BELOW=predict[-1].shape[0] if predict else 0,
            STORED=0 if lift is None else lift.shape[0],
            ADD_SUM=accumulation.predict == (),
            **{name: operands.types()[name] for name in ("PRECISION", "ASSEMBLY")},
            **shared,
            **operands.stream_constants(stream.spec),
        )
        running_sum = Blocks(tuple(words), scale, zero, running_sum.spec)
    return running_sum
