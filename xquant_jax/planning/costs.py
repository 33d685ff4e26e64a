"""What a step costs in operations and bytes."""

import dataclasses
import math
from functools import cache, cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.svd import factor_shapes
from pallas_kernels.xla import TILE_BLOCKS
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush
from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.cache.methods.learned import Codebooks, Directions, Need
from xquant_jax.cache.state import CacheBytes, allocate, cache_bytes
from xquant_jax.config import ModelConfig
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.parameters import build_tree
from xquant_jax.planning.counting import Operations, count
from xquant_jax.planning.devices import Device

CHUNK = 512
"""Prompt tokens fed at once, as in `generate`."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a batch on a device. `intensity`: FLOP per byte; `bound`: what takes longer, compute or memory."""

    flops: float
    bytes: float
    seconds: float
    intensity: float
    bound: str

    @classmethod
    def on(cls, device: Device, flops: float, moved: float) -> "Step":
        bound = "compute" if flops / moved > device.ridge else "memory"
        return cls(float(flops), float(moved), float(device.seconds(flops, moved)), float(flops / moved), bound)


@dataclasses.dataclass(frozen=True)
class Row:
    """One cache method at a context and batch. Tokens per second are those of the whole batch, decoding.

    bytes_per_token: of all layers, growing with the context: codes, scales and running sum
    largest_context: tokens per sequence that fit, at this batch; 0 if not even one block does
    largest_batch: sequences that fit, at this context
    best: tokens per second at the largest batch; None where not one sequence fits
    """

    cache: str
    bytes_per_token: float
    memory: dict[str, int]  # weights, factors, codes, scales, window, scratch, total
    fits: bool
    largest_context: int
    largest_batch: int
    prefill_s: float
    decode: Step
    tokens_per_second: float
    best: float | None


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one cache method costs a model, by context and batch."""

    config: ModelConfig
    cache_config: CacheConfig
    chunk: int = CHUNK

    @property
    def parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(self.config)))

    @cached_property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return _size(parameter_shapes(self.config))

    @cached_property
    def _factors(self) -> tuple[int, int]:
        return _method_param_bytes(self.config, _without_bits(self.cache_config))

    @property
    def method_params(self) -> int:
        """Bytes of the factors that are not parameters already."""
        return self._factors[0]

    def cache(self, batch: int, context: int) -> CacheBytes:
        """Of a cache for so many sequences and tokens each."""
        sizes: dict[str, Any] = {"batch": batch, "tokens": context}
        return cache_bytes(jax.eval_shape(lambda: allocate(self.cache_config, self.config, **sizes)))

    def total(self, batch: int, context: int) -> int:
        """Bytes of weights, factors and cache."""
        return self.weights + self.method_params + self.cache(batch, context).total

    @cached_property
    def _per_block(self) -> dict[str, int]:
        """Bytes of one more block of a sequence, by part."""
        one, two = (dataclasses.asdict(self.cache(1, blocks * BLOCK)) for blocks in (1, 2))
        return {part: two[part] - one[part] for part in one}

    @property
    def bytes_per_token(self) -> float:
        return sum(self._per_block.values()) / BLOCK

    def largest_context(self, usable: int, batch: int) -> int:
        """Tokens of each of `batch` sequences that fit into so many bytes."""
        room = usable - self.total(batch, BLOCK)
        blocks = 0 if room < 0 else 1 + room // (batch * sum(self._per_block.values()))
        return blocks * BLOCK + BLOCK - 1 if blocks else 0

    def largest_batch(self, usable: int, context: int) -> int:
        """Sequences of so many tokens that fit into so many bytes."""
        one, two = self.total(1, context), self.total(2, context)
        return max(0, 1 + (usable - one) // (two - one))

    def decode(self, batch: int, context: Any) -> tuple[Any, Any]:
        """Operations and bytes of a step with `context` tokens in every sequence; contexts may be an array."""
        step, flushing = _operations(self.config, _without_bits(self.cache_config), 1)
        tokens = self._looked_at(context)
        flops = step.once + flushing / BLOCK + step.per_round * tokens / BLOCK
        return batch * flops, self._read_once + batch * (self._window + self._read_per_token(context))

    def prefill(self, device: Device, batch: int, context: int) -> float:
        """Seconds to feed `context` tokens of every sequence, chunk by chunk."""
        step, flushing = _operations(self.config, _without_bits(self.cache_config), self.chunk)
        before = np.arange(0, context, self.chunk, dtype=np.float64)  # tokens that a chunk finds stored
        share = np.minimum(context - before, self.chunk) / self.chunk  # of the last chunk only so much is needed
        flops = (step.once + flushing) * share + step.per_round * self._looked_at(before) / BLOCK
        moved = self._read_once + batch * (self._window + self._read_per_token(before))
        return float(device.seconds(batch * flops, moved).sum())

    def row(self, device: Device, usable: int, context: int, batch: int) -> Row:
        largest = self.largest_batch(usable, context)
        step = Step.on(device, *self.decode(batch, context))
        cache = self.cache(batch, context)
        total = self.weights + self.method_params + cache.total
        sizes = {"weights": self.weights, "factors": self.method_params, **dataclasses.asdict(cache), "total": total}
        return Row(
            cache=str(self.cache_config),
            bytes_per_token=self.bytes_per_token,
            memory=sizes,
            fits=total <= usable,
            largest_context=self.largest_context(usable, batch),
            largest_batch=largest,
            prefill_s=self.prefill(device, batch, context),
            decode=step,
            tokens_per_second=batch / step.seconds,
            best=float(largest / device.seconds(*self.decode(largest, context))) if largest else None,
        )

    @property
    def _read_once(self) -> int:
        """Bytes of weights and factors that a step reads; of an embedding that is not the head too, only rows."""
        embedding = 0 if self.config.tied_embeddings else _size(parameter_shapes(self.config)["embed"])
        return self.weights - embedding + self._factors[1]

    @property
    def _window(self) -> int:
        return self.cache(1, BLOCK).window

    def _read_per_token(self, context: Any) -> Any:
        """Bytes of a sequence's history; a running sum is read and written by every layer that has one."""
        layers = sum(n for method, n in self.cache_config.segments(self.config) if method.has_running_sum)
        stored = (self._per_block["codes"] + self._per_block["scales"]) * self._looked_at(context)
        return (stored + 2 * layers * self._per_block["scratch"] * context) / BLOCK

    def _looked_at(self, context: Any) -> Any:
        """Tokens of the history that a layer reads, the mean over layers: all, or those in its sliding window."""
        if any(method.has_running_sum for method, _ in self.cache_config.segments(self.config)):
            return context
        windows = [window or math.inf for window in self.config.sliding_windows]
        return sum(np.minimum(context, window) for window in windows) / len(windows)


