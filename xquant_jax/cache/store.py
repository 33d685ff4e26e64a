"""One layer's vectors to blocks, and back: the only place where streams are written."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

import pallas_kernels
from pallas_kernels import Accumulate, Quantize, RematProject
from pallas_kernels.operands import times
from xquant_jax.cache.methods.base import Method
from xquant_jax.numerics.quantization import (
    UNQUANTIZED,
    Blocks,
    StreamSpec,
    as_blocks,
    as_tokens,
    dequantize,
    quantize,
)


def store_and_read(
    method: Method,
    method_params: Any,
    window: dict[str, Array],
    running_sum: Blocks | None,
    specs: dict[str, StreamSpec],
    implementation: str | None = None,
) -> tuple[dict[str, Blocks], dict[str, Array], Blocks | None]:
    """Quantizes whole blocks of one layer's window vectors [B, S, C], and reads them back.

    Returns them packed, [B, S/128, ...], vectors like the window's, and the running sum with this layer in it.
    """
    accumulation = method.accumulation(method_params) if method.has_running_sum else None
    predicted = None
    if accumulation is not None and accumulation.predict is not None:
        predicted = _predicted(accumulation.predict, running_sum, implementation)
    vectors, books = method.store(method_params, window, predicted), method.codebooks(method_params)
    blocks = {
        name: _quantized(as_blocks(v), specs[name], books.get(name), implementation) for name, v in vectors.items()
    }
    if accumulation is None:
        return blocks, {name: as_tokens(dequantize(b, books.get(name))) for name, b in blocks.items()}, running_sum
    assert running_sum is not None
    (stream,) = (jax.tree.map(lambda a: a[None], stream) for stream in blocks.values())
    all_blocks = jnp.full(*running_sum.planes[0].shape[:2])
    call = Accumulate(running_sum, stream, accumulation, all_blocks, layer=0)
    running_sum = pallas_kernels.run(call, implementation)  # as in decode
    return blocks, dict.fromkeys(window, as_tokens(dequantize(running_sum))), running_sum


def without_sink(method: Method, window: dict[str, Array], begins: Bool[Array, " B"]) -> dict[str, Array]:
    """Where a sequence begins, the next token in place of those that are kept: they shall widen no group."""
    n = method.sink
    if not n:
        return window
    begins = begins[:, None, None]
    return {name: w.at[:, :n].set(jnp.where(begins, w[:, n : n + 1], w[:, :n])) for name, w in window.items()}


def _quantized(x: Array, spec: StreamSpec, codebook: Array | None, implementation: str | None) -> Blocks:
    """Blocks of vectors [B, N, 128, C]; a stream that is stored as it is, is no kernel's matter."""
    if spec.bits == UNQUANTIZED:
        return quantize(x, spec)
    return pallas_kernels.run(Quantize(x, spec, codebook), implementation)


def _predicted(predict: tuple[Array, ...], running_sum: Blocks | None, implementation: str | None) -> Array:
    """The running sum times the matrices, float32 [B, S, C]."""
    assert running_sum is not None
    if not predict:
        return as_tokens(dequantize(running_sum)).astype(jnp.float32)
    first, *others = predict
    call = RematProject(running_sum, first, dtype=jnp.float32)
    return reduce(times, others, pallas_kernels.run(call, implementation))
