"""Decode attention and whole decode steps on the device at hand, `python -m benchmarks.decode.run`."""
