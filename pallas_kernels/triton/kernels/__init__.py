"""The Triton kernels. They know nothing of JAX."""
