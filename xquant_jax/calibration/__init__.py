"""What some cache methods learn from text, and how it is found. `cache.methods.learned` says which they are, and
`model.calibration_file` where it is kept."""
