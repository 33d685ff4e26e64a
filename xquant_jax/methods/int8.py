"""8-bit keys and values, what most serving stacks use today: the baseline that XQuant has to beat."""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array

from pallas_kernels import KeyRebuild
from xquant_jax.config import ModelConfig
from xquant_jax.methods.base import Absorbed, Method, NewTokens
from xquant_jax.methods.bf16 import flat, split
from xquant_jax.quantization import StreamSpec


@dataclasses.dataclass(frozen=True)
class Int8(Method):
    """Stores k before RoPE and v, 8 bits, quantized along the token in groups of `group` channels."""

    name: ClassVar[str] = "int8"
    group: int = 0  # 0: the largest divisor of R that is not above 128

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        spec = StreamSpec(config.kv_width, bits=8, axis="token", group=self.group)
        return {"key": spec, "value": spec}

    def encode(self, factors: Any, new: NewTokens) -> dict[str, Array]:
        return {"key": flat(new.k), "value": flat(new.v)}

    def rebuild(self, factors: Any, vectors: dict[str, Array], config: ModelConfig) -> tuple[Array, Array]:
        return split(vectors["key"], config), split(vectors["value"], config)

    def absorbed(self, factors: Any, config: ModelConfig) -> Absorbed:
        return Absorbed("key", KeyRebuild(), "value", config.num_kv_heads)
