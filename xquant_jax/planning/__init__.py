"""What fits on which device, and how fast it can be."""
