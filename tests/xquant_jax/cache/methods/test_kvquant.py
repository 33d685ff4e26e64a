"""KVQuant in prefill and decode equals an independent computation; levels and bytes are what they should be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import random_model, random_tokens, tiny_config
from tests.xquant_jax.cache.methods.test_baselines import PROMPTS, KeysValues
from tests.xquant_jax.cache.methods.test_xquant import STEPS, TOLERANCE, run_library
from tests.xquant_jax.reference import bf16, fake_quantize_levels
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.calibration.levels import levels
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.evaluate import paper_ratio
from xquant_jax.numerics.quantization import StreamSpec, dequantize, quantize

LEVELS = {2: [0.1, 0.3, 0.55, 0.8], 3: [0.02, 0.2, 0.3, 0.45, 0.5, 0.7, 0.85, 0.99]}


class Codebooks(KeysValues):
    """The first token of a sequence stays, and its place in its block is quantized as if it were the second."""

    def __init__(self, model: Any, cache_config: CacheConfig) -> None:
        self.books = jax.tree.map(np.asarray, cache_config.method_params(model.source)[0]["levels"])
        super().__init__(model.config, model.params, [(np.copy, np.copy)] * model.config.num_layers, rotated=False)
        self.method: Any = cache_config.method

    def levels(self, i: int, name: str) -> np.ndarray:
        return self.books[name][i]

    def quantize_whole_blocks(self) -> None:
        n = self.method.sink
        for i, (stored, whole) in enumerate(zip(self.stored, self.whole, strict=True)):
            for name, vectors in stored.items():
                blocks = whole.setdefault(name, [])
                outliers = max(1, int(self.method.outliers * {"key": 128, "value": 16}[name] + 0.5))
                for start in range(128 * len(blocks), len(vectors) - 127, 128):
                    exact = np.stack(vectors[start : start + 128]).astype(bf16).astype(np.float32)
                    block = exact.copy()
                    if start == 0:
                        block[:n] = block[n]
                    groups = block.T if name == "key" else block
                    read = np.stack([fake_quantize_levels(g, self.levels(i, name), outliers) for g in groups])
                    read = read.T if name == "key" else read
                    if start == 0:
                        read[:n] = exact[:n]
                    blocks.append(read)


def test_prefill_and_decode_equal_the_reference() -> None:
    spec = "kvquant:3,outliers=0.125,sink=3"
    model = random_model(tiny_config(qkv_bias=True, qk_norm=True, sliding_windows=(140, None)))
    tokens = random_tokens(model.config, len(PROMPTS), max(PROMPTS) + STEPS)
    seen = run_library(model, spec, tokens, np.asarray(PROMPTS, np.int32))
    for row, count in enumerate(PROMPTS):
        reference = Codebooks(model, CacheConfig.parse(spec))
        pieces = [tokens[row, :count], *tokens[row, count : count + STEPS, None]]
        for step, (piece, (logits, cache)) in enumerate(zip(pieces, seen, strict=True)):
            expected = reference.feed(piece)
            assert np.abs(logits[row] - expected).max() <= TOLERANCE * np.ptp(expected), (count, step)
            reference.adopt(cache.segments[0], row)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(("bits", "outliers"), [(2, 0), (2, 1), (3, 3)])
def test_a_block_is_quantized_to_the_nearest_level_and_outliers_stay(axis: str, bits: int, outliers: int) -> None:
    rng = np.random.default_rng(bits)
    x = (rng.standard_t(3, (2, 128, 24)) * 10.0 ** rng.uniform(-3, 3, (2, 1, 24))).astype(np.float32)
    spec = StreamSpec(24, bits, axis, 12 if axis == "token" else 64, format="codebook", outliers=outliers)
    book = np.asarray(LEVELS[bits], np.float32)
    blocks = jax.jit(quantize, static_argnums=1)(jnp.asarray(x), spec, book)
    grouped = x.reshape(2, 128, 2, 12) if axis == "token" else np.moveaxis(x.reshape(2, 2, 64, 24), 2, 3)
    read = np.apply_along_axis(fake_quantize_levels, -1, grouped, book, outliers)
    expected = (read if axis == "token" else np.moveaxis(read, 3, 2)).reshape(x.shape)
    np.testing.assert_allclose(dequantize(blocks, jnp.asarray(book)), expected, rtol=1e-6, atol=1e-6)


def test_bytes_are_those_of_codes_scales_and_outliers() -> None:
    """R = 1024. Keys: scale and zero of 2 bytes and one outlier of 2 + 1 per 128; values: scale and zero and ten
    outliers of 2 + 2 per 1024. The paper counts 0.33 bits a value beside the codes; here they are 0.39."""
    config = tiny_config(width=256, num_heads=16, num_kv_heads=8, head_dim=128, num_layers=2)
    cache_config = CacheConfig.parse("kvquant:2")
    size = cache_bytes(allocate(cache_config, config, batch=1, tokens=1024))
    keys, values = 2 / 8 + 7 / 128, 2 / 8 + (4 + 10 * 4) / 1024
    assert size.codes + size.scales == 2 * 1024 * 1024 * (keys + values)
    assert size.window == 2 * 2 * (128 + 1) * 1024 * 2
    assert paper_ratio(cache_config, config) == pytest.approx((keys + values) / 4)
    assert paper_ratio(cache_config, config) == pytest.approx((2 + 0.39) / 16, abs=1e-3)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=20)
def test_levels_are_no_worse_than_lloyds(seed: int, count: int) -> None:
    """Lloyd's algorithm on the same histogram, from several starts."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=1024) * (rng.random(1024) < 0.3) + np.exp(-((np.arange(1024) - 300) ** 2) / 5000)
    center = (np.arange(1024) + 0.5) / 1024

    def cost(book: np.ndarray) -> float:
        return float((weights * ((center[:, None] - book) ** 2).min(axis=1)).sum())

    best = np.inf
    for _ in range(5):
        book = np.sort(rng.random(count))
        for _ in range(50):
            nearest = np.abs(center[:, None] - book).argmin(axis=1)
            mass = np.bincount(nearest, weights, count)
            book = np.where(mass > 0, np.bincount(nearest, weights * center, count) / np.maximum(mass, 1e-300), book)
        best = min(best, cost(book))
    found = levels(weights, count)
    assert (np.diff(found) > 0).all()
    assert cost(found) <= best * (1 + 1e-4)


def test_a_layer_without_any_gradient_has_even_levels() -> None:
    np.testing.assert_allclose(levels(np.zeros(1024), 4), [0.125, 0.375, 0.625, 0.875], atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kvquant:8", "bits=8 is not supported by kvquant; choose 2, 3 or 4"),
        ("kvquant:2,outliers=0.5", "outliers=0.5 is not a share of the values; choose 0 to 0.25"),
        ("kvquant:2,sink=128", "sink=128 is not supported; choose 0 to 127"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig.parse(spec)
