"""Logits against Hugging Face transformers, on checkpoints and outputs that `make golden` wrote."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import GOLDEN
from xquant_jax.cache.flush import flush_when_due
from xquant_jax.cache.state import allocate
from xquant_jax.model.transformer import Transformer

CASES = sorted(path.parent for path in GOLDEN.glob("*/golden.npz"))
TOLERANCE = 1e-4  # of the logits' range: float32 rounding through the layers


def load_case(directory: Path) -> tuple[xq.Model, np.ndarray, np.ndarray, np.ndarray]:
    """The model, with the RoPE of its longest row; tokens, lengths and logits."""
    with np.load(directory / "golden.npz") as golden:
        tokens, lengths, logits = (golden[name] for name in ("tokens", "lengths", "logits"))
    model = xq.load(directory)
    config = dataclasses.replace(model.config, rope=model.config.rope.for_length(int(lengths.max())))
    return dataclasses.replace(model, transformer=Transformer(config)), tokens, lengths, logits


def assert_close(ours: np.ndarray, theirs: np.ndarray, scale: float) -> None:
    assert np.abs(ours - theirs).max() <= TOLERANCE * scale


def test_every_family_has_two_shapes() -> None:
    families = [json.loads((case / "config.json").read_text())["model_type"] for case in CASES]
    assert {family: families.count(family) >= 2 for family in families} == dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"), True
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_equal_transformers(case: Path) -> None:
    """Without a cache."""
    model, tokens, lengths, expected = load_case(case)
    logits = np.asarray(jax.jit(partial(model.transformer.apply, method="score"))({"params": model.params}, tokens))
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], expected[row, :length], np.ptp(expected))


CACHED = ["llama-linear-bias", "llama-yarn", "mistral-window", "qwen2-mixed-windows", "qwen3-layer-types", "qwen3-tied"]
"""Every family, kinds of layers, and RoPE that scales vectors: what a cache has to do with."""


@pytest.mark.parametrize("name", CACHED)
def test_logits_through_a_cache_equal_transformers(name: str) -> None:
    """By prefill in ragged pieces and then token by token, through the bf16 method in float32."""
    model, tokens, lengths, expected = load_case(GOLDEN / name)
    cache_config = xq.CacheConfig.parse("bf16,dtype=float32")
    method_params, piece = cache_config.method_params(model.source), 8

    @jax.jit
    def feed(tokens, cache, counts):
        logits, cache = model.transformer.apply({"params": model.params}, tokens, cache, method_params, counts)
        return logits, flush_when_due(cache, method_params)

    cache = allocate(cache_config, model.config, batch=len(tokens), tokens=tokens.shape[1])
    prompts = np.minimum(lengths // 2 + np.arange(len(lengths)), lengths)  # ragged: each row's prompt ends elsewhere
    padded, at = np.pad(tokens, ((0, 0), (0, piece))), np.zeros_like(lengths)
    while (at < lengths).any():
        counts = np.where(at < prompts, np.minimum(piece, prompts - at), at < lengths).astype(np.int32)
        columns = at[:, None] + np.arange(piece)
        logits, cache = feed(np.take_along_axis(padded, columns, axis=1), cache, counts)
        at = at + counts
        for row in np.flatnonzero(counts):
            assert_close(np.asarray(logits[row]), expected[row, at[row] - 1], np.ptp(expected))


@pytest.mark.parametrize("name", ["pystdlib-gqa", "pystdlib-mha"])
def test_trained_models_continue_as_transformers_does(name: str, shared: Path) -> None:
    """60 greedy tokens of real models in float32, from text, through the default size of cache."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    model = xq.load(shared / "models" / name, dtype="float32")
    result = xq.generate(model, golden["prompt"], cache="bf16,dtype=float32", max_new_tokens=len(golden["tokens"]))
    assert result.results[0].tokens == golden["tokens"]
    assert golden["prompt"] + result.results[0].text == golden["text"]
