"""The cache methods: each declares what it stores and how keys and values come back; a new one is one file."""
