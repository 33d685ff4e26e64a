"""Functions of the library that tests call on arrays, each compiled as one program: called eagerly, every operation in
them is a program of its own."""

import jax

from xquant_jax.numerics.packing import unpack
from xquant_jax.numerics.quantization import dequantize, quantize

quantized = jax.jit(quantize, static_argnames="spec")
dequantized = jax.jit(dequantize)
unpacked = jax.jit(unpack, static_argnums=1)
