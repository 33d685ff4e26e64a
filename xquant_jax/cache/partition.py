"""How a cache lies on a mesh: the mesh axes that split its blocks, the window's places and the streams' channels."""

import dataclasses
from typing import Any

import jax

from xquant_jax.cache.config import CacheConfig
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.quantization import UNQUANTIZED, Blocks, StreamSpec
from xquant_jax.sharding import RULES, Axes, P, constrain_as, devices_along, named_specs

PER_HEAD_PARAMS: dict[str, tuple[str | None, ...]] = {
    "project": (None, "heads", None),
    "rebuild": ("heads", None, None),
    "bias": ("heads",),
}
"""Logical axes of a layer's method parameters where each head has its own, by the name of the leaf."""


@dataclasses.dataclass(frozen=True)
class CachePartition:
    """The mesh axes that a method's streams are split over: their blocks (and window places), and their channels."""

    blocks: Axes
    channels: Axes

    @property
    def history(self) -> P:
        """Of [L, B, N, rows, C]."""
        return P(None, RULES.batch, self.blocks, None, self.channels)

    @property
    def window(self) -> P:
        """Of [L, B, W, C]."""
        return P(None, RULES.batch, self.blocks, self.channels)

    @property
    def sink(self) -> P:
        """Of [L, B, n, C]."""
        return P(None, RULES.batch, None, self.channels)

    @property
    def running_sum(self) -> P:
        """Of [B, N, rows, C]."""
        return P(RULES.batch, self.blocks)

    def method_params(self, tree: Any) -> Any:
        """Of the leaves of one layer's method parameters."""
        return named_specs(tree, PER_HEAD_PARAMS if self.channels else {})

    def stacked_params(self, tree: Any) -> Any:
        """The same for those of all layers, leading axis L."""
        return jax.tree.map(lambda spec: P(None, *spec), self.method_params(tree), is_leaf=lambda x: isinstance(x, P))

    def share(self, history: dict[str, Blocks]) -> dict[str, Blocks]:
        """Within `on_shards`: a device's own arrays, described as streams of their own width."""
        parts = devices_along(self.channels)

        def own(spec: StreamSpec) -> StreamSpec:
            group = 0 if spec.bits == UNQUANTIZED else spec.group
            return dataclasses.replace(spec, width=spec.width // parts, group=group)

        return {name: dataclasses.replace(blocks, spec=own(blocks.spec)) for name, blocks in history.items()}


def partition_of(cache_config: CacheConfig, config: ModelConfig) -> CachePartition:
    """By head if all streams of all layers belong to heads and no group of channels spans those of two devices."""
    segments, parts = cache_config.segments(config), devices_along(RULES.heads)
    groups = [
        spec.width // spec.group
        for method, _ in segments
        for spec in method.streams(config).values()
        if spec.axis == "token" and spec.bits != UNQUANTIZED
    ]
    by_head = all(method.by_head(config) for method, _ in segments) and all(n % parts == 0 for n in groups)
    return CachePartition(RULES.head_blocks, RULES.heads) if by_head else CachePartition(RULES.whole_blocks, ())


def cache_specs[C: Any](cache: C) -> C:
    """The partition of every array of a cache (`cache.state.Cache`), in its own structure."""
    segments = tuple(
        dataclasses.replace(
            segment,
            history=jax.tree.map(lambda _: cache.partition.history, segment.history),
            window=jax.tree.map(lambda _: cache.partition.window, segment.window),
            sink=jax.tree.map(lambda _: cache.partition.sink, segment.sink),
        )
        for segment in cache.segments
    )
    shared = cache.shared
    if shared is not None:
        rows = None if shared.rows is None else RULES.spec("batch")
        shared = dataclasses.replace(shared, cache=cache_specs(shared.cache), rows=rows)
    return dataclasses.replace(
        cache,
        lengths=RULES.spec("batch"),
        origins=RULES.spec("batch"),
        lost=RULES.spec("batch"),
        history_blocks=RULES.spec("batch"),
        segments=segments,
        running_sum=jax.tree.map(lambda _: cache.partition.running_sum, cache.running_sum),
        shared=shared,
    )


def constrain_cache[C: Any](cache: C) -> C:
    """The cache, asked to lie as `cache_specs` says."""
    return constrain_as(cache, cache_specs(cache))
