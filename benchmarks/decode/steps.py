"""Whole decode steps of a model of random weights."""

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import xquant_jax as xq
from benchmarks.decode.order import KERNELS, LLAMA_3, SMALL, TINY
from benchmarks.models import config_of
from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.config import ModelConfig
from xquant_jax.model import factors
from xquant_jax.model.loading import scans_layers
from xquant_jax.model.transformer import forward
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.parameters import layers_of, stacked

STEPS = 12  # fewer than fill a window


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One more token for sequences with `context` tokens of history in a model's cache."""

    model: str
    cache: str
    batch: int
    context: int
    implementation: str | None = None

    def seconds(self) -> float:
        """Median time of a step."""
        config = config_of(self.model)
        transformer, params = random_model(self.model)
        cache_config = xq.CacheConfig.parse(self.cache)
        method_params = factors.method_params(
            random_factors(config, params), cache_config, None, scan_layers=transformer.scan_layers
        )
        cache = xq.allocate(
            cache_config,
            config,
            batch=self.batch,
            tokens=self.context + BLOCK,
            implementation=self.implementation,
        )
        filled = jnp.full(self.batch, self.context // BLOCK, jnp.int32)
        cache = dataclasses.replace(jax.tree.map(filled_up, cache), lengths=filled * BLOCK, history_blocks=filled)

        @functools.partial(jax.jit, donate_argnames="cache")
        def step(params: Any, method_params: Any, token: jax.Array, cache: xq.Cache) -> tuple[jax.Array, xq.Cache]:
            counts = jnp.ones(self.batch, jnp.int32)
            logits, cache = forward(transformer, params, token, cache, method_params, counts)
            return logits.argmax(-1)[:, None].astype(jnp.int32), cache

        token, times = jnp.ones((self.batch, 1), jnp.int32), []
        for _ in range(STEPS):
            before = time.perf_counter()
            token, cache = jax.block_until_ready(step(params, method_params, token, cache))
            times.append(time.perf_counter() - before)
        return statistics.median(times[2:])


def steps(smoke: bool) -> list[StepRow]:
    """What is timed: as many tokens as let bf16 keys and values fill half of the memory, and no history at all."""
    if smoke:
        return [StepRow(TINY, "xquant:4", *SMALL, KERNELS)]
    config, batch = config_of(LLAMA_3), 8
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 16e9)
    context = int(limit / 2 / (batch * config.num_layers * 4 * config.kv_width)) // BLOCK * BLOCK
    rows = [StepRow(LLAMA_3, cache, batch, context) for cache in ("xquant:4", "bf16", "int8", "xquant:2")]
    return [*rows[:2], StepRow(LLAMA_3, "bf16", batch, BLOCK), *rows[2:]]


def filled_up(a: jax.Array) -> jax.Array:
    """Random numbers in the place of zeros, on which a device would need less power and run faster. The leading axes,
    layers and sequences, hold the same ones: all of them at once would not fit."""
    key, shape = jax.random.key(7), a.shape[-3:]
    if jnp.issubdtype(a.dtype, jnp.floating):  # small enough for scales, and for what they are multiplied with
        return jnp.broadcast_to(jax.random.uniform(key, shape, minval=0.01, maxval=0.02).astype(a.dtype), a.shape)
    if a.dtype == jnp.uint32:
        return jnp.broadcast_to(jax.random.bits(key, shape, a.dtype), a.shape)
    return a


@functools.lru_cache(maxsize=1)  # of all steps: drawing 16 GB takes longer than they do
def random_model(model: str) -> tuple[xq.Transformer, Any]:
    """A transformer, as `load` makes it, and its parameters."""
    config, tokens = config_of(model), jnp.zeros((1, 1), jnp.int32)
    transformer = xq.Transformer(config, scans_layers())
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), tokens, method="score")["params"])
    leaves, tree = jax.tree.flatten(shapes)
    dtype = jnp.dtype(config.dtype)
    drawn = [0.02 * jax.random.normal(jax.random.key(i), a.shape, dtype) for i, a in enumerate(leaves)]
    return transformer, jax.tree.unflatten(tree, drawn)


def random_factors(config: ModelConfig, params: Any) -> FactorSource:
    """Where methods find random factors: only their shapes matter here."""

    def svd(kind: str, *, folded: bool = False, number: int | None = None, balanced: bool = False) -> dict[str, Any]:
        per_head = kind == "per_head"
        rebuild = (config.num_kv_heads,) + 2 * (config.head_dim,) if per_head else 2 * (config.kv_width,)
        project = (config.width, *((config.num_kv_heads, config.head_dim) if per_head else (config.kv_width,)))

        def draw(shape: tuple[int, ...], seed: int) -> jax.Array:
            dtype = jnp.dtype(config.dtype)
            values = jax.random.normal(jax.random.key(seed), (config.num_layers, *shape), dtype)
            return values / jnp.sqrt(jnp.asarray(shape[-2], dtype))

        return {side: {"project": draw(project, 1), "rebuild": draw(rebuild, 2)} for side in ("key", "value")}

    def calibrated(need: Any) -> dict[str, Any]:
        raise xq.ConfigError(f"{need.cache} needs calibration, and random weights have none; choose another cache")

    return FactorSource(config, stacked(factors.needed(layers_of(params))), svd, calibrated)
