"""What a cache method is: which vectors it stores per token, and how keys and values come back from them.

A method is a small frozen dataclass whose fields are its options; a new one is one new file here.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from xquant_jax import attention, rope
from xquant_jax.attention import Geometry, Part
from xquant_jax.cache import Segment
from xquant_jax.config import ModelConfig
from xquant_jax.history import attend_history
from xquant_jax.packing import BLOCK
from xquant_jax.quantization import StreamSpec

ABSORB_UP_TO = 16
"""New tokens per step up to which values are absorbed (decode and drafts); beyond, rebuilding them is cheaper."""


@runtime_checkable
class FactorSource(Protocol):
    """Where a method finds the matrices it needs; every leaf has the leading axis L."""

    @property
    def config(self) -> ModelConfig: ...

    def layer_params(self) -> dict[str, Any]:
        """The transformer's own parameters."""
        ...

    def svd(self, kind: str) -> dict[str, Any]:
        """SVD factors of the key and value weights: `joint`, `per_head` or `kv`."""
        ...


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """What a layer knows of the tokens it is given; `k` is before RoPE, after bias and QK-norm."""

    x: Float[Array, "B T D"]
    k: Float[Array, "B T K d"]
    v: Float[Array, "B T K d"]
    geometry: Geometry


@dataclasses.dataclass(frozen=True)
class Stored:
    """One layer's view of a segment: its unsliced arrays and the index of the layer within them."""

    segment: Segment
    layer: Int[Array, ""]
    flushed: Int[Array, " B"]
    in_window: Int[Array, " B"]

    def window(self) -> dict[str, Array]:
        """The window [B, W, C] of every stream."""
        return {
            name: lax.dynamic_index_in_dim(stream.window, self.layer, keepdims=False)
            for name, stream in self.segment.streams.items()
        }


@dataclasses.dataclass(frozen=True)
class Absorbed:
    """How to attend without rebuilding values: o_h = (p_h z^) M_h, `project` being the product with M_h."""

    key: str  # stream that keys are rebuilt from
    key_rebuild: pallas_kernels.KeyRebuild
    value: str  # stream that probabilities are multiplied with
    value_heads: int  # K: each head reads its own part of the stream; 1: all of it
    project: Callable[[Array], Array] = lambda out: out  # [B, T, H, C] -> [B, T, H, d]


class Method(abc.ABC):
    """A cache method. All functions are pure; `factors` is what `factors()` returned, sliced to one layer."""

    name: ClassVar[str]
    keys_rotated: ClassVar[bool] = False

    @abc.abstractmethod
    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        """What is stored per token and layer."""

    def factors(self, source: FactorSource) -> Any:
        """What the other functions multiply with; every leaf has the leading axis L."""
        return {}

    @abc.abstractmethod
    def encode(self, factors: Any, new: NewTokens) -> dict[str, Float[Array, "B T _C"]]:
        """The vectors to store for new tokens."""

    @abc.abstractmethod
    def rebuild(
        self, factors: Any, vectors: dict[str, Array], config: ModelConfig
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        """Keys (before RoPE, unless `keys_rotated`) and values from stored vectors [B, S, C]: the definition."""

    def absorbed(self, factors: Any, config: ModelConfig) -> Absorbed | None:
        """The same attention with values absorbed, if the method has such a form."""
        return None

    def attend(
        self,
        factors: Any,
        q: Float[Array, "B T H d"],
        stored: Stored,
        geometry: Geometry,
        config: ModelConfig,
        implementation: str | None = None,
    ) -> Part:
        """Attention to everything stored. The fused form and the definition agree up to rounding."""
        if self.keys_rotated:
            q = rope.rotate_heads(q, geometry.positions, geometry.frequencies)
            geometry = dataclasses.replace(geometry, rotated=True)
        absorbed = self.absorbed(factors, config) if q.shape[1] <= ABSORB_UP_TO else None

        def keys_values(vectors: dict[str, Array]) -> tuple[Array, Array]:
            if absorbed is None:
                return self.rebuild(factors, vectors, config)
            z = vectors[absorbed.value]
            k = absorbed.key_rebuild(vectors[absorbed.key], config.num_kv_heads)
            return k, z.reshape(*z.shape[:2], absorbed.value_heads, -1)

        window = {name: vectors.astype(q.dtype) for name, vectors in stored.window().items()}
        recent = attention.attend(
            q, *keys_values(window), geometry, origin=BLOCK * stored.flushed, count=stored.in_window
        )
        history = {name: stream.history for name, stream in stored.segment.streams.items()}
        if absorbed is None:
            old = attend_history(q, history, stored.layer, stored.flushed, keys_values, geometry)
            return attention.merge(recent, old)
        old = pallas_kernels.decode_attention(
            q,
            history[absorbed.key],
            absorbed.key_rebuild,
            history[absorbed.value],
            stored.flushed,
            geometry,
            layer=stored.layer,
            num_kv_heads=config.num_kv_heads,
            value_heads=absorbed.value_heads,
            implementation=implementation,
        )
        both = attention.merge(recent, old)
        return Part(absorbed.project(both.out), both.lse)
