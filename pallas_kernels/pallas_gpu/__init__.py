"""Pallas Mosaic kernels for Hopper GPUs: `decode_attention` of some forms and `remat_project`."""
