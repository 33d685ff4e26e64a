"""The cache's bytes and its bookkeeping: windows, flushes, ragged rows, capacity."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_config
from xquant_jax.cache.append import append
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush, flush_when_due
from xquant_jax.cache.state import Cache, allocate, cache_bytes, check_room
from xquant_jax.errors import CacheFullError
from xquant_jax.numerics.quantization import dequantize

pytestmark = pytest.mark.optimized

CONFIG = tiny_config(width=256, num_heads=8, num_kv_heads=2, head_dim=64)  # R = 128
LENGTHS = np.asarray([300, 255, 127, 1], np.int32)


def vectors(cache: Cache, length: int, seed: int = 0) -> tuple[dict[str, jax.Array], ...]:
    """Random vectors for every stream, [L, B, T, C]."""
    rng = np.random.default_rng(seed)
    return tuple(
        {
            name: jnp.asarray(rng.standard_normal((*window.shape[:2], length, window.shape[3])), jnp.float32)
            for name, window in segment.window.items()
        }
        for segment in cache.segments
    )


def none(cache: Cache) -> tuple[dict[str, Any], ...]:
    """Factors for methods that store the window's vectors as they are."""
    return tuple({} for _ in cache.segments)


def feed(cache: Cache, new: Any, piece: int) -> Cache:
    """Appends LENGTHS tokens, `piece` at a time, right-padded."""
    step = jax.jit(lambda cache, new, counts: flush(append(cache, new, counts), none(cache)))
    for start in range(0, LENGTHS.max(), piece):
        part = jax.tree.map(lambda a, start=start: a[:, :, start : start + piece], new)
        cache = step(cache, part, np.clip(LENGTHS - start, 0, piece))
    return cache


@pytest.mark.parametrize("spec", ["int8", "xquant:3,first=1@2"])
def test_one_at_a_time_in_chunks_and_at_once_store_the_same_bytes(spec: str) -> None:
    empty = allocate(CacheConfig.parse(spec), CONFIG, batch=4, tokens=300)
    new = vectors(empty, 300)
    at_once = feed(empty, new, 300)
    assert (at_once.history_blocks == LENGTHS // 128).all()

    @jax.jit
    def one_at_a_time(cache: Cache) -> Cache:
        def body(i: jax.Array, cache: Cache) -> Cache:
            token = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1, axis=2), new)
            return flush_when_due(append(cache, token, (i < LENGTHS).astype(jnp.int32)), none(cache))

        return jax.lax.fori_loop(0, 300, body, cache)

    for other in (feed(empty, new, 100), one_at_a_time(empty)):
        assert (other.lengths == at_once.lengths).all()
        for a, b in zip(at_once.segments, other.segments, strict=True):
            jax.tree.map(np.testing.assert_array_equal, a.history, b.history)
            for name in a.window:
                for row, kept in enumerate(LENGTHS % 128):
                    windows = (s.window[name][:, row, :kept] for s in (a, b))
                    np.testing.assert_array_equal(*map(np.asarray, windows))


def test_stored_vectors_come_back_in_order() -> None:
    cache = allocate(CacheConfig.parse("bf16,dtype=float32"), CONFIG, batch=4, tokens=300)
    new = vectors(cache, 300)
    cache = feed(cache, new, 70)
    for name, window in cache.segments[0].window.items():
        history = np.asarray(dequantize(cache.segments[0].history[name]))
        for row, length in enumerate(LENGTHS):
            whole = length // 128
            old = history[:, row, :whole].reshape(2, whole * 128, window.shape[-1])
            got = np.concatenate([old, np.asarray(window)[:, row, : length % 128]], axis=1)
            np.testing.assert_array_equal(got, np.asarray(new[0][name])[:, row, :length])


def test_padding_is_never_stored() -> None:
    """A row without new tokens keeps its window and history untouched."""
    cache = allocate(CacheConfig.parse("xquant:4"), CONFIG, batch=4, tokens=500)
    cache = feed(cache, vectors(cache, 300), 300)
    after = flush(append(cache, vectors(cache, 200, seed=1), jnp.asarray([0, 200, 0, 0])), none(cache))
    before, after = cache.segments[0], after.segments[0]
    for row in (0, 2, 3):
        kept = LENGTHS[row] % 128
        for name in before.window:
            windows = (np.asarray(segment.window[name])[:, row, :kept] for segment in (before, after))
            np.testing.assert_array_equal(*windows)
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_array_equal(a[:, row], b[:, row]), before.history, after.history
        )


