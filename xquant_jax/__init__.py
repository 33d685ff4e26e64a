"""XQuant in JAX: attention caches that store the quantized layer input and rematerialize keys and values.

import xquant_jax as xq
model = xq.load("demo")
print(xq.generate(model, "def main():", cache="xquant:4").results[0].text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xquant_jax.cache.append import append
    from xquant_jax.cache.config import CacheConfig
    from xquant_jax.cache.flush import flush, flush_when_due
    from xquant_jax.cache.state import Cache, CacheBytes, allocate, cache_bytes, check_room
    from xquant_jax.config import ModelConfig
    from xquant_jax.errors import CacheFullError, CheckpointError, ConfigError, PromptError, XQuantError
    from xquant_jax.generation.generate import Generation, StreamedToken, generate, stream
    from xquant_jax.generation.request import Completion
    from xquant_jax.generation.sampling import Sampling
    from xquant_jax.model.loading import Model, load
    from xquant_jax.model.transformer import Transformer, forward
    from xquant_jax.sharding import make_mesh

_MODULES = {
    "cache.state": ("Cache", "CacheBytes", "allocate", "cache_bytes", "check_room"),
    "cache.append": ("append",),
    "cache.flush": ("flush", "flush_when_due"),
    "config": ("ModelConfig",),
    "errors": ("CacheFullError", "CheckpointError", "ConfigError", "PromptError", "XQuantError"),
    "generation.generate": ("Generation", "StreamedToken", "generate", "stream"),
    "generation.request": ("Completion",),
    "model.loading": ("Model", "load"),
    "cache.config": ("CacheConfig",),
    "model.transformer": ("Transformer", "forward"),
    "generation.sampling": ("Sampling",),
    "sharding.mesh": ("make_mesh",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports on first use: `converters` and `pallas_kernels` build on parts of this package, and it on them."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


__all__ = [
    "Cache",
    "CacheBytes",
    "CacheConfig",
    "CacheFullError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Generation",
    "Model",
    "ModelConfig",
    "PromptError",
    "Sampling",
    "StreamedToken",
    "Transformer",
    "XQuantError",
    "allocate",
    "append",
    "cache_bytes",
    "check_room",
    "flush",
    "flush_when_due",
    "forward",
    "generate",
    "load",
    "make_mesh",
    "stream",
]
