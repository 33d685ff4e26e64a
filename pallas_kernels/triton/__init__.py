"""Triton kernels for NVIDIA GPUs since Ampere, and for AMD GPUs as far as Triton carries them.

Each operation is a module with `refuse` and `run`; the kernels themselves are in `kernels`. They multiply in bfloat16
and accumulate in float32; float16 queries and matrices are rounded to bfloat16. `quantize` is XLA's own on a GPU.
"""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    from triton.backends.nvidia import driver

    if not hasattr(driver, "TMA_TF32"):
        # Triton 3.6 does not say which number this is. jax-triton from 0.4 on imports it, and without it takes NVIDIA's
        # GPUs for none at all.
        setattr(driver, "TMA_TF32", 11)  # noqa: B010
