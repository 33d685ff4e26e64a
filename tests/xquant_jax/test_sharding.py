"""A model and its cache on a mesh of eight (simulated) devices: the same answers, an eighth of the bytes each."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

import xquant_jax as xq
from converters import convert
from converters.shards import Tensor
from tests.conftest import random_tokens, tiny_config
from tests.converters.conftest import config_of, tensors_of
from tests.xquant_jax.test_generation import counted_compilations
from xquant_jax import sharding
from xquant_jax.cache import allocate, append, cache_bytes, flush, flush_when_due
from xquant_jax.loading import Model
from xquant_jax.methods import CacheConfig

SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
BY_HEAD = ["bf16", "int8,group=8", "fp8", "kivi:2,group=8,rope=post", "xquant:4,group=8"]
WHOLE = ["kivi:4", "fp8,scale=token", "xquant:4,basis=joint", "xquant:8,value_basis=joint", "kvquant:3"]
ACROSS_LAYERS = ["xquant-cl:2,first=1@4", "xquant-cl:4,first=2@4,predict=latent,accumulator=int8"]
MULTI_HEAD = ["xquant:4", "xquant-cl:4,first=1@4,input=residual"]
LENGTHS = (300, 5, 131, 127, 128, 250, 17, 60)


@pytest.fixture(scope="module", autouse=True)
def eight_devices() -> None:
    if jax.device_count() < 8:
        pytest.skip(f"{jax.device_count()} {jax.default_backend()} devices; these tests simulate eight on CPU")


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    return xq.make_mesh(*shape)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Hugging Face directories of small models, by whether every query head has a key/value head of its own.

    Eight key/value heads. Attention is smooth, so that a code that rounds the other way makes little difference.
    """
    found = {}
    for multi_head in (False, True):
        sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3}
        config = config_of(
            "llama", **sizes, num_attention_heads=8 if multi_head else 16, num_key_value_heads=8, head_dim=8
        )
        gain = {"norm.weight": 0.2, "embed_tokens.weight": 1.0, "lm_head.weight": 0.5}
        tensors = {
            name: (1.0 if "norm" in name else 0.0)
            + next((g for n, g in gain.items() if name.endswith(n)), 0.05) * values
            for name, values in tensors_of(config).items()
        }
        directory = tmp_path_factory.mktemp("mha" if multi_head else "gqa")
        (directory / "config.json").write_text(json.dumps(config))
        save_file(tensors, directory / "model.safetensors")
        found[multi_head] = directory
    return found


@pytest.fixture(scope="module")
def models(directories: dict[bool, Path]) -> dict[bool, xq.Model]:
    return {multi_head: xq.load(directory) for multi_head, directory in directories.items()}


@pytest.fixture(autouse=True)
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for `xquant calibrate`: levels that are not uniform."""

    def calibrated(self: Model, need: Any) -> dict[str, jax.Array]:
        rising = jnp.linspace(0, 1, 2**need.bits) ** 1.2
        return {name: jnp.tile(rising, (self.config.num_layers, 1)) for name in ("key", "value")}

    monkeypatch.setattr(Model, "calibrated", calibrated)


def answers(model: xq.Model, spec: str, mesh: Mesh | None, new: int = 140) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens and log-probabilities [8, new] of ragged prompts; 140 tokens cross a flush in every row."""
    prompts = [random_tokens(model.config, length, seed=length).tolist() for length in LENGTHS]
    options: dict[str, Any] = {"stop_ids": [], "prefill_chunk": 64, "cache_tokens": 1024, "max_new_tokens": new}
    results = xq.generate(model, prompts, cache=spec, mesh=mesh, **options).results
    return np.asarray([r.tokens for r in results]), np.asarray([r.logprobs for r in results])


def check_same_answers(model: xq.Model, spec: str, shapes: list[tuple[int, ...]]) -> None:
    tokens, logprobs = answers(model, spec, None)
    for shape in shapes:
        on_mesh, on_mesh_logprobs = answers(model, spec, mesh_of(shape))
        np.testing.assert_array_equal(tokens, on_mesh, err_msg=f"{spec} on {shape}")
        difference = np.abs(on_mesh_logprobs - logprobs)
        print(
            spec,
            shape,
            f"{np.median(difference):.1e} {np.quantile(difference, 0.99):.1e} {difference.max():.1e}",
            np.ptp(logprobs),
        )


@pytest.mark.parametrize("spec", ["bf16,dtype=float32", *BY_HEAD, *WHOLE, *ACROSS_LAYERS])
def test_same_answers_on_a_mesh(models: dict[bool, xq.Model], spec: str) -> None:
    check_same_answers(models[False], spec, SHAPES)


@pytest.mark.parametrize("spec", MULTI_HEAD)
def test_same_answers_on_a_mesh_multi_head(models: dict[bool, xq.Model], spec: str) -> None:
    check_same_answers(models[True], spec, SHAPES)
