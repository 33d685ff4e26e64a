"""Layers in a loop over stacked weights, and one after another with arrays of their own: the same model."""

import gc
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xquant_jax as xq
from converters import convert
from tests.checkpoints import write_checkpoint
from tests.conftest import random_tokens, tiny_config
from xquant_jax.cache.config import CacheConfig
from xquant_jax.calibration.calibrate import calibrate
from xquant_jax.evaluation.divergence import LayerwiseScorer
from xquant_jax.evaluation.scoring import Scorer
from xquant_jax.model import factors
from xquant_jax.model.weights import weights_checksum
from xquant_jax.parameters import layers_of, stacked

COUNTS = [(140, 5), (1, 1), (1, 0)]
"""New tokens of two sequences in each step: one gets a history, the other has none."""

CACHES = ["xquant:2;0=4,sink=2,basis=joint", "xquant-cl:2,first=1@4"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted, with factors."""
    source = write_checkpoint(tmp_path_factory.mktemp("source"))
    return convert(source, tmp_path_factory.mktemp("out") / "model", progress=False)


@pytest.fixture(scope="module")
def looped(directory: Path) -> xq.Model:
    return xq.load(directory, scan_layers=True)


@pytest.fixture(scope="module")
def apart(directory: Path) -> xq.Model:
    return xq.load(directory, scan_layers=False)


def logits_of(model: xq.Model, spec: str) -> np.ndarray:
    """Of the last new tokens after every step, [steps, 2, V]."""
    step = jax.jit(partial(xq.step, model.transformer))
    cache_config = CacheConfig.parse(spec)
    cache, method_params, found = allocated(model, cache_config), model.method_params(cache_config), []
    for i, counts in enumerate(COUNTS):
        tokens = random_tokens(model.config, 2, max(counts), seed=i)
        logits, cache = step(model.params, tokens, cache, method_params, np.asarray(counts, np.int32))
        found.append(logits)
    return np.asarray(found)


def allocated(model: xq.Model, cache_config: CacheConfig) -> xq.Cache:
    return xq.allocate(cache_config, model.config, batch=2, tokens=256, max_step=140)


@pytest.mark.parametrize("spec", CACHES)
def test_the_same_logits(looped: xq.Model, apart: xq.Model, spec: str) -> None:
    expected = logits_of(looped, spec)
    np.testing.assert_allclose(logits_of(apart, spec), expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_the_same_answers_on_a_mesh(looped: xq.Model, directory: Path) -> None:
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices; this test simulates four on CPU")
    mesh = xq.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    on_mesh, moved = xq.load(directory, scan_layers=False, mesh=mesh), xq.load(directory, scan_layers=False).on(mesh)
    for mine, theirs in zip(jax.tree.leaves(on_mesh.params), jax.tree.leaves(moved.params), strict=True):
        assert mine.sharding.is_equivalent_to(theirs.sharding, mine.ndim)
        np.testing.assert_array_equal(mine, theirs)
    prompt = random_tokens(looped.config, 140).tolist()
    options: dict[str, Any] = {"cache": "xquant:4", "stop_ids": [], "max_new_tokens": 5}
    expected = xq.generate(looped, prompt, **options).results[0]
    found = xq.generate(on_mesh, prompt, mesh=mesh, **options).results[0]
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=2e-5)


def test_every_layer_has_the_arrays_of_the_stack(looped: xq.Model, apart: xq.Model) -> None:
    assert "layers" not in apart.params
    assert {leaf.ndim for leaf in jax.tree.leaves(layers_of(apart.params))} == {1, 2}
    jax.tree.map(np.testing.assert_array_equal, stacked(layers_of(apart.params)), layers_of(looped.params))
    assert apart.fingerprint == looped.fingerprint
    assert weights_checksum(apart.params) == weights_checksum(looped.params)
    swapped = apart.params | {"layers_0": apart.params["layers_1"], "layers_1": apart.params["layers_0"]}
    assert weights_checksum(swapped) != weights_checksum(looped.params)


@pytest.mark.parametrize("spec", CACHES)
def test_a_layer_multiplies_with_what_its_place_in_the_stack_holds(
    looped: xq.Model, apart: xq.Model, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the converted checkpoint, and each layer's once."""
    monkeypatch.setattr(factors, "layer_factors", None)
    cache_config, start = CacheConfig.parse(spec), 0
    for (_, number), own, whole in zip(
        cache_config.segments(apart.config),
        apart.method_params(cache_config),
        looped.method_params(cache_config),
        strict=True,
    ):
        for i in range(start, start + number):
            jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), own[i], whole)
        assert len({id(leaf) for leaf in jax.tree.leaves(own)}) == number * len(jax.tree.leaves(whole))
        start += number


def test_no_stack_is_kept_beside_what_layers_multiply_with(directory: Path) -> None:
    model = xq.load(directory, scan_layers=False)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    method_params = model.method_params(CacheConfig.parse("xquant:4"))
    gc.collect()
    made = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    assert made == sum(array.nbytes for array in jax.tree.leaves(method_params)) > 0


def test_evaluation_and_calibration_of_it(looped: xq.Model, apart: xq.Model) -> None:
    tokens = random_tokens(looped.config, 1, 160, seed=3)
    cache_config = CacheConfig.parse("xquant:2")
    needs = CacheConfig.parse("xquant-cl:2,first=1@4").segments(looped.config)[-1][0].needs(looped.config)
    ways = [CacheConfig.parse("xquant:2"), CacheConfig.parse("xquant:4")]
    found = []
    for model in (looped, apart):
        scorer = Scorer(model, cache_config)
        (learned,) = calibrate(model, tokens, needs)
        divergences = LayerwiseScorer(model, ways)
        reference = divergences.observe(tokens[0])
        moved = divergences.divergence(reference, np.asarray([1, 0, 1]))
        found.append((scorer.program(*tokens.shape)(tokens, np.asarray([160])), learned, moved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


@pytest.mark.optimized
def test_a_compiled_step_stacks_no_weights() -> None:
    """What it needs besides its arguments is less than one layer's weights."""
    transformer = xq.Transformer(tiny_config(width=512, mlp_width=2048), scan_layers=False)
    cache_config = CacheConfig.parse("bf16")
    method_params = (({},) * 2,)
    cache = jax.eval_shape(lambda: xq.allocate(cache_config, transformer.config, batch=1, tokens=128))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = partial(transformer.init, method="score")
    params = jax.eval_shape(lambda key, tokens: init(key, tokens)["params"], jax.random.key(0), tokens)

    def step(params: Any, tokens: Any, cache: xq.Cache) -> Any:
        return xq.step(transformer, params, tokens, cache, method_params)

    memory = jax.jit(step, donate_argnames="cache").lower(params, tokens, cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * sum(leaf.size * 4 for leaf in jax.tree.leaves(params["layers_0"]))