def test_rejected_tokens_are_taken_back_by_shortening_lengths() -> None:
    """A window with room for a draft: of 10 tokens 4 are accepted, and the next ones take their places."""
    cache = allocate(CacheConfig.parse("bf16,dtype=float32"), CONFIG, batch=1, tokens=300, max_step=10)
    new = vectors(cache, 140)
    cache = flush(append(cache, jax.tree.map(lambda a: a[:, :, :125], new), jnp.asarray([125])), none(cache))
    drafted = append(cache, vectors(cache, 10, seed=9), jnp.asarray([10]))
    assert (drafted.history_blocks == 0).all()
    assert drafted.window_lengths == 135
    kept = dataclasses.replace(drafted, lengths=drafted.lengths - 10)
    kept = append(kept, jax.tree.map(lambda a: a[:, :, 125:130], new), jnp.asarray([5]))
    kept = flush_when_due(kept, none(kept))
    assert kept.history_blocks == 1
    for name, window in kept.segments[0].window.items():
        block = np.asarray(dequantize(kept.segments[0].history[name]))[:, 0, 0]
        np.testing.assert_array_equal(block, np.asarray(new[0][name])[:, 0, :128])
        np.testing.assert_array_equal(np.asarray(window)[:, 0, :2], np.asarray(new[0][name])[:, 0, 128:130])


def test_appending_without_a_flush_or_beyond_the_capacity_is_an_error() -> None:
    cache = allocate(CacheConfig.parse("xquant:4"), CONFIG, batch=1, tokens=256)
    new, hundred = vectors(cache, 100), jnp.asarray([100])
    cache = append(append(cache, new, hundred), new, hundred)
    with pytest.raises(CacheFullError, match="whole blocks were not flushed"):
        append(cache, new, hundred)
    whole = append(
        allocate(CacheConfig.parse("xquant:4"), CONFIG, batch=1, tokens=512), vectors(cache, 128), hundred + 28
    )
    with pytest.raises(CacheFullError, match="whole blocks were not flushed"):
        append(whole, vectors(cache, 200), hundred)
    cache = append(flush(cache, none(cache)), new, hundred)
    with pytest.raises(CacheFullError, match=r"holds 383 tokens .* need 400"):
        append(flush(cache, none(cache)), new, hundred)


def formula(spec: str) -> float:
    """Bytes per token and layer of design section 3, for R = 128 and D = 256."""
    name, _, bits = spec.partition(",")[0].partition(":")
    return {"bf16": 4 * 128, "int8": 2 * 128 * 8.25 / 8, "xquant": 2 * 128 * (int(bits or 0) + 0.25) / 8}[name]


@pytest.mark.parametrize("spec", ["bf16", "int8", *(f"xquant:{b}" for b in (2, 3, 4, 8)), "xquant:2,basis=joint"])
def test_bytes_are_exactly_those_of_the_formula(spec: str) -> None:
    cache = allocate(CacheConfig.parse(spec), CONFIG, batch=3, tokens=1024)
    size = cache_bytes(cache)
    assert size.codes + size.scales == 3 * 1024 * CONFIG.num_layers * formula(spec)
    assert size.total == sum(a.nbytes for a in jax.tree.leaves(cache))
    widths = sum(window.shape[-1] for window in cache.segments[0].window.values())
    kept = 4 if spec.startswith("xquant") else 0  # first tokens
    assert size.window == 3 * (128 + kept) * CONFIG.num_layers * widths * 2


def test_bytes_of_the_input_stream_of_a_multi_head_model() -> None:
    config = tiny_config(width=256, num_heads=4, num_kv_heads=4, head_dim=64)
    size = cache_bytes(allocate(CacheConfig.parse("xquant:4"), config, batch=1, tokens=128))
    assert size.codes + size.scales == 128 * 2 * 256 * 4.25 / 8


def test_capacity_holds_what_was_asked_for() -> None:
    for tokens in (1, 127, 128, 129, 1000):
        assert allocate(CacheConfig.parse("xquant:4"), CONFIG, batch=1, tokens=tokens).capacity >= tokens


def test_a_full_cache_is_an_error() -> None:
    check_room(100, 100)
    with pytest.raises(CacheFullError, match=r"holds 100 tokens .* need 101"):
        check_room(100, 101)
