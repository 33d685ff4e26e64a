"""The ordinary cache, for comparison: keys after RoPE and values, not quantized."""

import dataclasses
from typing import ClassVar

from xquant_jax.cache.methods.keys_values import KeysValues
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import UNQUANTIZED, StreamSpec


@dataclasses.dataclass(frozen=True)
class BF16(KeysValues):
    """Stores k after RoPE and v as they are. `dtype=float32` stores them exactly in a float32 model."""

    name: ClassVar[str] = "bf16"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"dtype={self.dtype} is not supported; choose bfloat16 or float32")

    @property
    def keys_rotated(self) -> bool:
        return True

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        spec = StreamSpec(config.kv_width, UNQUANTIZED, dtype=self.dtype)
        return {"key": spec, "value": spec}
