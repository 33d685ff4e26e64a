"""Bits for every layer, so that a cache has the size that is asked for: what `xquant calibrate --budget` finds.

How much a layer matters is measured on text: the divergence (`evaluation.divergence`) when it alone is stored at so
many bits. Divergences are about squares of small errors that have little to do with each other, so those of several
layers add up; the bits are those that fit the size with the least sum (`calibration.knapsack`).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from xquant_jax.cache.config import CacheConfig, LayerBits
from xquant_jax.cache.methods.base import Method
from xquant_jax.calibration.knapsack import choose
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.divergence import LayerwiseScorer
from xquant_jax.evaluation.evaluate import paper_ratio
from xquant_jax.numerics.packing import BLOCK, PLANES
from xquant_jax.numerics.quantization import allocate_blocks


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is to be found: bits for every layer of `cache`, with a size of at most `ratio`.

    cache: a method that has bits, with all its options; its bits are found anew
    ratio: as `evaluate.paper_ratio`: codes and scales relative to keys and values of 16 bits

    Raises `ConfigError` for a ratio that is no share, a cache of fixed width, and one that names layers.
    """

    cache: CacheConfig
    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ConfigError(
                f"budget={self.ratio} is not a share of keys and values in 16 bits; choose more than 0 and less than 1"
            )
        if not hasattr(self.cache.method, "bits"):
            raise ConfigError(
                f"budget={self.ratio} is met by other bits for some layers, and {self.cache.method.name} has a fixed "
                f"width; choose a method with bits, for example xquant"
            )
        if self.cache.layer_bits:
            raise ConfigError(
                f"cache {self.cache} says itself which bits some layers have, and the budget is to find them; leave "
                f"{self.cache.layer_bits[0]} out"
            )


@dataclasses.dataclass(frozen=True)
class Choices:
    """How many bits a layer may have: as many as the method takes, rising.

    ways: all layers at these bits, the first ones of xquant-cl too
    sizes: bytes of a layer's block
    """

    bits: tuple[int, ...]
    ways: tuple[CacheConfig, ...]
    sizes: Int[np.ndarray, "L C"]

    @classmethod
    def of(cls, cache: CacheConfig, config: ModelConfig) -> "Choices":
        """Raises `ConfigError` if the cache does not fit the model, whatever its bits."""
        cache.segments(config)
        found = []
        for bits in sorted(PLANES):
            try:
                way = with_bits(cache, [bits] * config.num_layers, config)
            except ConfigError:  # the method, or one of its options, does not take them
                continue
            found.append((bits, way, [_block_bytes(method, config) for method in _methods(way, config)]))
        bits, ways, sizes = zip(*found, strict=True)
        return cls(bits, ways, np.asarray(sizes).T)

    def capacity(self, budget: Budget, config: ModelConfig) -> int:
        """The bytes of all layers' blocks that the budget allows.

        Raises `ConfigError` if the least bits exceed it, or the most do not.
        """
        whole = BLOCK * config.num_layers * 4 * config.kv_width
        least, most = (sizes.sum() / whole for sizes in (self.sizes[:, 0], self.sizes[:, -1]))
        if least > budget.ratio:
            raise ConfigError(
                f"budget={budget.ratio} cannot be met: {self.ways[0]} is the smallest and takes {least:.4f}; choose "
                f"{math.ceil(least * 1000) / 1000} or more"
            )
        if most <= budget.ratio:
            raise ConfigError(
                f"budget={budget.ratio} leaves nothing to find: {self.ways[-1]} has the most bits and takes "
                f"{most:.4f}; use it, or choose less"
            )
        near = math.floor(budget.ratio * whole)  # give or take what floats round
        return max(size for size in (near - 1, near, near + 1) if size / whole <= budget.ratio)


@dataclasses.dataclass(frozen=True)
class Found:
    """A cache that meets a budget, and why it is this one.

    cache: with bits for every layer
    bits: that a layer may have
    divergences: nats per token, with a layer at so many bits and the others as they are without a cache (with
        differences between layers: at the most bits, and less what they cost alone)
    measured: of caches with all layers stored, one number of bits for all of them, and the one that was found
    """

    cache: CacheConfig
    bits: tuple[int, ...]
    divergences: Float[np.ndarray, "L C"]
    measured: dict[CacheConfig, float]


