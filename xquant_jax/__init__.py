"""XQuant in JAX: attention caches that store the quantized layer input and rematerialize keys and values.

import xquant_jax as xq
model = xq.load("demo")
print(xq.generate(model, "def main():", cache="xquant:4").results[0].text)

The public names and where they live are written once, in `__init__.pyi`. Each is imported on first use, because
`pallas_kernels` and `converters` build on parts of this package, and it on them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
