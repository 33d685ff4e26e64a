"""Pallas Mosaic kernels for TPU v5e, v5p, v6e and v7x."""

from pallas_kernels.pallas_tpu.decode_attention import decode_attention
from pallas_kernels.pallas_tpu.decode_attention_tiling import refuse_decode_attention
from pallas_kernels.pallas_tpu.remat_project import refuse_remat_project, remat_project
from pallas_kernels.pallas_tpu.quantize import quantize, refuse_quantize
from pallas_kernels.pallas_tpu.accumulate import accumulate, refuse_accumulate

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
