"""Fused operations on quantized streams: a reference in plain XLA is the definition; a file or folder per backend."""

from pallas_kernels.api import (
    Accumulation,
    KeyRebuild,
    accumulate,
    decode_attention,
    decode_without_kernel,
    quantize,
    recorded,
    remat_project,
)

__all__ = [
    "Accumulation",
    "KeyRebuild",
    "accumulate",
    "decode_attention",
    "decode_without_kernel",
    "quantize",
    "recorded",
    "remat_project",
]
