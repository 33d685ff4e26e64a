"""`xquant calibrate`: what is found on text, where it is kept, and whose it is."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import GOLDEN, random_model, random_tokens, tiny_config
from xquant_jax.cache.methods.learned import Directions, Prediction
from xquant_jax.calibration.calibrate import calibrate, needs_of
from xquant_jax.cli import main
from xquant_jax.errors import CheckpointError, ConfigError
from xquant_jax.model.calibration_file import Calibration

LATENT = "xquant-cl:2,predict=latent,basis=per_head,rank=8,first=1@4"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(xq.__file__).read_text() + Path(__file__).read_text())
    return path


def test_gradients_are_those_of_the_loss() -> None:
    """Shifting one key and one value moves the logits as a finite difference says."""
    model = random_model(tiny_config())
    tokens = jnp.asarray(random_tokens(model.config, 1, 20))
    zeros = {side: jnp.zeros((2, 1, 20, 2, 8)) for side in ("key", "value")}

    def loss(shifts: dict) -> jax.Array:
        logits, _ = model.transformer.apply({"params": model.params}, tokens, shifts, method="observe")
        return (jax.nn.log_softmax(logits)[0, :, 3]).sum()

    gradient = jax.grad(loss)(zeros)
    at, step = (1, 0, 5, 1, 2), 1e-2
    for side in ("key", "value"):
        up, down = (loss(zeros | {side: zeros[side].at[at].set(sign * step)}) for sign in (1, -1))
        np.testing.assert_allclose(gradient[side][at], (up - down) / (2 * step), rtol=2e-2, atol=1e-3)
    logits, seen = model.transformer.apply({"params": model.params}, tokens, zeros, method="observe")
    np.testing.assert_allclose(logits, model.transformer.apply({"params": model.params}, tokens, method="score"))
    norm = model.params["layers"]["attention_norm"]["scale"][:, None, None]
    weight = model.params["layers"]["value"]["kernel"]
    np.testing.assert_allclose(
        seen["value"].reshape(2, 1, 20, 16), jnp.einsum("lbtd,ldc->lbtc", seen["x"], weight), atol=1e-5
    )
    rms = np.sqrt((np.asarray(seen["h"]) ** 2).mean(-1, keepdims=True) + model.config.norm_eps)
    np.testing.assert_allclose(seen["x"], seen["h"] / rms * norm, atol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
def test_directions_are_the_principal_ones_of_the_layer_below(folded: bool) -> None:
    """P P^T is the projection onto the top eigenvectors of z^T z; up = P^T A_below^+ A."""
    model = random_model(tiny_config(num_layers=3, sliding_windows=(None,) * 3))
    windows = random_tokens(model.config, 3, 128)
    (found,) = calibrate(model, windows, [Directions("per_head", folded, 5)])
    zeros = {side: jnp.zeros((3, 3, 128, 2, 8)) for side in ("key", "value")}
    _, seen = model.transformer.apply({"params": model.params}, jnp.asarray(windows), zeros, method="observe")
    norm = np.asarray(model.params["layers"]["attention_norm"]["scale"], np.float64)
    for i in (1, 2):
        x = [np.asarray(seen["x"][n], np.float64).reshape(-1, 32) / (norm[n] if folded else 1) for n in range(3)]
        bases = []
        for n in range(3):
            heads = [
                (norm[n][:, None] if folded else 1) * head
                for side in ("key", "value")
                for head in np.split(np.asarray(model.params["layers"][side]["kernel"][n], np.float64), 2, axis=1)
            ]
            bases.append([np.linalg.svd(head, full_matrices=False)[0] for head in heads])
        signed = np.asarray(calibrated_basis(model, folded), np.float64)
        for head in range(4):  # the same directions but for signs
            theirs = signed[i - 1][:, 8 * head : 8 * head + 8]
            np.testing.assert_allclose(np.abs((theirs * bases[i - 1][head]).sum(0)), 1, atol=1e-4)
        z = x[i - 1] @ signed[i - 1]
        strongest = np.linalg.svd(z, full_matrices=False)[2][:5].T
        down, up = np.asarray(found["down"][i]), np.asarray(found["up"][i])
        np.testing.assert_allclose(down @ down.T, strongest @ strongest.T, atol=1e-3)
        np.testing.assert_allclose(up, down.T @ np.linalg.pinv(signed[i - 1], 0.1) @ signed[i], atol=1e-3)
    assert (found["down"][0] == 0).all()


def calibrated_basis(model, folded: bool) -> jax.Array:
    method_params = model.source.svd("per_head", folded=folded)
    return jnp.concatenate([method_params[side]["project"].reshape(3, 32, 16) for side in ("key", "value")], axis=-1)


@pytest.mark.parametrize("folded", [False, True])
def test_predictions_are_those_of_least_squares(folded: bool) -> None:
    """And what they leave is told; the first four tokens of a window have no part in them."""
    model = random_model(tiny_config(num_layers=3, sliding_windows=(None,) * 3))
    windows = random_tokens(model.config, 6, 128)
    (found,) = calibrate(model, windows, [Prediction(folded)])
    zeros = {side: jnp.zeros((3, 6, 128, 2, 8)) for side in ("key", "value")}
    _, seen = model.transformer.apply({"params": model.params}, jnp.asarray(windows), zeros, method="observe")
    norm = np.asarray(model.params["layers"]["attention_norm"]["scale"], np.float64)
    basis = np.asarray(model.source.svd("kv", folded=folded)["basis"], np.float64)
    z = [
        (np.asarray(seen["x"][n, :, 4:], np.float64).reshape(-1, 32) / (norm[n] if folded else 1)) @ basis[n]
        for n in range(3)
    ]
    np.testing.assert_allclose(found["residual"][0], np.square(z[0]).sum(0), rtol=1e-3)
    for i in (1, 2):
        best = np.linalg.lstsq(z[i - 1], z[i], rcond=None)[0]
        left = np.square(z[i] - z[i - 1] @ best).sum(0)
        of_file = np.square(z[i] - z[i - 1] @ found["predict"][i]).sum(0)
        assert (of_file <= 1.05 * left).all()
        np.testing.assert_allclose(found["residual"][i], of_file, rtol=0.02)
        of_weights = np.square(z[i] - z[i - 1] @ (basis[i - 1].T @ basis[i])).sum()
        assert of_file.sum() < 0.9 * of_weights


def test_a_lower_rank_takes_the_strongest_directions_of_a_higher_one() -> None:
    model = random_model(tiny_config())
    wide, narrow = (Directions("joint", False, rank) for rank in (9, 4))
    (found,) = calibrate(model, random_tokens(model.config, 2, 128), [wide])
    kept = Calibration("", {}, {}).add(wide, found, "")
    got = kept.get(narrow)
    assert got is not None
    assert got["down"].shape == (2, 32, 4)
    np.testing.assert_array_equal(got["up"], found["up"][:, :4].astype(np.float32))
    assert kept.get(Directions("joint", False, 10)) is None
    assert kept.get(Directions("per_head", False, 4)) is None


def test_calibrate_then_load_and_eval(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "calibration.safetensors"
    command = ["calibrate", "demo", "--text", str(text), "--seq-len", "128", "--limit-windows", "2", "--out", str(file)]
    assert main([*command, "--cache", "kvquant:2"]) == 0
    printed = capsys.readouterr()
    assert "kvquant:2,outliers=0.01,sink=1" in printed.out
    assert printed.err.splitlines() == ["0/2 windows: compiling", "1/2 windows", "2/2 windows"]
    assert main([*command, "--cache", LATENT]) == 0  # adds to the file
    model = xq.load("demo", calibration=file)
    assert model.method_params(xq.CacheConfig.parse(LATENT))
    evaluation = ["eval", "demo", "--text", str(text), "--seq-len", "128", "--limit-windows", "1"]
    assert main([*evaluation, "--calibration", str(file), "--cache", "kvquant:2"]) == 0
    with pytest.raises(ConfigError, match=r"kvquant:3,outliers=.*,sink=1 needs calibration on text"):
        xq.generate(model, "import os", cache="kvquant:3", max_new_tokens=1)


def test_another_models_calibration_is_an_error(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    another = GOLDEN / "llama-llama3"
    demo = xq.load("demo")
    needs = needs_of(["kvquant:2"], demo.source)
    file = tmp_path / "calibration.safetensors"
    found = {side: np.zeros((12, 4)) for side in ("key", "value")}
    Calibration(demo.fingerprint, {}, {}).add(needs[0], found, "").write(file)
    other = xq.load(another, calibration=file)
    with pytest.raises(ConfigError, match="was found with another model's weights"):
        xq.generate(other, [[1, 2, 3]], cache="kvquant:2", max_new_tokens=1)
    assert main(["calibrate", str(another), "--text", str(text), "--out", str(file)]) == 2
    assert "another model's weights" in capsys.readouterr().err.replace("\n", " ")
    assert Calibration.read(file, demo.fingerprint).arrays  # and it was left alone


def test_a_converted_model_has_the_fingerprint_of_its_source(tmp_path: Path) -> None:
    from converters import convert

    source = GOLDEN / "llama-llama3"
    convert(source, tmp_path / "out", progress=False)
    assert xq.load(tmp_path / "out").fingerprint == xq.load(source).fingerprint


@pytest.mark.parametrize("damage", ["cut", "other", "version"])
def test_a_file_that_is_no_calibration_is_an_error(damage: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "calibration.safetensors"
    if damage == "cut":
        Calibration("me", {"a/b": np.zeros(100, np.float32)}, {}).write(file)
        file.write_bytes(file.read_bytes()[:-40])
    else:
        save_file({"a/b": np.zeros(3, np.float32)}, file, {"format": "x"} if damage == "version" else None)
    with pytest.raises(CheckpointError, match=r"calibration\.safetensors"):
        Calibration.read(file, "me")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "xquant:4"], "cache xquant:4 needs no calibration; leave it out"),
        (["--seq-len", "100"], "windows of 100 tokens are shorter than a block; choose 128 or more"),
        (["--limit-windows", "0"], "--limit-windows 0 leaves nothing to calibrate on"),
        (["--out", "nowhere/file"], "there is no directory nowhere"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--seq-len", "100000"], "less than one window of seq_len=100000"),
    ],
)
def test_bad_arguments_are_errors(
    arguments: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--out", str(tmp_path / "file")]
    assert main(["calibrate", "demo", "--text", str(text), *out, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "file").exists()


def test_a_calibration_file_that_is_named_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"calibration=nowhere\.safetensors does not exist"):
        xq.load("demo", calibration="nowhere.safetensors")
