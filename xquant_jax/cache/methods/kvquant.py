"""KVQuant (Hooper et al. 2024, arXiv 2401.18079): keys per channel and values per token, to levels learned from text.

Keys are stored before RoPE. The levels of a layer (the paper's nuqX, section 3.3) minimize the error on calibration
text, weighted by the squared gradient of the loss; `xquant calibrate` finds them. The values of a vector that are
farthest from its median are kept with their places (section 3.4), and so is the first token (section 3.5). Where the
paper takes the range of a key's channel from calibration text too, each block of 128 tokens has its own here.
"""

import dataclasses
import math
from typing import Any, ClassVar

from jaxtyping import Array

from xquant_jax.cache.methods.base import FactorSource, check_sink
from xquant_jax.cache.methods.keys_values import KeysValues
from xquant_jax.cache.methods.learned import Codebooks, Need
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import StreamSpec


@dataclasses.dataclass(frozen=True)
class KVQuant(KeysValues):
    """Keys in groups of the 128 tokens of a block, values in groups of all R channels of a token.

    outliers: share of the values of a group that are kept, rounded to a whole number, at least 1 unless 0
    sink: tokens at the start of a sequence that are kept
    """

    name: ClassVar[str] = "kvquant"
    bits: int = 4
    outliers: float = 0.01
    sink: int = 1

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ConfigError(f"bits={self.bits} is not supported by kvquant; choose 2, 3 or 4")
        if not 0 <= self.outliers <= 0.25:
            raise ConfigError(f"outliers={self.outliers} is not a share of the values; choose 0 to 0.25")
        check_sink(self.sink)

    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        width = config.kv_width
        return {
            "key": StreamSpec(
                width, self.bits, "channel", BLOCK, format="codebook", outliers=kept(BLOCK, self.outliers)
            ),
            "value": StreamSpec(
                width, self.bits, "token", width, format="codebook", outliers=kept(width, self.outliers)
            ),
        }

    def needs(self, config: ModelConfig) -> tuple[Need, ...]:
        streams = self.streams(config)
        return (Codebooks(self.bits, self.outliers, self.sink, streams["key"], streams["value"]),)

    def method_params(self, source: FactorSource, number: int) -> Any:
        (need,) = self.needs(source.config)
        return super().method_params(source, number) | {"levels": source.calibrated(need)}

    def codebooks(self, method_params: Any) -> dict[str, Array]:
        return method_params["levels"]

    def absorbed(self, method_params: Any, config: ModelConfig) -> None:
        """None: the streams are read as they are, and keep to the definition."""


def kept(group: int, share: float) -> int:
    """Outliers of a group: its share of them, at least one."""
    return min(group - 1, max(1, math.floor(share * group + 0.5))) if share else 0
