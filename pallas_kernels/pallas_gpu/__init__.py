"""Pallas Mosaic kernels for Hopper GPUs."""

from pallas_kernels.pallas_gpu.remat_project_kernel import _load_fields, refuse_remat_project, remat_project

__all__ = ["_load_fields", "refuse_remat_project", "remat_project"]
