"""A loop of one's own in compiled code: as `forward` and `flush`, and what does not fit is not lost in silence."""

import dataclasses
from functools import cache as once
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import RandomModel, random_model, random_tokens, tiny_config
from xquant_jax.numerics.packing import BLOCK

CAPACITY = 2 * BLOCK + 127
FED = CAPACITY + 30
ROWS = 2


@once
def model_of(spec: str) -> tuple[RandomModel, xq.CacheConfig]:
    layers = 4 if "cl" in spec else 2
    return random_model(tiny_config(num_layers=layers, sliding_windows=(None,) * layers)), xq.CacheConfig.parse(spec)


def empty(spec: str, tokens: int = CAPACITY) -> xq.Cache:
    model, cache_config = model_of(spec)
    return xq.allocate(cache_config, model.config, batch=ROWS, tokens=tokens)


@once
def fed_one_by_one(spec: str, tokens: int) -> tuple[jax.Array, xq.Cache]:
    """Logits after every one of `FED` tokens; row 1 stops after 100."""
    model, cache_config = model_of(spec)
    method_params = cache_config.method_params(model.source)

    @jax.jit
    def loop(cache: xq.Cache, fed: jax.Array) -> tuple[xq.Cache, jax.Array]:
        def one(cache: xq.Cache, number: jax.Array) -> tuple[xq.Cache, jax.Array]:
            counts = jnp.asarray([1, 0]) + jnp.asarray([0, 1]) * (number < 100).astype(jnp.int32)
            new = fed[:, number][:, None]
            logits, cache = xq.step(model.transformer, model.params, new, cache, method_params, counts)
            return cache, logits

        return jax.lax.scan(one, cache, jnp.arange(FED))

    cache, logits = loop(empty(spec, tokens), random_tokens(model.config, ROWS, FED))
    return logits, cache


@pytest.mark.parametrize("spec", ["bf16", "xquant-cl:2,first=1@4"])
class TestBeyondTheCapacity:
    def test_lengths_stop_and_the_rest_is_counted(self, spec: str) -> None:
        _, cache = fed_one_by_one(spec, CAPACITY)
        assert cache.capacity == CAPACITY
        assert cache.lengths.tolist() == [CAPACITY, 100]
        assert cache.lost.tolist() == [FED - CAPACITY, 0]

    def test_logits_of_that_sequence_are_nan_and_only_those(self, spec: str) -> None:
        logits, _ = fed_one_by_one(spec, CAPACITY)
        finite = np.isfinite(np.asarray(logits)).all(axis=-1)
        assert finite[:CAPACITY].all()
        assert not finite[CAPACITY:, 0].any()
        assert finite[:, 1].all()

    def test_until_then_everything_is_as_in_a_larger_cache(self, spec: str) -> None:
        logits, _ = fed_one_by_one(spec, CAPACITY)
        larger, cache = fed_one_by_one(spec, CAPACITY + BLOCK)
        # a history of more blocks is summed in other tiles
        np.testing.assert_allclose(logits[:CAPACITY], larger[:CAPACITY], rtol=0, atol=1e-3)
        xq.check_nothing_lost(cache)

    def test_the_check_after_the_loop_says_which_sequence(self, spec: str) -> None:
        _, cache = fed_one_by_one(spec, CAPACITY)
        with pytest.raises(
            xq.CacheFullError, match=rf"of sequences \(tokens\) 0 \({FED - CAPACITY}\): the cache was full"
        ):
            xq.check_nothing_lost(cache)


def test_a_window_that_is_not_flushed_is_noticed_too() -> None:
    model, cache_config = model_of("xquant:4")
    method_params = cache_config.method_params(model.source)
    step = jax.jit(partial(xq.forward, model.transformer))  # without a flush
    for length, stored in ((1, 128), (100, 227)):
        cache = empty("xquant:4")
        for _ in range(300 // length):
            counts = jnp.full(ROWS, length)
            _, cache = step(model.params, jnp.zeros((ROWS, length), jnp.int32), cache, method_params, counts)
        assert cache.lengths.tolist() == [stored] * ROWS
        with pytest.raises(xq.CacheFullError, match="was not flushed"):
            xq.check_nothing_lost(cache)


def test_outside_of_compiled_code_the_step_raises() -> None:
    model, cache_config = model_of("bf16")
    cache = dataclasses.replace(empty("bf16"), lengths=jnp.asarray([CAPACITY, 5]), history_blocks=jnp.asarray([2, 0]))
    with pytest.raises(xq.CacheFullError, match=f"holds {CAPACITY} tokens"):
        xq.step(
            model.transformer,
            model.params,
            jnp.zeros((ROWS, 1), jnp.int32),
            cache,
            cache_config.method_params(model.source),
        )
