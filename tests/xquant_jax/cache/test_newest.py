"""A cache with only the first and the newest tokens in it: what it holds, where, and what attention to it sees."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import RandomModel, random_model, random_tokens, tiny_config
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush
from xquant_jax.cache.newest import newest
from xquant_jax.cache.state import Cache, allocate
from xquant_jax.model.transformer import forward

LENGTHS = np.asarray([100, 300, 520, 640], np.int32)
"""Blocks of the history: 0, 2, 4 and 5; the last one's window is empty."""

RUNNING_SUM, FIRST_KEPT = "xquant-cl:4,first=1@4,sink=0", "int8,group=8,sink=4"


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(tiny_config())


@pytest.fixture(scope="module")
def filled(model: RandomModel) -> Callable[[str], tuple[Cache, Any]]:
    """Spec -> a cache with random tokens in it, and the parameters of its method."""

    @functools.cache
    def of(spec: str) -> tuple[Cache, Any]:
        cache_config = CacheConfig.parse(spec)
        method_params = cache_config.method_params(model.source)
        tokens = jnp.asarray(random_tokens(model.config, 4, 640))

        @jax.jit
        def feed(cache: Cache) -> Cache:
            _, fed = forward(model.transformer, model.params, tokens, cache, method_params, jnp.asarray(LENGTHS))
            return flush(fed, method_params)

        return feed(allocate(cache_config, model.config, batch=4, tokens=700)), method_params

    return of


def next_logits(model: RandomModel, method_params: Any, blocks: int) -> Any:
    """Cache -> logits of one token more, with the newest blocks alone; of the whole cache for 0."""

    @jax.jit
    def logits(cache: Cache) -> jax.Array:
        less = newest(cache, blocks) if blocks else cache
        ones = jnp.ones((4, 1), jnp.int32)
        return forward(model.transformer, model.params, ones, less, method_params, jnp.ones(4, jnp.int32))[0]

    return logits


def with_noise(cache: Cache, block: int) -> Cache:
    """The cache with other codes in a block of every sequence."""

    def changed(a: jax.Array) -> jax.Array:
        return a.at[:, :, block].set(a[:, ::-1, block + 1]) if a.ndim > 3 and a.shape[2] == cache.blocks else a

    return jax.tree.map(changed, cache)


@pytest.mark.parametrize("spec", [RUNNING_SUM, FIRST_KEPT])
def test_first_and_newest_tokens_are_attended_to_and_no_others(model: RandomModel, filled: Callable, spec: str) -> None:
    cache, method_params = filled(spec)
    sink = bool(cache.segments[0].sink)
    less = jax.jit(newest, static_argnums=1)(cache, 2)
    assert sink == (spec == FIRST_KEPT)
    assert less.lengths.tolist() == cache.lengths.tolist()
    assert less.window_lengths.tolist() == cache.window_lengths.tolist() == [100, 44, 8, 0]
    assert (less.blocks, less.history_blocks.tolist(), less.origins.tolist()) == (2, [0, 2, 2, 2], [0, 0, 256, 384])
    assert (less.shared is None) == sink
    for number, (own, whole) in enumerate(zip(less.segments, cache.segments, strict=True)):
        for name, blocks in whole.history.items():
            for row, start in ((1, 0), (2, 2), (3, 3)):
                np.testing.assert_array_equal(
                    own.history[name].planes[0][:, row], blocks.planes[0][:, row, start : start + 2]
                )
            if less.shared is not None:
                first = less.shared.cache
                assert first.lengths.tolist() == [0, 0, 128, 128]
                kept = first.segments[number].history[name].planes[0]
                np.testing.assert_array_equal(kept, blocks.planes[0][:, :, :1])

    logits = next_logits(model, method_params, 2)
    seen = logits(cache)
    for block, matters in ((0, not sink), (1, False), (3, True)):  # to the two longest
        change = np.abs(logits(with_noise(cache, block)) - seen)[2:].max(axis=1)
        assert (change > 1e-3).all() if matters else (change == 0).all()
    if sink:
        segments = tuple(
            dataclasses.replace(segment, sink={name: -kept for name, kept in segment.sink.items()})
            for segment in cache.segments
        )
        change = np.abs(logits(dataclasses.replace(cache, segments=segments)) - seen)[2:].max(axis=1)
        assert (change > 1e-3).all()


def test_where_nothing_is_left_out_it_is_the_cache(model: RandomModel, filled: Callable) -> None:
    """Four newest blocks and the first are all five of the longest sequence, at their positions."""
    cache, method_params = filled(RUNNING_SUM)
    whole, less = (next_logits(model, method_params, blocks)(cache) for blocks in (0, 4))
    np.testing.assert_allclose(less, whole, rtol=0, atol=1e-5 * np.ptp(whole))


def test_a_cache_with_no_more_blocks_is_the_same(model: RandomModel) -> None:
    cache = allocate(CacheConfig.parse("int8,group=8"), model.config, batch=2, tokens=300)
    less = newest(cache, 2)
    assert less.shared is None
    jax.tree.map(np.testing.assert_array_equal, less, cache)
