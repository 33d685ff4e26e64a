"""`remat_project` for TPU: x^ W of whole blocks, codes unpacked into the left operand of the matrix unit.

A step of the grid takes a tile of blocks and some columns of W. x^ of the tile is dequantized once, before its first
columns, and kept in vector memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import target
from pallas_kernels.pallas_tpu import chip, unpack
from pallas_kernels.pallas_tpu.streams import LANES, by_block, refuse_stream
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import Blocks, StreamSpec

TILE = 8  # blocks
COLUMNS = 256
TOGETHER = 4  # blocks that share a reading of the columns
UNROLL = 4


def refuse_remat_project(stream: Blocks, weight: Array, *, dtype: Any = None) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    if reason := refuse_stream(stream.spec):
        return f"the stream {reason}"
    if (needed := _bytes(stream.spec.width)) > chip.current().vmem:
        return f"a stream {stream.spec.width} wide takes {needed:,} bytes of vector memory"
    return None


def _bytes(width: int) -> int:
    """Vector memory for x^ of a tile, its words, and columns of W, these twice."""
    return 2 * width * (TILE * BLOCK + 2 * COLUMNS) + 2 * TILE * BLOCK * width + 8 * TILE * BLOCK * COLUMNS


def remat_project(stream: Blocks, weight: Float[Array, "C N"], *, dtype: Any = None) -> Float[Array, "B S N"]:
    """See `pallas_kernels.api.remat_project`."""
    spec = stream.spec
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
        functools.partial(_kernel, spec, tile),
        out_shape=jax.ShapeDtypeStruct((batch, blocks, BLOCK, columns), dtype or weight.dtype),
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


def _kernel(spec: StreamSpec, tile: int, *refs: Any) -> None:
    *words, scale, zero, weight, out, x, scales, zeros = refs

    @pl.when(pl.program_id(2) == 0)
    def _dequantize() -> None:
        for given, rows in ((scale, scales), (zero, zeros)):
            rows[...] = given[...].astype(jnp.float32).reshape(tile, -1, LANES)[:, :, None]

        def strip(number: Array, _: None) -> None:
            block, n = lax.div(number, jnp.int32(strips)), lax.rem(number, jnp.int32(strips))
            lanes = pl.ds(pl.multiple_of(n * LANES, LANES), LANES)
            row = n if spec.axis == "channel" else lax.div(n, jnp.int32(spec.group // LANES))
            s, z = scales[block, row], zeros[block, row]
            if spec.axis == "token":
                s, z = unpack.columns(s, z)
            planes = [words[plane][block, :, lanes] for plane in range(len(PLANES[spec.bits]))]
            x[block, :, lanes] = unpack.in_order(planes, spec.bits, s, z)

        strips = spec.width // LANES
        lax.fori_loop(0, tile * strips, strip, None, unroll=math.gcd(UNROLL, tile * strips))

    def product(number: Array, _: None) -> None:
        blocks = pl.ds(number * together, together)
        left = x[blocks].reshape(together * BLOCK, spec.width)
        right = jnp.dot(left, weight[...], preferred_element_type=jnp.float32)
        out[blocks] = right.astype(out.dtype).reshape(together, BLOCK, -1)

    together = math.gcd(TOGETHER, tile)
    lax.fori_loop(0, tile // together, product, None)
