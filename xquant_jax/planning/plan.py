"""What fits on a device and how fast it can be, for every cache method, from shapes alone.

Bytes are those of the arrays that a model, its factors and a cache would be. Operations are counted in the program
that would run (`xquant_jax.planning.counting`): rebuilding keys, absorbing values and summing differences included.
Times are a roofline: what is rebuilt stays on the chip, arithmetic and memory overlap perfectly, weights are read once
a step. No program is faster; docs/plan.md says how far ours are from it.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.families import model_config
from converters.shards import read_json
from converters.svd import factor_shapes
from pallas_kernels.history import TILE_BLOCKS
from xquant_jax.cache.config import METHODS, CacheConfig
from xquant_jax.cache.methods.learned import Codebooks, Directions, Need
from xquant_jax.cache.state import CacheBytes, allocate, cache_bytes, flush
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.model.loading import DEMO
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.planning.counting import Operations, count
from xquant_jax.planning.devices import Device

BASELINE = "bf16"

RESERVE = 0.1
"""Share of a device's memory that is left to temporaries and the runtime."""

CHUNK = 512
"""Prompt tokens fed at once, as in `generate`."""

PAPER_RIDGE = 756e12 / 2e12
"""FLOP per byte of the device in section 3.4 of the XQuant paper."""


def read_config(model: str | Path) -> ModelConfig:
    """The model of a directory, of "demo", or of a `config.json` without weights; its weights in bfloat16.

    Raises `CheckpointError` for a file that cannot be read, `ConfigError` for a model that is not supported.
    """
    path = DEMO if str(model) == "demo" else Path(model)
    config = model_config(read_json(path / "config.json" if path.is_dir() else path))
    return dataclasses.replace(config, dtype="bfloat16")


def default_specs(config: ModelConfig) -> list[str]:
    """Every method at every bit width that it has, and the other forms of XQuant for grouped queries."""
    low_rank = f",basis=per_head,rank={config.kv_width // 4}"
    forms = {"xquant": ("", ",basis=joint"), "xquant-cl": ("", ",predict=paper", low_rank)}
    forms = {} if config.is_multi_head else forms
    specs = []
    for name, method in METHODS.items():
        if "bits" not in {field.name for field in dataclasses.fields(method)}:  # pyright: ignore[reportArgumentType]
            specs.append(name)
            continue
        for form in forms.get(name, ("",)):
            specs += [f"{name}:{bits}{form}" for bits in PLANES if _has(f"{name}:{bits}{form}", config)]
    return specs


def _has(spec: str, config: ModelConfig) -> bool:
    """Whether the method has this width at all."""
    try:
        CacheConfig.parse(spec).segments(config)
    except ConfigError:
        return False
    return True


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
class Plan:
    """Rows of all methods. `usable`: bytes of the device's memory that weights and cache may take.

    hidden_below: the limit of `hidden_below` by bits on this device; `hidden_below_in_paper`: on the paper's, at 2 bits
    """

    model: str
    device: Device
    context: int
    batch: int
    chunk: int
    usable: int
    parameters: int
    baseline: Row
    rows: list[Row]
    hidden_below: dict[str, float | None]
    hidden_below_in_paper: float | None

    def speed(self, row: Row) -> float:
        """Decoding speed relative to bf16 at the same context and batch, memory aside."""
        return self.baseline.decode.seconds / row.decode.seconds

    def to_json(self) -> dict[str, Any]:
        device = dataclasses.asdict(self.device) | {"ridge": self.device.ridge}
        rows = [dataclasses.asdict(row) | {"speed_over_bf16": self.speed(row)} for row in self.rows]
        return dataclasses.asdict(self) | {
            "device": device,
            "rows": rows,
            "slower_than_bf16": [row.cache for row in self.rows if self.speed(row) < 1],
        }


