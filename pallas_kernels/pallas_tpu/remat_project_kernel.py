"""The kernel of `remat_project` for TPU; `remat_project` says how it works and hands over what it reads."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.pallas_tpu import unpack
from pallas_kernels.pallas_tpu.streams import LANES
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import StreamSpec

TOGETHER = 4  # blocks that share a reading of the columns
UNROLL = 4


def kernel(spec: StreamSpec, tile: int, *refs: Any) -> None:
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
