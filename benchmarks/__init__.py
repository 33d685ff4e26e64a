"""What is measured, on any machine with the tools at hand; from the root of a clone, `python -m benchmarks.NAME`."""