def plan(
    config: ModelConfig,
    device: Device,
    *,
    context: int,
    batch: int,
    specs: Sequence[str] | None = None,
    model: str = "",
    chunk: int = CHUNK,
    reserve: float = RESERVE,
) -> Plan:
    """Every method of `specs` (by default all there are) on one device, with `context` tokens in each of `batch` rows.

    Raises `ConfigError` for sizes that are not possible, and for weights that alone are too large.
    """
    for name, value in (("context", context), ("batch", batch), ("chunk", chunk)):
        if value < 1:
            raise ConfigError(f"{name}={value} is not possible; choose 1 or more")
    if not 0 <= reserve < 1:
        raise ConfigError(f"reserve={reserve} is not a share of the memory; choose 0 or more and less than 1")
    usable = int(device.memory * (1 - reserve))
    baseline = Costs(config, CacheConfig.parse(BASELINE), chunk)
    if baseline.weights > usable:
        raise ConfigError(
            f"the weights take {gib(baseline.weights)}, and of the {gib(device.memory)} of a {device.name} "
            f"{gib(usable)} can be used: {gib(baseline.weights - usable)} too much; choose a larger device, or a mesh "
            f"of several (scripts/aot_compile.py)"
        )
    costs = [Costs(config, CacheConfig.parse(spec), chunk) for spec in specs or default_specs(config)]
    return Plan(
        model=model,
        device=device,
        context=context,
        batch=batch,
        chunk=chunk,
        usable=usable,
        parameters=baseline.parameters,
        baseline=baseline.row(device, usable, context, batch),
        rows=[cost.row(device, usable, context, batch) for cost in costs],
        hidden_below={f"{bits} bits": hidden_below(config, device.ridge, bits) for bits in (2, 4)},
        hidden_below_in_paper=hidden_below(config, PAPER_RIDGE, 2),
    )


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
        return _factor_bytes(self.config, _without_bits(self.cache_config))

    @property
    def factors(self) -> int:
        """Bytes of the factors that are not parameters already."""
        return self._factors[0]

    def cache(self, batch: int, context: int) -> CacheBytes:
        """Of a cache for so many sequences and tokens each."""
        sizes = {"batch": batch, "tokens": context}
        return cache_bytes(jax.eval_shape(lambda: allocate(self.cache_config, self.config, **sizes)))

    def total(self, batch: int, context: int) -> int:
        """Bytes of weights, factors and cache."""
        return self.weights + self.factors + self.cache(batch, context).total

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
        total = self.weights + self.factors + cache.total
        sizes = {"weights": self.weights, "factors": self.factors, **dataclasses.asdict(cache), "total": total}
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
        layers = sum(n for method, n in self.cache_config.segments(self.config) if method.accumulates)
        stored = (self._per_block["codes"] + self._per_block["scales"]) * self._looked_at(context)
        return (stored + 2 * layers * self._per_block["scratch"] * context) / BLOCK

    def _looked_at(self, context: Any) -> Any:
        """Tokens of the history that a layer reads, the mean over layers: all, or those in its sliding window."""
        if any(method.accumulates for method, _ in self.cache_config.segments(self.config)):
            return context
        windows = [window or math.inf for window in self.config.sliding_windows]
        return sum(np.minimum(context, window) for window in windows) / len(windows)


def hidden_below(config: ModelConfig, ridge: float, bits: int) -> float | None:
    """Cached tokens up to which rebuilding keys and values hides behind loading a layer's weights; None: any number.

    XQuant paper, section 3.4, for one sequence and both keys and values rebuilt (ours absorbs values), with ridge P:
    4 l D^2 = P (e/8 l D + 24 D^2) for multi-head models, 4 l R^2 = P (e/8 l R + 26 D^2 + 4 R^2) for grouped queries.
    """
    D, R = config.width, config.kv_width
    weights = 24 * D**2 if config.is_multi_head else 26 * D**2 + 4 * R**2
    excess = 4 * R**2 - ridge * bits / 8 * R  # operations of a token above those that fit beside loading it
    return ridge * weights / excess if excess > 0 else None


@lru_cache
def parameter_shapes(config: ModelConfig) -> Any:
    """The parameter tree, as shapes."""
    model, tokens = Transformer(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda t: model.init(jax.random.key(0), t, method="score")["params"], tokens)


