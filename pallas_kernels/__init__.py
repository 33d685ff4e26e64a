"""Fused operations on quantized streams: plain XLA is their definition, and a folder each holds a backend's kernels."""

from pallas_kernels.api import decode_without_kernel, recorded, run
from pallas_kernels.calls import MOST_NEW_TOKENS, Accumulate, DecodeAttention, Quantize, RematProject
from pallas_kernels.operands import Accumulation, KeyRebuild

__all__ = [
    "MOST_NEW_TOKENS",
    "Accumulate",
    "Accumulation",
    "DecodeAttention",
    "KeyRebuild",
    "Quantize",
    "RematProject",
    "decode_without_kernel",
    "recorded",
    "run",
]
