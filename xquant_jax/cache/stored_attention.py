"""Attention to everything a layer has stored: every device to its own share, merged over the mesh by log-sum-exp."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from xquant_jax import sharding
from xquant_jax.cache.methods.base import Geometry, Stored
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.attention import LOWEST, Part
from xquant_jax.numerics.quantization import Blocks
from xquant_jax.sharding import RULES, Axes, Layout, P


def attend_stored(
    factors: Any,
    q: Float[Array, "B T H d"],
    stored: Stored,
    geometry: Geometry,
    config: ModelConfig,
    lies: Layout,
    implementation: str | None = None,
) -> tuple[Part, Blocks | None]:
    """`Method.attend`, on a mesh with queries gathered from the devices that share a block, and heads split again.

    Keys and values never travel: only queries, and one partial result per device.
    """
    if not sharding.active():
        return stored.segment.method.attend(factors, q, stored, geometry, config, implementation)
    heads = sharding.devices_along(lies.channels)
    own_config = dataclasses.replace(
        config, num_heads=config.num_heads // heads, num_kv_heads=config.num_kv_heads // heads
    )
    segment = stored.segment

    def attend(
        factors: Any,
        q: Array,
        arrays: tuple[Any, ...],
        running: Blocks | None,
        layer: Array,
        positions: Array,
        sliding_window: Array,
        frequencies: Array,
    ) -> tuple[Part, Blocks | None]:
        history, window, sink, flushed, in_window = arrays
        shard = sharding.shard_index(lies.blocks)
        own = Stored(
            dataclasses.replace(segment, history=lies.share(history), window=window, sink=sink),
            layer,
            flushed,
            in_window,
            running,
            first_block=shard * next(iter(history.values())).words[0].shape[2],
            first_place=shard * next(iter(window.values())).shape[2],
        )
        here = dataclasses.replace(
            geometry, positions=positions, sliding_window=sliding_window, frequencies=frequencies
        )
        part, running = segment.method.attend(factors, q, own, here, own_config, implementation)
        return _merge_over(part, lies.blocks, split), running

    batch = RULES.spec("batch")
    of_queries = P(RULES.batch, None, lies.channels)
    tokens = sharding.tokens_axis(q.shape[1])
    of_result: Any = RULES.spec("batch", tokens, "heads")
    split = {1: RULES.tokens} if tokens else {}
    if not lies.channels:
        split[2] = RULES.heads
    of_running = None if stored.running is None else lies.running
    run = sharding.on_shards(
        attend,
        (
            lies.factors(factors),
            of_queries,
            (lies.history, lies.window, lies.sink, batch, batch),
            of_running,
            P(),
            batch,
            P(),
            P(),
        ),
        (Part(of_result, of_result), of_running),
    )
    arrays = (segment.history, segment.window, segment.sink, stored.flushed, stored.in_window)
    window = jnp.asarray(geometry.sliding_window, jnp.int32)
    return run(factors, q, arrays, stored.running, stored.layer, geometry.positions, window, geometry.frequencies)


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
