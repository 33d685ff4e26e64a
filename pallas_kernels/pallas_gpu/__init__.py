"""Pallas Mosaic kernels for Hopper GPUs: `remat_project` only, and no decoding."""
