"""Attention to everything a layer has stored: every device to its own share, merged over the mesh by log-sum-exp."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from xquant_jax import sharding
from xquant_jax.attention import LOWEST, Part
from xquant_jax.config import ModelConfig
from xquant_jax.methods.base import Geometry, Stored
from xquant_jax.quantization import Blocks
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
        return _merge_over(part, lies), running

    batch = RULES.spec("batch")
    of_queries = P(RULES.batch, None, lies.channels)
    of_result = P(RULES.batch, None, RULES.heads)
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


def _merge_over(part: Part, lies: Layout) -> Part:
    """The merge of the parts that devices along `lies.blocks` have. Heads come back split over `RULES.heads`."""
    top = jnp.maximum(lax.pmax(part.lse, lies.blocks), LOWEST)
    weight = jnp.exp(part.lse - top)
    split: Axes = () if lies.channels else RULES.heads
    out, total = _sum((part.out * weight[..., None], weight), lies.blocks, split)
    if split:
        own = total.shape[2]
        top = lax.dynamic_slice_in_dim(top, own * lax.axis_index(split), own, axis=2)
    return Part(out / jnp.where(total > 0, total, 1.0)[..., None], top + jnp.log(total))


def _sum(tree: Any, axes: Axes, split: Axes) -> Any:
    """Sums over the devices along `axes`; along `split`, which is among them, each keeps its own heads (axis 2)."""
    rest = tuple(axis for axis in axes if axis not in split)
    if split:
        tree = tuple(lax.psum_scatter(x, split, scatter_dimension=2, tiled=True) for x in tree)
    return lax.psum(tree, rest) if rest else tree