def find(
    model: Any,
    budget: Budget,
    windows: Int[np.ndarray, "W N"],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """The bits of every layer that fit the budget and cost least on these windows; on them, no bits that are the same
    for all layers and fit cost less.

    model: a `Model`, or whatever else has a config, a transformer, params, a source of factors and an implementation
    report: is told how many of how many divergences are measured

    Raises `ConfigError` for a budget that cannot be met or leaves nothing to find, and divergences that are not finite.
    """
    config, cache = model.config, budget.cache
    choices = Choices.of(cache, config)
    capacity = choices.capacity(budget, config)
    same = [_of_bits(cache, bits) for bits in choices.bits]
    measure = _Measure(LayerwiseScorer(model, choices.ways), windows, report, len(choices.bits))
    alone = measure.alone()
    chosen = choose(alone, choices.sizes, capacity)
    assert chosen is not None  # the least bits fit
    found = with_bits(cache, [choices.bits[c] for c in chosen], config)
    caches = [*same, found]
    chosen = [np.asarray([choices.bits.index(m.bits) for m in _methods(c, config)]) for c in caches]
    measured = dict(zip(caches, measure(chosen), strict=True))
    fitting = [c for c in reversed(measured) if paper_ratio(c, config) <= budget.ratio]
    return Found(min(fitting, key=measured.__getitem__), choices.bits, alone, measured)


@dataclasses.dataclass
class _Measure:
    """Mean divergences over windows, and a report of how many are done."""

    scorer: LayerwiseScorer
    windows: Int[np.ndarray, "W N"]
    report: Callable[[int, int], None]
    choices: int
    done: int = 0

    def alone(self) -> Float[np.ndarray, "L C"]:
        """Of every layer by itself, with each of the choices."""
        layers = self.scorer.model.config.num_layers
        none = np.full(layers, self.scorer.others)
        singly = [none]
        for layer, choice in itertools.product(range(layers), range(self.choices)):
            singly.append(none.copy())
            singly[-1][layer] = choice
        base, *alone = self(singly)
        return np.asarray(alone).reshape(layers, self.choices) - base

    def __call__(self, chosen: Sequence[Int[np.ndarray, " L"]]) -> list[float]:
        """One for each of the ways to store all layers."""
        layers = self.scorer.model.config.num_layers
        total = len(self.windows) * (layers * self.choices + 1 + self.choices + 1)
        sums = np.zeros(len(chosen))
        for window in self.windows:
            reference = self.scorer.observe(window)
            for number, own in enumerate(chosen):
                sums[number] += self.scorer.divergence(reference, own)
                self.done += 1
                self.report(self.done, total)
        if not np.isfinite(sums).all():
            raise ConfigError(
                f"a divergence on this text is {sums[~np.isfinite(sums)][0]}: bits cannot be found with it; choose "
                f"another text or dtype"
            )
        return (sums / len(self.windows)).tolist()


def with_bits(cache: CacheConfig, bits: Sequence[int], config: ModelConfig) -> CacheConfig:
    """The cache with these bits of its layers and all its other options, in the shortest form.

    Raises `ConfigError` if it does not take them.
    """

    def form(own: int) -> CacheConfig:
        given = [method.bits for method in _methods(_of_bits(cache, own), config)]
        pairs = [None if old == new else new for old, new in zip(given, bits, strict=True)]
        parts, first = [], 0
        for other, run in itertools.groupby(pairs):
            last = first + len(list(run)) - 1
            if other is not None:
                parts.append(LayerBits(first, last, other))
            first = last + 1
        return dataclasses.replace(_of_bits(cache, own), layer_bits=tuple(parts))

    shortest = min(map(form, sorted(set(bits))), key=lambda c: len(str(c)))
    shortest.segments(config)
    return shortest


def _of_bits(cache: CacheConfig, bits: int) -> CacheConfig:
    """With other bits for all layers that the options leave open."""
    return CacheConfig(cache.method.with_bits(bits))


def _methods(cache: CacheConfig, config: ModelConfig) -> list[Any]:
    """Of every layer."""
    return [method for method, count in cache.segments(config) for _ in range(count)]


def _block_bytes(method: Method, config: ModelConfig) -> int:
    """Of one layer: codes, scales and outliers of 128 tokens."""
    streams = method.streams(config).values()
    blocks = jax.eval_shape(lambda: [allocate_blocks(spec, ()) for spec in streams])
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(blocks))
