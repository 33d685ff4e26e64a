"""Saved prefixes: what is loaded is what was saved, bit by bit, or an error that says so."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import xquant_jax as xq
from xquant_jax.generation import prefix_file
from xquant_jax.model.calibration_file import Calibration

BEGINNING = [1, *np.random.default_rng(3).integers(259, 500, 299).tolist()]


def calibrated(model: xq.Model, directory: Path) -> xq.Model:
    """With levels for kvquant:2."""
    (need,) = xq.CacheConfig.parse("kvquant:2").method.needs(model.config)
    levels = np.tile(np.linspace(0, 1, 4, dtype=np.float32), (model.config.num_layers, 1))
    own = dataclasses.replace(model, calibration=directory / "calibration.safetensors")
    Calibration(own.fingerprint, {}, {}).add(need, {"key": levels, "value": levels}, "").write(own.calibration)
    return own


@pytest.mark.parametrize("cache", ["bf16", "int8", "kivi:2", "kvquant:2", "xquant:4;0=8", "xquant-cl:4"])
def test_what_is_loaded_is_what_was_saved(model: xq.Model, tmp_path: Path, cache: str) -> None:
    """Bit by bit and of the same structure, so that the same compiled programs say the same."""
    if cache == "kvquant:2":
        model = calibrated(model, tmp_path)
    prefix = xq.prefill(model, BEGINNING, cache=cache, prefill_chunk=128)
    prefix.save(tmp_path / "saved")
    loaded = xq.load_prefix(model, tmp_path / "saved")
    assert (loaded.tokens, loaded.stored, loaded.made_with) == (BEGINNING, 256, prefix.made_with)
    assert jax.tree.structure(loaded.cache) == jax.tree.structure(prefix.cache)
    for own, other in zip(jax.tree.leaves(prefix.cache), jax.tree.leaves(loaded.cache), strict=True):
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        assert own.tobytes() == other.tobytes()
    sizes = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
    assert sizes < xq.cache_bytes(prefix.cache).total + 20_000


def test_answers_are_the_same_from_one_that_was_saved(model: xq.Model, tmp_path: Path) -> None:
    """With differences between layers, whose running sum is not stored; and as those to the whole prompt."""
    alike = {"cache": "xquant-cl:4", "prefill_chunk": 128, "max_new_tokens": 8, "stop_ids": []}
    prefix = xq.prefill(model, BEGINNING, cache=alike["cache"], prefill_chunk=128)
    prefix.save(tmp_path / "saved")
    prompt = [[*BEGINNING, 5, 6, 7]]
    (got,) = xq.generate(model, prompt, prefix=xq.load_prefix(model, tmp_path / "saved"), **alike).results
    (before,) = xq.generate(model, prompt, prefix=prefix, **alike).results
    (whole,) = xq.generate(model, prompt, **alike).results
    assert (got.tokens, got.logprobs) == (before.tokens, before.logprobs)
    assert got.tokens == whole.tokens
    np.testing.assert_allclose(got.logprobs, whole.logprobs, atol=1e-2)  # codes on the edge may round otherwise


def test_one_that_stores_nothing(model: xq.Model, tmp_path: Path) -> None:
    xq.prefill(model, BEGINNING[:100], cache="bf16", prefill_chunk=128).save(tmp_path / "saved")
    loaded = xq.load_prefix(model, tmp_path / "saved")
    assert (loaded.tokens, loaded.stored) == (BEGINNING[:100], 0)


@pytest.fixture(scope="module")
def saved(model: xq.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prefix") / "saved"
    xq.prefill(model, BEGINNING, cache="xquant:2", prefill_chunk=128).save(directory)
    return directory


@pytest.mark.parametrize("name", [prefix_file.SAID, prefix_file.ARRAYS])
def test_a_file_that_was_altered_is_an_error_whatever_was(model: xq.Model, saved: Path, tmp_path: Path, name) -> None:
    directory, whole, rng = tmp_path / "saved", (saved / name).read_bytes(), np.random.default_rng(0)
    shutil.copytree(saved, directory)
    altered = [b"", whole[:-1], whole + b"\0", whole[: len(whole) // 2], bytes(len(whole)), b"[]", b"{}", b"7"]
    for place in (0, 8, len(whole) - 3, *rng.integers(len(whole), size=60)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        altered.append(bytes(flipped))
    for content in altered:
        if name == prefix_file.SAID and content.split() == whole.split():  # JSON of the same content
            continue
        (directory / name).write_bytes(content)
        with pytest.raises(xq.CheckpointError, match="make the prefix anew") as raised:
            xq.load_prefix(model, directory)
        assert "\n" not in str(raised.value)
    (directory / name).unlink()
    with pytest.raises(xq.CheckpointError, match=f"holds no saved prefix: .*{name}: No such file"):
        xq.load_prefix(model, directory)
    (directory / name).write_bytes(whole)
    assert xq.load_prefix(model, directory).tokens == BEGINNING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": BEGINNING[:-1]}, "is damaged"),
        ({"tokens": None}, "is damaged"),
        ({"made_with": {}}, "is damaged"),
        ({"checksum": None}, "is damaged"),
        ({"format": "xquant-jax prefix 2"}, "was saved by another version"),
    ],
)
def test_what_is_said_cannot_be_edited(
    model: xq.Model, saved: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    shutil.copytree(saved, tmp_path / "saved")
    said = tmp_path / "saved" / prefix_file.SAID
    said.write_text(json.dumps({**json.loads(said.read_text()), **changes}))
    with pytest.raises(xq.CheckpointError, match=message):
        xq.load_prefix(model, tmp_path / "saved")


def test_other_models_are_refused_when_it_is_loaded(model: xq.Model, demo: xq.Model, saved: Path) -> None:
    with pytest.raises(xq.ConfigError, match=r"the prefix was made with weights=.*; make it anew"):
        xq.load_prefix(demo, saved)
    with pytest.raises(xq.ConfigError, match="made with dtype=float32, and here it is bfloat16"):
        xq.load_prefix(dataclasses.replace(model, dtype="bfloat16"), saved)


def test_blocks_that_are_stored_otherwise_are_an_error(model: xq.Model, saved: Path) -> None:
    structure = xq.load_prefix(model, saved).cache
    structure = dataclasses.replace(structure, lost=structure.lost[:0])
    with pytest.raises(xq.CheckpointError, match="stores its blocks otherwise"):
        prefix_file.read_arrays(saved, structure)


def test_it_is_written_whole_or_not_at_all(
    model: xq.Model, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = xq.load_prefix(model, saved)
    with pytest.raises(xq.CheckpointError, match="is not empty; choose a new directory"):
        prefix.save(saved)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(prefix_file, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        prefix.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_there(model: xq.Model, tmp_path: Path) -> None:
    with pytest.raises(xq.CheckpointError, match=r"holds no saved prefix: .*prefix.json: No such file"):
        xq.load_prefix(model, tmp_path / "nowhere")
