"""8-bit floating-point keys and values (e4m3), the other 8-bit cache that serving stacks offer."""

import dataclasses
from typing import ClassVar

from xquant_jax.cache.methods.base import check_sink
from xquant_jax.cache.methods.keys_values import KeysValues
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import StreamSpec


@dataclasses.dataclass(frozen=True)
class FP8(KeysValues):
    """Stores k before RoPE and v in one byte each, with a bfloat16 scale per `token` or per token and `head`."""

    name: ClassVar[str] = "fp8"
    scale: str = "head"
    sink: int = 0  # first tokens of a sequence that are kept as they are

    def __post_init__(self) -> None:
        check_sink(self.sink)
        if self.scale not in ("token", "head"):
            raise ConfigError(f"scale={self.scale} is not supported; choose token or head")

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        group = config.head_dim if self.scale == "head" else config.kv_width
        spec = StreamSpec(config.kv_width, bits=8, axis="token", group=group, format="e4m3")
        return {"key": spec, "value": spec}
