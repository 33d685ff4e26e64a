"""KIVI (Liu et al. 2024, arXiv 2402.02750): keys quantized along the channel, values along the token.

The default is KIVI* of the XQuant paper: keys before RoPE, groups of 128. The original quantizes keys after RoPE in
groups of 32: `rope=post,group=32`.
"""

import dataclasses
from typing import ClassVar

from xquant_jax.cache.methods.base import check_sink, clips
from xquant_jax.cache.methods.keys_values import KeysValues
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import StreamSpec, check_bits


@dataclasses.dataclass(frozen=True)
class KIVI(KeysValues):
    """Keys in groups of `group` tokens of a channel, values in groups of `group` channels of a token.

    rope: whether keys are stored before (`pre`) or after (`post`) RoPE
    clip, sink: see `numerics.quantization.clipped` and `Method.sink`; KIVI has neither
    """

    name: ClassVar[str] = "kivi"
    bits: int = 4
    group: int = 0  # 0: the 128 tokens of a block; the largest divisor of R that is not above 128
    rope: str = "pre"
    clip: bool = False
    sink: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sink(self.sink)
        if self.rope not in ("pre", "post"):
            raise ConfigError(f"rope={self.rope} is not supported; choose pre or post")

    @property
    def keys_rotated(self) -> bool:
        return self.rope == "post"

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        return {
            "key": StreamSpec(config.kv_width, self.bits, "channel", self.group, clip=clips(self)),
            "value": StreamSpec(config.kv_width, self.bits, "token", self.group, clip=clips(self)),
        }
