"""The Triton kernels, by name. They know nothing of JAX."""

from typing import Any

from pallas_kernels.triton.kernels import accumulate, codes, decode_attention, keys, remat_project

MODULES = (codes, keys, decode_attention, remat_project, accumulate)
"""Where the kernels are; later ones import from earlier ones."""


def find(kernel: str) -> Any:
    """The kernel of this name."""
    return next(getattr(module, kernel) for module in MODULES if hasattr(module, kernel))
