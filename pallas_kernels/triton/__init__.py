"""Triton kernels for NVIDIA GPUs since Ampere, and for AMD GPUs as far as Triton carries them.

Each operation is a module with `refuse` and `run`; the kernels themselves are in `kernels`. They multiply in bfloat16
and accumulate in float32; float16 queries and matrices are rounded to bfloat16. `quantize` is XLA's own on a GPU.
"""
