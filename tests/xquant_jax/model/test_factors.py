"""What caches multiply with is made of the model's own parameters, whatever checkpoint they were loaded from."""

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xquant_jax as xq
from converters import convert
from tests.checkpoints import write_checkpoint
from xquant_jax.cache.config import CacheConfig
from xquant_jax.model import factors
from xquant_jax.model.calibration_file import Calibration


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as Hugging Face has them and converted, with factors."""
    source = write_checkpoint(tmp_path_factory.mktemp("source"))
    return {"source": source, "converted": convert(source, tmp_path_factory.mktemp("out") / "model", progress=False)}


def with_other_weights(model: xq.Model) -> xq.Model:
    """The model with other keys, values and norms."""
    random = np.random.default_rng(5)

    def other(array: jax.Array) -> jax.Array:
        return jnp.asarray(0.3 + random.random(array.shape), array.dtype)

    changed = {name: jax.tree.map(other, model.params["layers"][name]) for name in ("attention_norm", "key", "value")}
    return dataclasses.replace(model, params={**model.params, "layers": {**model.params["layers"], **changed}})


def rebuilt_weights(params: Any, side: str) -> np.ndarray:
    """The weight that what is stored and what it is rebuilt with amount to, [L, D, R]."""
    rebuild = np.asarray(params[side]["rebuild"], np.float64)
    if "basis" in params:
        return np.asarray(params["basis"], np.float64) @ rebuild
    project = np.asarray(params[side]["project"], np.float64)
    if project.ndim == 3:
        return project @ rebuild
    heads = np.einsum("ldke,lkef->ldkf", project, rebuild)
    return heads.reshape(*heads.shape[:2], -1)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("source", "xquant:4,basis=joint"),
        ("source", "xquant:4,input=unit_norm"),
        ("converted", "xquant:4"),
        ("converted", "xquant-cl:2,first=1@4"),
    ],
)
def test_other_parameters_have_factors_of_their_own(directories: dict[str, Path], kind: str, spec: str) -> None:
    model, cache_config = xq.load(directories[kind]), CacheConfig.parse(spec)
    before = model.method_params(cache_config)[-1]
    for own, found in ((model, before), (other := with_other_weights(model), other.method_params(cache_config)[-1])):
        layers = jax.tree.map(lambda a: np.asarray(a, np.float64), own.params["layers"])
        folded = "input=unit_norm" in spec or spec.startswith("xquant-cl")
        scale = layers["attention_norm"]["scale"][..., None] if folded else 1
        for side in ("key", "value"):
            expected = scale * layers[side]["kernel"]
            np.testing.assert_allclose(rebuilt_weights(found, side), expected, atol=1e-5 * np.abs(expected).max())
    for mine, theirs in zip(
        jax.tree.leaves(before), jax.tree.leaves(model.method_params(cache_config)[-1]), strict=True
    ):
        assert mine is theirs


def test_factors_are_read_for_the_arrays_that_were_loaded_and_no_others(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are or on a mesh; not for arrays that were rounded, nor for others in their place."""
    model = xq.load(directories["converted"])

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(factors, "layer_factors", refused)
    for spec in ("xquant:4", "xquant-cl:2,first=1@4"):
        model.method_params(CacheConfig.parse(spec))
        model.on(xq.make_mesh(tensor=2, devices=jax.devices()[:2])).method_params(CacheConfig.parse(spec))
    rounded = xq.load(directories["converted"], dtype="bfloat16")
    for other in (rounded, with_other_weights(model), xq.load(directories["source"])):
        with pytest.raises(AssertionError, match="computed"):
            other.method_params(CacheConfig.parse("xquant:4"))


def test_other_parameters_on_a_mesh(directories: dict[str, Path]) -> None:
    other = with_other_weights(xq.load(directories["converted"]))
    mesh, cache_config = xq.make_mesh(tensor=2, devices=jax.devices()[:2]), CacheConfig.parse("xquant:4")
    jax.tree.map(
        np.testing.assert_array_equal, other.on(mesh).method_params(cache_config), other.method_params(cache_config)
    )


def test_calibration_of_other_weights_is_an_error(tmp_path: Path, directories: dict[str, Path]) -> None:
    model = xq.load(directories["converted"])
    (need,) = CacheConfig.parse("kvquant:2").method.needs(model.config)
    levels = np.tile(np.linspace(0, 1, 4, dtype=np.float32), (model.config.num_layers, 1))
    file = tmp_path / "calibration.safetensors"
    Calibration(model.fingerprint, {}, {}).add(need, {"key": levels, "value": levels}, "").write(file)
    own = dataclasses.replace(model, calibration=file)
    assert own.method_params(CacheConfig.parse("kvquant:2"))
    assert xq.load(directories["source"], dtype="bfloat16").fingerprint == model.fingerprint
    with pytest.raises(xq.ConfigError, match="was found with another model's weights"):
        with_other_weights(own).method_params(CacheConfig.parse("kvquant:2"))


def test_threads_compute_factors_once(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, computed = xq.load(directories["source"]), []
    layer_factors = factors.layer_factors

    def counted(kinds: Any, *arguments: Any, **options: Any) -> Any:
        computed.append(kinds)
        return layer_factors(kinds, *arguments, **options)

    monkeypatch.setattr(factors, "layer_factors", counted)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(model.method_params, [CacheConfig.parse("xquant:4")] * 8))
    assert all(params is found[0] for params in found)
    assert len(computed) == model.config.num_layers


def test_loading_a_hugging_face_directory_imports_no_orbax() -> None:
    program = "import sys, xquant_jax as xq; xq.load('demo'); print([m for m in sys.modules if m.startswith('orbax')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