@dataclasses.dataclass(frozen=True)
class _OneLayer:
    """A `FactorSource` whose arrays are zeros of a single layer: methods show what they make of them."""

    config: ModelConfig
    params: dict[str, Any]
    _svd: dict[tuple[str, bool, int], Any] = dataclasses.field(default_factory=dict)

    def layer_params(self) -> dict[str, Any]:
        return self.params

    def svd(self, kind: str, *, folded: bool = False, number: int | None = None) -> dict[str, Any]:
        key = (kind, folded, number or self.config.num_layers)  # by layers too, as a loaded model has them
        if key not in self._svd:
            tree: dict[str, Any] = {}
            for path, shape in factor_shapes(kind, self.config).items():  # pyright: ignore[reportArgumentType]
                side, _, name = path.rpartition(".")
                (tree.setdefault(side, {}) if side else tree)[name] = jnp.zeros((1, *shape), self.config.dtype)
            self._svd[key] = tree
        return self._svd[key]

    def calibrated(self, need: Need) -> dict[str, Any]:
        c = self.config
        match need:
            case Directions(basis=basis, rank=rank):
                heads = 2 * c.num_kv_heads * min(c.width, c.head_dim)
                width = heads if basis == "per_head" else min(c.width, 2 * c.kv_width)
                shapes = {"down": (1, width, rank), "up": (1, rank, width)}
            case Codebooks(bits=bits):
                shapes = dict.fromkeys(("key", "value"), (1, 2**bits))
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}


@lru_cache(maxsize=256)
def factors_of_one_layer(config: ModelConfig, cache_config: CacheConfig) -> tuple[tuple[Any, ...], set[int]]:
    """A segment's factors each, and the ids of those leaves that are parameters."""
    layers = parameter_shapes(config)["layers"]
    needed = {name: layers[name] for name in ("attention_norm", "key", "value", "key_norm") if name in layers}
    params = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), needed)
    factors = cache_config.factors(_OneLayer(config, params))
    return factors, {id(leaf) for leaf in jax.tree.leaves(params)}


def _factor_bytes(config: ModelConfig, cache_config: CacheConfig) -> tuple[int, int]:
    """Bytes of all factors, and of those that a step reads; what is a parameter too is not counted."""
    factors, known = factors_of_one_layer(config, cache_config)
    held: dict[int, int] = {}
    read = end = 0
    for (_, layers), tree in zip(cache_config.segments(config), factors, strict=True):
        end += layers
        new = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(tree) if id(leaf) not in known}
        held |= {leaf: end * size for leaf, size in new.items()}  # from layer 0 on, see `CacheConfig.factors`
        read += layers * sum(new.values())
    return sum(held.values()), read


@lru_cache(maxsize=256)
def _operations(config: ModelConfig, cache_config: CacheConfig, tokens: int) -> tuple[Operations, int]:
    """Of a step of one sequence with so many new tokens, a round being a block of history; and of its flush."""
    model, params = Transformer(config, "xla"), parameter_shapes(config)
    one_layer, _ = factors_of_one_layer(config, cache_config)
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    factors = jax.tree.map(lambda a: jax.ShapeDtypeStruct((config.num_layers, *a.shape[1:]), a.dtype), one_layer)
    cache = jax.eval_shape(lambda: allocate(cache_config, config, batch=1, tokens=BLOCK))
    step = jax.make_jaxpr(partial(forward, model), return_shape=True)
    jaxpr, (_, longer) = step(params, shape((1, tokens)), cache, factors, shape((1,)))
    flushing = count(jax.make_jaxpr(partial(flush, implementation="xla"))(longer, factors))
    rounds = -(-((BLOCK - 1 + tokens) // BLOCK) // TILE_BLOCKS)  # of adding to a running sum
    return count(jaxpr), flushing.once + rounds * flushing.per_round


def _without_bits(cache_config: CacheConfig) -> CacheConfig:
    """The same method with 4 bits everywhere: factors and operations do not depend on them."""
    method: Any = cache_config.method
    if "bits" not in {field.name for field in dataclasses.fields(method)}:
        return cache_config
    first = cache_config.first and (cache_config.first[0], 4)
    return CacheConfig(dataclasses.replace(method, bits=4), first)


def without_bits(spec: str) -> tuple[str, int | None]:
    """A spec without its bits, and these: what rows that differ in nothing else have in common."""
    head, *options = spec.split(",")
    name, _, bits = head.partition(":")
    return ",".join([name, *options]), int(bits.split(";")[0]) if bits else None


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"
