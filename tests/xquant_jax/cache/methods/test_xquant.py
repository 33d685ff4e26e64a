"""The xquant method in prefill and decode equals an independent computation (`reference.py`)."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.conftest import RandomModel, random_model, random_tokens, tiny_config
from tests.xquant_jax.reference import Reference
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush, flush_when_due
from xquant_jax.cache.methods.xquant import XQuant
from xquant_jax.cache.state import Cache, allocate
from xquant_jax.errors import ConfigError

PROMPTS = (127, 128, 255, 257)  # one below, on and above a flush
STEPS = 3  # so that decode crosses 128 and 256 as well
TOLERANCE = 2e-4  # of the logits' range: float32 against float64

MODELS = {
    "K=H": tiny_config(num_kv_heads=4, tied_embeddings=True),
    "K<H": tiny_config(qkv_bias=True, qk_norm=True),
    "K<H, wide keys": tiny_config(width=12, head_dim=16, sliding_windows=(140, None)),  # R and d above D
}


def run_library(
    model: RandomModel, spec: str, tokens: np.ndarray, counts: np.ndarray
) -> list[tuple[np.ndarray, Cache]]:
    """Logits [B, V] and cache after a ragged prefill of `counts` tokens and after each of STEPS decoded tokens."""
    cache_config = CacheConfig.parse(spec)
    method_params = cache_config.method_params(model.source)

    @jax.jit
    def feed(tokens: Any, cache: Any, counts: Any) -> Any:
        logits, cache = model.transformer.apply({"params": model.params}, tokens, cache, method_params, counts)
        return logits, (flush if tokens.shape[1] > 1 else flush_when_due)(cache, method_params)

    cache = allocate(cache_config, model.config, batch=len(tokens), tokens=int(counts.max()) + STEPS)
    logits, cache = feed(tokens[:, : counts.max()], cache, counts)
    seen = [(np.asarray(logits), jax.device_get(cache))]
    for step in range(STEPS):
        token = tokens[np.arange(len(tokens)), counts + step][:, None]
        logits, cache = feed(token, cache, np.ones_like(counts))
        seen.append((np.asarray(logits), jax.device_get(cache)))
    assert (cache.lengths == counts + STEPS).all()
    assert (cache.history_blocks == (counts + STEPS) // 128).all()
    return seen


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("K=H", "xquant:2"),
        pytest.param("K<H", "xquant:4", marks=pytest.mark.optimized),
        ("K=H", "xquant:4,rebuild_dtype=int8"),
        ("K=H", "xquant:4,rebuild_dtype=fp8,rotate=false,clip=false,sink=0"),
        ("K<H", "xquant:8,key_basis=joint"),
        ("K<H", "xquant:2,rotate=true,clip=false,sink=127"),
        ("K<H, wide keys", "xquant:3,basis=joint,rotate=true"),
        ("K<H, wide keys", "xquant:3,clip=true,sink=0"),
    ],
)
def test_prefill_and_decode_equal_the_reference(kind: str, spec: str) -> None:
    model = random_model(MODELS[kind])
    tokens = random_tokens(model.config, len(PROMPTS), max(PROMPTS) + STEPS)
    counts = np.asarray(PROMPTS, np.int32)
    seen = run_library(model, spec, tokens, counts)
    cache_config = CacheConfig.parse(spec)
    (method_params,) = cache_config.method_params(model.source)
    for row, count in enumerate(PROMPTS):
        reference = Reference(model.config, model.params, method_params, cache_config.method)
        pieces = [tokens[row, :count], *tokens[row, count : count + STEPS, None]]
        for step, (piece, (logits, cache)) in enumerate(zip(pieces, seen, strict=True)):
            expected = reference.feed(piece)
            assert np.abs(logits[row] - expected).max() <= TOLERANCE * np.ptp(expected), (count, step)
            reference.adopt(cache.segments[0], row)


def test_reference_can_tell_bit_widths_apart() -> None:
    """The tolerance above is far below what one bit more or less changes."""
    model = random_model(MODELS["K<H"])
    (method_params,) = CacheConfig.parse("xquant:3").method_params(model.source)
    tokens = random_tokens(model.config, 1, 131)[0]
    three, four = (Reference(model.config, model.params, method_params, XQuant(bits)) for bits in (3, 4))
    for reference in (three, four):
        reference.feed(tokens[:130])
    three, four = (reference.feed(tokens[130:]) for reference in (three, four))
    assert np.abs(three - four).max() > 20 * TOLERANCE * np.ptp(four)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_keys_are_rebuilt_with_the_matrix_in_eight_bits(dtype: str) -> None:
    """The values' matrix stays as it is; int8 takes a quarter of float32."""
    model = random_model(MODELS["K=H"])
    exact, (small,) = (
        CacheConfig.parse(f"xquant:4,rotate=false{o}").method_params(model.source)
        for o in ("", f",rebuild_dtype={dtype}")
    )
    weight = np.asarray(exact[0]["key"]["rebuild"], np.float64)
    off = np.asarray(small["key"]["rebuild"], np.float64) * np.asarray(small["key"]["scale"])[:, None] - weight
    assert small["key"]["rebuild"].nbytes == weight.size
    assert 0 < np.abs(off).max() <= np.abs(weight).max() / {"int8": 254, "fp8": 16}[dtype] * (1 + 1e-5)
    assert small["value"]["rebuild"] is model.params["layers"]["value"]["kernel"]


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("K<H", "xquant:4,rebuild_dtype=int8", "int8 applies to keys that are stored along the token; .* xquant-cl"),
        ("K=H", "xquant:8,rebuild_dtype=fp8", "fp8 takes codes of up to 4 bits, .* and bits=8; choose int8 or bf16"),
        ("K=H", "xquant:4;0=8,rebuild_dtype=fp8", "fp8 takes codes of up to 4 bits"),
        ("K=H", "xquant:4,rebuild_dtype=e4m3", "rebuild_dtype=e4m3 is not supported; choose bf16, int8 or fp8"),
    ],
)
def test_where_eight_bits_do_not_apply_is_an_error(kind: str, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig.parse(spec).segments(MODELS[kind])
