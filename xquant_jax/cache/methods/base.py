"""What a cache method is: which vectors it stores per token, and how keys and values come back from them.

A method is a small frozen dataclass whose fields are its options; a new one is one new file here.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array, Float

from pallas_kernels.operands import Accumulation, KeyRebuild
from xquant_jax.cache.methods.learned import Need
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import StreamSpec


@dataclasses.dataclass(frozen=True)
class FactorSource:
    """Where a method finds the matrices that it multiplies with.

    layers: the transformer's own norms before attention, and what it makes keys and values with; every leaf has the
        leading axis L
    svd: (kind, *, folded=False, number=None, balanced=False) -> factors of their key and value weights, `joint`,
        `per_head` or `kv`, with a leading axis of at least the first `number` layers (None: all); folded: of the
        weights with the attention norm's scale multiplied into them; balanced: as `numerics.bases.balanced` turns them
    calibrated: what `xquant calibrate` found on text for a need; raises `ConfigError` if nothing was
    """

    config: ModelConfig
    layers: dict[str, Any]
    svd: Callable[..., dict[str, Any]]
    calibrated: Callable[[Need], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What a layer knows of the tokens it is given: `h` before its norm, `x` after it; `k` is before RoPE, after
    bias and QK-norm."""

    h: Float[Array, "B T D"]
    x: Float[Array, "B T D"]
    k: Float[Array, "B T K d"]
    v: Float[Array, "B T K d"]
    geometry: Geometry
    norm_eps: float


@dataclasses.dataclass(frozen=True)
class Absorbed:
    """How to attend without rebuilding values: o_h = (p_h z^) M_h, `project` being the product with M_h."""

    key: str  # vectors that keys are rebuilt from
    key_rebuild: KeyRebuild
    value: str  # vectors that probabilities are multiplied with
    value_heads: int  # K: each head reads its own part of them; 1: all of it
    project: Callable[[Array], Array] = lambda out: out  # [B, T, H, C] -> [B, T, H, d]
    prepare: Callable[[dict[str, Array]], dict[str, Array]] | None = None  # before anything else; no kernel has it


def check_sink(sink: int) -> None:
    """Raises `ConfigError` for a number of kept tokens that does not fit into the first block."""
    if not 0 <= sink < BLOCK:
        raise ConfigError(f"sink={sink} is not supported; choose 0 to {BLOCK - 1}")


def clips(method: Any) -> bool:
    """Whether the method's `bits` are clipped where it clips at all: 8 bits are not."""
    return method.clip and method.bits < 8


class Method(abc.ABC):
    """A cache method. All functions are pure; `method_params` is what `factors()` returned, sliced to one layer.

    New tokens are *encoded* to the vectors of the window. At a flush the window's vectors are turned into what is
    *stored*; most methods store them as they are. *Reading* the history gives back vectors like those of the window,
    and from them keys and values are *rebuilt*. Methods that store differences between layers have one stream
    and one vector in the window, and say how the running sum is *accumulated*; that is what they rebuild from.
    """

    name: ClassVar[str]
    has_running_sum: ClassVar[bool] = False
    sink = 0
    """Tokens at the start of a sequence that are kept as they are; an option of the methods that quantize."""

    @property
    def keys_rotated(self) -> bool:
        """Whether keys are stored after RoPE."""
        return False

    def layers(self, config: ModelConfig) -> list[tuple["Method", int]]:
        """The method of each run of layers: (method, number of layers)."""
        return [(self, config.num_layers)]

    def with_bits(self, bits: int) -> "Method":
        """The same with other bits, wherever its options do not name any; for methods that have bits."""
        changes: dict[str, Any] = {"bits": bits}
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def by_head(self, config: ModelConfig) -> bool:
        """Whether all streams are the kv heads' own parts side by side, so that a device can hold some heads alone.

        Factors that each head has its own of are then named as in `cache.partition.PER_HEAD_PARAMS`.
        """
        return False

    @abc.abstractmethod
    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        """What is stored per token and layer."""

    def window(self, config: ModelConfig) -> dict[str, tuple[int, str]]:
        """Width and type of the vectors that the window keeps; by default those that are stored."""
        return {name: (spec.width, spec.dtype) for name, spec in self.streams(config).items()}

    def running_sum(self, config: ModelConfig) -> StreamSpec | None:
        """How the running sum of the history is held, for methods that store differences between layers."""
        return None

    def needs(self, config: ModelConfig) -> tuple[Need, ...]:
        """What the factors take from calibration."""
        return ()

    def method_params(self, source: FactorSource, number: int) -> Any:
        """What the other functions multiply with; every leaf has a leading axis of at least the first `number` layers
        (of more where nothing needs to be copied)."""
        return {}

    def codebooks(self, method_params: Any) -> dict[str, Float[Array, " levels"]]:
        """Levels of the streams that are quantized to a codebook."""
        return {}

    @abc.abstractmethod
    def encode(self, method_params: Any, new: NewTokens) -> dict[str, Float[Array, "B T _C"]]:
        """The window's vectors of new tokens."""

    def store(self, method_params: Any, window: dict[str, Array], predicted: Array | None) -> dict[str, Array]:
        """Stream vectors [B, S, C] from the window's; `predicted`: what the running sum becomes if nothing is added."""
        return window

    def accumulation(self, method_params: Any) -> Accumulation:
        """How the running sum goes from the layer below to this one."""
        raise NotImplementedError(f"{self.name} keeps no running sum")

    @abc.abstractmethod
    def rebuild(
        self, method_params: Any, vectors: dict[str, Array], config: ModelConfig
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        """Keys (before RoPE, unless `keys_rotated`) and values from vectors [B, S, C]: the definition."""

    def absorbed(self, method_params: Any, config: ModelConfig) -> Absorbed | None:
        """The same attention with values absorbed, if the method has such a form."""
        return None