@lru_cache
def parameter_shapes(config: ModelConfig) -> Any:
    """The parameter tree, as shapes."""
    model, tokens = Transformer(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda t: model.init(jax.random.key(0), t, method="score")["params"], tokens)


def _one_layer(config: ModelConfig, layers: dict[str, Any]) -> FactorSource:
    """A source whose arrays are zeros of a single layer: methods show what they make of them."""

    @cache
    def zeros(kind: str, folded: bool, number: int) -> dict[str, Any]:  # by layers too, as a loaded model has them
        shapes = factor_shapes(kind, config)  # pyright: ignore[reportArgumentType]
        return build_tree((path, jnp.zeros((1, *shape), config.dtype)) for path, shape in shapes.items())

    def svd(kind: str, *, folded: bool = False, number: int | None = None) -> dict[str, Any]:
        return zeros(kind, folded, number or config.num_layers)

    def calibrated(need: Need) -> dict[str, Any]:
        match need:
            case Directions(basis=basis, rank=rank):
                heads = 2 * config.num_kv_heads * min(config.width, config.head_dim)
                width = heads if basis == "per_head" else min(config.width, 2 * config.kv_width)
                shapes = {"down": (1, width, rank), "up": (1, rank, width)}
            case Codebooks(bits=bits):
                shapes = dict.fromkeys(("key", "value"), (1, 2**bits))
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}

    return FactorSource(config, layers, svd, calibrated)


@lru_cache(maxsize=256)
def method_params_of_one_layer(config: ModelConfig, cache_config: CacheConfig) -> tuple[tuple[Any, ...], set[int]]:
    """A segment's factors each, and the ids of those leaves that are parameters."""
    layers = parameter_shapes(config)["layers"]
    needed = {name: layers[name] for name in ("attention_norm", "key", "value", "key_norm") if name in layers}
    params = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), needed)
    method_params = cache_config.method_params(_one_layer(config, params))
    return method_params, {id(leaf) for leaf in jax.tree.leaves(params)}


def _method_param_bytes(config: ModelConfig, cache_config: CacheConfig) -> tuple[int, int]:
    """Bytes of all factors, and of those that a step reads; what is a parameter too is not counted."""
    method_params, known = method_params_of_one_layer(config, cache_config)
    held: dict[int, int] = {}
    read = end = 0
    for (_, layers), tree in zip(cache_config.segments(config), method_params, strict=True):
        end += layers
        new = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(tree) if id(leaf) not in known}
        held |= {leaf: end * size for leaf, size in new.items()}  # from layer 0 on, see `CacheConfig.factors`
        read += layers * sum(new.values())
    return sum(held.values()), read


@lru_cache(maxsize=256)
def _operations(config: ModelConfig, cache_config: CacheConfig, tokens: int) -> tuple[Operations, int]:
    """Of a step of one sequence with so many new tokens, a round being a block of history; and of its flush."""
    model, params = Transformer(config), parameter_shapes(config)
    one_layer, _ = method_params_of_one_layer(config, cache_config)
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    method_params = jax.tree.map(lambda a: jax.ShapeDtypeStruct((config.num_layers, *a.shape[1:]), a.dtype), one_layer)
    cache = jax.eval_shape(lambda: allocate(cache_config, config, batch=1, tokens=BLOCK, implementation="xla"))
    step = jax.make_jaxpr(partial(forward, model), return_shape=True)
    jaxpr, (_, longer) = step(params, shape((1, tokens)), cache, method_params, shape((1,)))
    flushing = count(jax.make_jaxpr(flush)(longer, method_params))
    rounds = -(-((BLOCK - 1 + tokens) // BLOCK) // TILE_BLOCKS)  # of adding to a running sum
    return count(jaxpr), flushing.once + rounds * flushing.per_round


def _without_bits(cache_config: CacheConfig) -> CacheConfig:
    """The same method with 4 bits everywhere: factors and operations do not depend on them."""
    method: Any = cache_config.method
    if "bits" not in {field.name for field in dataclasses.fields(method)}:
        return cache_config
    first = {"first": (method.first[0], 4)} if hasattr(method, "first") else {}
    return CacheConfig(dataclasses.replace(method, bits=4, **first))


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
