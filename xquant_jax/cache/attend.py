"""Attention to all that a layer has stored: of each sequence's own, and of what several share.

On a mesh every device attends to its own share, and the parts are merged by log-sum-exp. Keys and values never travel:
only queries, and one partial result a device.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from xquant_jax import sharding
from xquant_jax.cache.layer import LayerCache, attend_own
from xquant_jax.cache.shared import seated
from xquant_jax.cache.state import Cache
from xquant_jax.config import ModelConfig
from xquant_jax.numerics import attention
from xquant_jax.numerics.attention import LOWEST, Geometry, Part
from xquant_jax.numerics.quantization import Blocks
from xquant_jax.sharding import RULES, Axes, P

RunningSums = tuple[Blocks | None, ...]
"""Of a cache, of what it shares, and so on."""


def attend_stored(
    method_params: Any,
    q: Float[Array, "B T H d"],
    cache: Cache,
    segment: int,
    layer: Int[Array, ""],
    running_sums: RunningSums,
    geometry: Geometry,
    config: ModelConfig,
    new: dict[str, Float[Array, "B T _C"]] | None = None,
) -> tuple[Part, RunningSums]:
    """Attention to everything that a layer has stored, and the running sums with the layer in them.

    segment, layer: the number of the segment, and of the layer in it
    running_sums: those of the layers below
    new: vectors like the window's, of these T tokens: each attends to those before it as it will when they are stored

    Queries of several sequences that begin with the same tokens read these together: to what is stored once they are
    more new tokens of one sequence.
    """
    layer_cache = LayerCache(
        cache.segments[segment],
        layer,
        cache.origins,
        cache.history_blocks,
        cache.window_lengths,
        running_sums[0],
        new=new,
        alone=cache.shared is None,
    )
    own, running_sum = _attend_level(method_params, q, layer_cache, geometry, config, cache)
    if (shared := cache.shared) is None:
        return own, (running_sum,)
    stored = segment, layer, running_sums[1:]
    if shared.rows is None:
        part, after = attend_stored(method_params, q, shared.cache, *stored, geometry, config)
        return attention.merge(own, part), (running_sum, *after)
    parts, after = [own], stored[-1]
    for seats in seated(shared.rows, len(shared.cache.lengths), shared.most, q.shape[1]):
        folded = dataclasses.replace(geometry, positions=seats.fold(geometry.positions, -1))
        part, after = attend_stored(method_params, seats.fold(q, 0), seats.read(shared.cache), *stored, folded, config)
        parts.append(seats.unfold(part))
    return attention.merge(*parts), (running_sum, *after)


def running_sums_of(cache: Cache) -> RunningSums:
    """The running sum of a cache, of what it shares, and so on."""
    return (cache.running_sum, *(() if cache.shared is None else running_sums_of(cache.shared.cache)))


def with_running_sums(cache: Cache, running_sums: RunningSums) -> Cache:
    """The cache with these instead of its own."""
    shared = cache.shared
    if shared is not None:
        shared = dataclasses.replace(shared, cache=with_running_sums(shared.cache, running_sums[1:]))
    return dataclasses.replace(cache, running_sum=running_sums[0], shared=shared)


def _attend_level(
    method_params: Any,
    q: Float[Array, "B T H d"],
    layer_cache: LayerCache,
    geometry: Geometry,
    config: ModelConfig,
    cache: Cache,
) -> tuple[Part, Blocks | None]:
    """Attention to what a layer has stored of each sequence's own.

    `cache` says how the arrays lie and which kernels read them; `layer_cache` holds those of the layer. On a mesh
    queries are gathered from the devices that share a block, and heads split again.
    """
    partition, implementation = cache.partition, cache.implementation
    if not sharding.active():
        return attend_own(method_params, q, layer_cache, geometry, config, implementation)
    heads = sharding.devices_along(partition.channels)
    own_config = dataclasses.replace(
        config, num_heads=config.num_heads // heads, num_kv_heads=config.num_kv_heads // heads
    )
    segment = layer_cache.segment

    def attend(
        method_params: Any,
        q: Array,
        arrays: tuple[Any, ...],
        counts: tuple[Array, Array, Array],
        running_sum: Blocks | None,
        layer: Array,
        positions: Array,
        sliding_window: Array,
        frequencies: Array,
    ) -> tuple[Part, Blocks | None]:
        history, window, sink, new = arrays
        shard = sharding.shard_index(partition.blocks)
        own = LayerCache(
            dataclasses.replace(segment, history=partition.share(history), window=window, sink=sink),
            layer,
            *counts,
            running_sum,
            new,
            layer_cache.alone,
            first_block=shard * next(iter(history.values())).planes[0].shape[2],
            first_place=shard * next(iter(window.values())).shape[2],
        )
        here = dataclasses.replace(
            geometry, positions=positions, sliding_window=sliding_window, frequencies=frequencies
        )
        part, running_sum = attend_own(method_params, q, own, here, own_config, implementation)
        return _merge_over(part, partition.blocks, split), running_sum

    batch = RULES.spec("batch")
    of_queries = P(RULES.batch, None, partition.channels)
    tokens = sharding.tokens_axis(q.shape[1])
    of_result: Any = RULES.spec("batch", tokens, "heads")
    split = {1: RULES.tokens} if tokens else {}
    if not partition.channels:
        split[2] = RULES.heads
    of_running_sum = None if layer_cache.running_sum is None else partition.running_sum
    of_new = None if layer_cache.new is None else P(RULES.batch, None, partition.channels)
    run = sharding.on_shards(
        attend,
        (
            partition.method_params(method_params),
            of_queries,
            (partition.history, partition.window, partition.sink, of_new),
            (batch, batch, batch),
            of_running_sum,
            P(),
            batch,
            P(),
            P(),
        ),
        (Part(of_result, of_result), of_running_sum),
    )
    counts = (layer_cache.origins, layer_cache.history_blocks, layer_cache.window_lengths)
    arrays = (segment.history, segment.window, segment.sink, layer_cache.new)
    window = jnp.asarray(geometry.sliding_window, jnp.int32)
    of_layer = (layer_cache.running_sum, layer_cache.layer)
    return run(method_params, q, arrays, counts, *of_layer, geometry.positions, window, geometry.frequencies)


def _merge_over(part: Part, axes: Axes, split: dict[int, Axes]) -> Part:
    """The merge of the parts that the devices along `axes` have, each keeping its share of what `split` names.

    split: array axis -> mesh axes, which are among `axes`
    """
    top = jnp.maximum(lax.pmax(part.lse, axes), LOWEST)
    weight = jnp.exp(part.lse - top)
    sums = [part.out * weight[..., None], weight]
    for axis, along in split.items():
        sums = [lax.psum_scatter(x, along, scatter_dimension=axis, tiled=True) for x in sums]
        own = sums[1].shape[axis]
        top = lax.dynamic_slice_in_dim(top, own * lax.axis_index(along), own, axis)
    rest = tuple(axis for axis in axes if axis not in sum(split.values(), ()))
    out, total = lax.psum(sums, rest) if rest else sums
    return Part(out / jnp.where(total > 0, total, 1.0)[..., None], top + jnp.log(total))
