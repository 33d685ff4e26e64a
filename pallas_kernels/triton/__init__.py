"""Triton kernels for NVIDIA GPUs since Ampere, and for AMD GPUs as far as Triton carries them.

They multiply in bfloat16 and accumulate in float32; float16 queries and matrices are rounded to bfloat16.
"""

from pallas_kernels.triton.decode_attention import decode_attention, refuse_decode_attention
from pallas_kernels.triton.remat_project import refuse_remat_project, remat_project
from pallas_kernels.triton.quantizing import quantize, refuse_quantize
from pallas_kernels.triton.accumulate import accumulate, refuse_accumulate

__all__ = [
    "accumulate",
    "decode_attention",
    "quantize",
    "refuse_accumulate",
    "refuse_decode_attention",
    "refuse_quantize",
    "refuse_remat_project",
    "remat_project",
]
