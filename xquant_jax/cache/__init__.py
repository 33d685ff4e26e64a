"""The cache: what users type (`config`), its arrays (`state`), how they are written and read, and the methods."""
