"""`remat_project` for Hopper: scales are laid out as the kernel copies them.

Nobody has seen this kernel run on a device: the tests interpret it, with stand-ins for what the interpreter lacks, and
lower it for an H200. `implementation=None` therefore does not choose it.
"""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import gpus, target
from pallas_kernels.calls import RematProject
from pallas_kernels.pallas_gpu.remat_project_kernel import CHANNELS, HALF, RematKernel
from pallas_kernels.streams import refuse_stream
from xquant_jax.numerics.packing import BLOCK

HOPPER = 9.0
"""The only compute capability that has `wgmma`."""


def refuse(call: RematProject) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    stream, weight = call.stream, call.weight
    if call.dtype not in (None, jnp.bfloat16):
        return "its results are bfloat16"
    spec, columns = stream.spec, weight.shape[1]
    capability = gpus.current().capability
    if capability != HOPPER and not target.current().interpret:
        return f"it needs compute capability {HOPPER} (Hopper), and this GPU has {capability}"
    if reason := refuse_stream("the stream", spec, CHANNELS):
        return reason
    if not stream.planes[0].size:
        return "a history without blocks"
    if weight.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16 weights, not {weight.dtype}"
    if columns % HALF:
        return f"a {spec.width} x {columns} weight; it takes multiples of {HALF} columns"
    return None


def run(call: RematProject) -> Array:
    """Multiplies with the kernel."""
    stream, weight = call.stream, call.weight
    batch, num_blocks = stream.planes[0].shape[:2]
    blocks = batch * num_blocks
    scale, zero = (a.reshape(blocks, *a.shape[2:]) for a in (stream.scale, stream.zero))
    if stream.spec.axis == "token":  # a step reads one group of all tokens: [C/G, tokens]
        scale, zero = (a.reshape(blocks * BLOCK, -1).T for a in (scale, zero))
    else:
        scale, zero = (a.reshape(blocks, -1) for a in (scale, zero))
    words = [w.reshape(-1, w.shape[-1]) for w in stream.planes]
    kernel = RematKernel(stream.spec, blocks, weight.shape[1], target.current().interpret)
    return kernel(words, scale, zero, weight).reshape(batch, num_blocks * BLOCK, weight.shape[1])
