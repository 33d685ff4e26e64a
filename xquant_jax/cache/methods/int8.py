"""8-bit keys and values, what most serving stacks use today: the baseline that XQuant has to beat."""

import dataclasses
from typing import ClassVar

from xquant_jax.cache.methods.base import check_sink
from xquant_jax.cache.methods.keys_values import KeysValues
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.quantization import StreamSpec


@dataclasses.dataclass(frozen=True)
class Int8(KeysValues):
    """Stores k before RoPE and v, 8 bits, quantized along the token in groups of `group` channels."""

    name: ClassVar[str] = "int8"
    group: int = 0  # 0: the largest divisor of R that is not above 128
    sink: int = 0  # first tokens of a sequence that are kept as they are

    def __post_init__(self) -> None:
        check_sink(self.sink)

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        spec = StreamSpec(config.kv_width, bits=8, axis="token", group=self.group)
        return {"key": spec, "value": spec}
