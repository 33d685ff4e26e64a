"""What a cache method is: which vectors it stores per token, and how keys and values come back from them.

A method is a small frozen dataclass whose fields are its options; a new one is one new file here.
"""

import abc
import dataclasses
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.history import attend_history
from pallas_kernels.xla import times
from xquant_jax.cache.methods.learned import Need
from xquant_jax.cache.state import Segment
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics import attention, rope
from xquant_jax.numerics.attention import Geometry, Part
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, StreamSpec, as_blocks, as_tokens, dequantize

ABSORB_UP_TO = 16
"""New tokens per step up to which values are absorbed (decode and drafts); beyond, rebuilding them is cheaper."""


@runtime_checkable
class FactorSource(Protocol):
    """Where a method finds the matrices it needs; every leaf has the leading axis L, unless fewer layers are asked
    for."""

    @property
    def config(self) -> ModelConfig: ...

    def layer_params(self) -> dict[str, Any]:
        """The transformer's own parameters."""
        ...

    def svd(self, kind: str, *, folded: bool = False, number: int | None = None) -> dict[str, Any]:
        """SVD factors of the key and value weights: `joint`, `per_head` or `kv`, of the first `number` layers.

        `folded`: of the weights with the attention norm's scale multiplied into them.
        """
        ...

    def calibrated(self, need: Need) -> dict[str, Any]:
        """What `xquant calibrate` found on text."""
        ...


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
class Stored:
    """One layer's view of a segment: its unsliced arrays, the index of the layer within them, and the running sum.

    On a mesh a device has some of a sequence's blocks and of its window's places: those from `first_block` and from
    `first_place` on. `flushed` and `in_window` count the whole sequence's.
    """

    segment: Segment
    layer: Int[Array, ""]
    flushed: Int[Array, " B"]
    in_window: Int[Array, " B"]
    running: Blocks | None
    first_block: Int[Array, ""] | int = 0
    first_place: Int[Array, ""] | int = 0

    @property
    def blocks(self) -> int:
        """How many blocks of a sequence this device has room for."""
        return next(iter(self.segment.history.values())).words[0].shape[2]

    def window(self) -> dict[str, Array]:
        """The newest vectors of this layer, [B, W, C] by name."""
        return self._pick(self.segment.window)

    def sink(self) -> dict[str, Array]:
        """The first vectors of this layer's history as they were, [B, n, C] by name."""
        return self._pick(self.segment.sink)

    def _pick(self, arrays: dict[str, Array]) -> dict[str, Array]:
        return {name: lax.dynamic_index_in_dim(a, self.layer, keepdims=False) for name, a in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Absorbed:
    """How to attend without rebuilding values: o_h = (p_h z^) M_h, `project` being the product with M_h."""

    key: str  # vectors that keys are rebuilt from
    key_rebuild: pallas_kernels.KeyRebuild
    value: str  # vectors that probabilities are multiplied with
    value_heads: int  # K: each head reads its own part of them; 1: all of it
    project: Callable[[Array], Array] = lambda out: out  # [B, T, H, C] -> [B, T, H, d]
    prepare: Callable[[dict[str, Array]], dict[str, Array]] | None = None  # before anything else; no kernel has it


class Method(abc.ABC):
    """A cache method. All functions are pure; `factors` is what `factors()` returned, sliced to one layer.

    New tokens are *encoded* to the vectors of the window. At a flush the window's vectors are turned into what is
    *stored*; most methods store them as they are. *Reading* the history gives back vectors like those of the window,
    and from them keys and values are *rebuilt*. Methods that store differences between layers have one stream
    and one vector in the window, and say how the running sum is *accumulated*; that is what they rebuild from.
    """

    name: ClassVar[str]
    accumulates: ClassVar[bool] = False

    @property
    def keys_rotated(self) -> bool:
        """Whether keys are stored after RoPE."""
        return False

    @property
    def sink_tokens(self) -> int:
        """How many tokens at the start of a sequence are kept as they are."""
        return 0

    def layers(self, config: ModelConfig, first: tuple[int, int] | None) -> list[tuple["Method", int]]:
        """The method of each run of layers: (method, number of layers). `first`: so many layers at so many bits."""
        if first is None:
            return [(self, config.num_layers)]
        layers, bits = first
        if not 0 < layers < config.num_layers:
            raise ConfigError(
                f"first={layers}@{bits}: the model has {config.num_layers} layers; choose 1 to {config.num_layers - 1}"
            )
        early: Any = dataclasses.replace(self, bits=bits)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return [(early, layers), (self, config.num_layers - layers)]

    def by_head(self, config: ModelConfig) -> bool:
        """Whether all streams are the kv heads' own parts side by side, so that a device can hold some heads alone.

        Factors that each head has its own of are then named as in `xquant_jax.sharding.PER_HEAD_FACTORS`.
        """
        return False

    @abc.abstractmethod
    def streams(self, config: ModelConfig) -> dict[str, StreamSpec]:
        """What is stored per token and layer."""

    def window(self, config: ModelConfig) -> dict[str, tuple[int, str]]:
        """Width and type of the vectors that the window keeps; by default those that are stored."""
        return {name: (spec.width, spec.dtype) for name, spec in self.streams(config).items()}

    def running(self, config: ModelConfig) -> StreamSpec | None:
        """How the running sum of the history is held, for methods that store differences between layers."""
        return None

    def needs(self, config: ModelConfig) -> tuple[Need, ...]:
        """What the factors take from calibration."""
        return ()

    def factors(self, source: FactorSource, number: int) -> Any:
        """What the other functions multiply with; every leaf has a leading axis of at least the first `number` layers
        (of more where nothing needs to be copied)."""
        return {}

    def codebooks(self, factors: Any) -> dict[str, Float[Array, " levels"]]:
        """Levels of the streams that are quantized to a codebook."""
        return {}

    @abc.abstractmethod
    def encode(self, factors: Any, new: NewTokens) -> dict[str, Float[Array, "B T _C"]]:
        """The window's vectors of new tokens."""

    def store(self, factors: Any, window: dict[str, Array], predicted: Array | None) -> dict[str, Array]:
        """Stream vectors [B, S, C] from the window's; `predicted`: what the running sum becomes if nothing is added."""
        return window

    def accumulation(self, factors: Any) -> pallas_kernels.Accumulation:
        """How the running sum goes from the layer below to this one."""
        raise NotImplementedError(f"{self.name} keeps no running sum")

    @abc.abstractmethod
    def rebuild(
        self, factors: Any, vectors: dict[str, Array], config: ModelConfig
    ) -> tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        """Keys (before RoPE, unless `keys_rotated`) and values from vectors [B, S, C]: the definition."""

    def absorbed(self, factors: Any, config: ModelConfig) -> Absorbed | None:
        """The same attention with values absorbed, if the method has such a form."""
        return None

    def store_and_read(
        self,
        factors: Any,
        window: dict[str, Array],
        running: Blocks | None,
        specs: dict[str, StreamSpec],
        implementation: str | None = None,
    ) -> tuple[dict[str, Blocks], dict[str, Array], Blocks | None]:
        """Quantizes whole blocks of one layer's window vectors [B, S, C], and reads them back.

        The only place where streams are written. Returns them packed, [B, S/128, ...], vectors like the window's, and
        the running sum with this layer in it.
        """
        quantize = partial(pallas_kernels.quantize, implementation=implementation)
        accumulation = self.accumulation(factors) if self.accumulates else None
        predicted = None
        if accumulation is not None and accumulation.predict is not None:
            predicted = _predicted(accumulation.predict, running, implementation)
        vectors, books = self.store(factors, window, predicted), self.codebooks(factors)
        blocks = {name: quantize(as_blocks(v), specs[name], books.get(name)) for name, v in vectors.items()}
        if accumulation is None:
            return blocks, {name: as_tokens(dequantize(b, books.get(name))) for name, b in blocks.items()}, running
        assert running is not None
        (stream,) = (jax.tree.map(lambda a: a[None], stream) for stream in blocks.values())
        all_blocks = jnp.full(*running.words[0].shape[:2])
        running = pallas_kernels.accumulate(  # as in decode
            running, stream, accumulation, all_blocks, layer=0, implementation=implementation
        )
        return blocks, dict.fromkeys(window, as_tokens(dequantize(running))), running

    def without_sink(self, window: dict[str, Array], begins: Bool[Array, " B"]) -> dict[str, Array]:
        """Where a sequence begins, the next token in place of those that are kept: they shall widen no group."""
        n = self.sink_tokens
        if not n:
            return window
        begins = begins[:, None, None]
        return {name: w.at[:, :n].set(jnp.where(begins, w[:, n : n + 1], w[:, :n])) for name, w in window.items()}

    def attend(
        self,
        factors: Any,
        q: Float[Array, "B T H d"],
        stored: Stored,
        geometry: Geometry,
        config: ModelConfig,
        implementation: str | None = None,
    ) -> tuple[Part, Blocks | None]:
        """Attention to everything stored, and the running sum. The absorbed form equals the definition but for
        rounding. On a mesh: to what this device has of it, `config` telling the heads it has."""
        if self.keys_rotated:
            q = rope.rotate_heads(q, geometry.positions, geometry.frequencies)
            geometry = dataclasses.replace(geometry, rotated=True)
        absorbed = self.absorbed(factors, config) if q.shape[1] <= ABSORB_UP_TO else None

        def keys_values(vectors: dict[str, Array]) -> tuple[Array, Array]:
            if absorbed is None:
                return self.rebuild(factors, vectors, config)
            vectors = absorbed.prepare(vectors) if absorbed.prepare else vectors
            z = vectors[absorbed.value]
            k = absorbed.key_rebuild(vectors[absorbed.key], config.num_kv_heads)
            return k, z.reshape(*z.shape[:2], absorbed.value_heads, -1)

        window = {name: vectors.astype(q.dtype) for name, vectors in stored.window().items()}
        recent = attention.attend(
            q,
            *keys_values(window),
            geometry,
            origin=BLOCK * stored.flushed + stored.first_place,
            count=stored.in_window - stored.first_place,
        )
        if self.sink_tokens:
            sink = {name: vectors.astype(q.dtype) for name, vectors in stored.sink().items()}
            count = jnp.where((stored.flushed > 0) & (stored.first_block == 0), self.sink_tokens, 0)
            first = attention.attend(q, *keys_values(sink), geometry, origin=jnp.zeros_like(count), count=count)
            recent = attention.merge(recent, first)
        history, layer, running = stored.segment.history, stored.layer, stored.running
        flushed = jnp.clip(stored.flushed - stored.first_block, 0, stored.blocks)
        geometry = dataclasses.replace(geometry, positions=geometry.positions - BLOCK * stored.first_block)
        if self.accumulates:
            assert running is not None
            (stream,) = history.values()
            accumulation = self.accumulation(factors)
            running = pallas_kernels.accumulate(
                running, stream, accumulation, flushed, layer=layer, implementation=implementation
            )
            total: Blocks = jax.tree.map(lambda a: a[None], running)
            history, layer = dict.fromkeys(window, total), 0
        if absorbed is not None and absorbed.prepare is None:
            old = pallas_kernels.decode_attention(
                q,
                history[absorbed.key],
                absorbed.key_rebuild,
                history[absorbed.value],
                flushed,
                geometry,
                layer=layer,
                num_kv_heads=config.num_kv_heads,
                value_heads=absorbed.value_heads,
                implementation=implementation,
            )
        else:
            if q.shape[1] <= ABSORB_UP_TO:
                pallas_kernels.decode_without_kernel(
                    implementation, f"it has no form of {self.name} with these options"
                )
            old = attend_history(
                q,
                history,
                layer,
                flushed,
                keys_values,
                geometry,
                codebooks=self.codebooks(factors),
                skip=self.sink_tokens - BLOCK * stored.first_block,
            )
        both = attention.merge(recent, old)
        return (both if absorbed is None else Part(absorbed.project(both.out), both.lse)), running


def _predicted(predict: tuple[Array, ...], running: Blocks | None, implementation: str | None) -> Array:
    """The running sum times the matrices, float32 [B, S, C]."""
    assert running is not None
    if not predict:
        return as_tokens(dequantize(running)).astype(jnp.float32)
    first, *others = predict
    project = partial(pallas_kernels.remat_project, dtype=jnp.float32, implementation=implementation)
    return reduce(times, others, project(running, first))
