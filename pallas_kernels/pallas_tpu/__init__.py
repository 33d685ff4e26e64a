"""Pallas Mosaic kernels for TPU v5e, v5p, v6e and v7x: a module for each operation, with `refuse` and `run`."""
