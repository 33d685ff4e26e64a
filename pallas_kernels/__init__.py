"""Fused operations on quantized streams: a reference in plain XLA is the definition, one file per backend."""

from pallas_kernels.api import KeyRebuild, decode_attention, recorded, remat_project

__all__ = ["KeyRebuild", "decode_attention", "recorded", "remat_project"]
