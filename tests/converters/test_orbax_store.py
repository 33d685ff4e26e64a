"""Trees on disk: bit for bit, to numpy or to devices, and what damage is called."""

import errno

import jax
import ml_dtypes
import numpy as np
import pytest

from converters import orbax_store
from converters.orbax_store import read_tree, write_tree, writing
from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import build_tree, leaves_of


def every_bit_pattern():
    """All 65536 bit patterns of bfloat16, NaNs with payloads and negative zero among them."""
    return np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)


@pytest.fixture
def tree():
    return {
        "key": {"kernel": every_bit_pattern().T, "bias": np.array([-0.0, 1e-45], np.float32)},
        "scale": np.arange(3, dtype=np.float16),
    }


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def same(a, b):
    return a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


def test_arrays_keep_their_bits(tmp_path, tree):
    write_tree(tmp_path / "item", tree)
    found = leaves_of(read_tree(tmp_path / "item"))
    assert found.keys() == leaves_of(tree).keys()
    for path, leaf in leaves_of(tree).items():
        assert isinstance(found[path], np.ndarray)
        assert same(found[path], leaf)


def test_reading_to_devices(tmp_path, tree):
    write_tree(tmp_path / "item", tree)
    mesh = jax.make_mesh((1,), ("tensor",))
    replicated = jax.NamedSharding(mesh, jax.P())
    by_column = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    everywhere = leaves_of(read_tree(tmp_path / "item", replicated))
    by_leaf = {"key": {"kernel": by_column, "bias": replicated}, "scale": replicated}
    split = leaves_of(read_tree(tmp_path / "item", by_leaf))
    assert split["key.kernel"].sharding == by_column
    for path, leaf in leaves_of(tree).items():
        for found in (everywhere[path], split[path]):
            assert isinstance(found, jax.Array)
            assert same(np.asarray(found), leaf)


def test_a_missing_tree(tmp_path):
    with pytest.raises(CheckpointError, match="item is missing"):
        read_tree(tmp_path / "item")


def test_a_damaged_tree(tmp_path):
    # One leaf: beside a failing one, Orbax abandons the others, and TensorStore's threads complain of it.
    write_tree(tmp_path / "item", {"kernel": every_bit_pattern()})
    data = max((tmp_path / "item").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="item is damaged or unreadable"):
        read_tree(tmp_path / "item")


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device [OS error 28: ENOSPC]"),
    ],
)
def test_a_full_disk(tmp_path, tree, monkeypatch, failure):
    class FullDisk:
        def save(self, *arguments, **options):
            raise failure

    monkeypatch.setattr(orbax_store, "_checkpointer", FullDisk)
    with (
        pytest.raises(CheckpointError, match="out cannot be written: the disk is full"),
        writing(tmp_path / "out"),
    ):
        write_tree(tmp_path / "item", tree)


def test_a_place_that_cannot_be_written(tmp_path, tree):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"out cannot be written: .*file"), writing(tmp_path / "out"):
        write_tree(tmp_path / "file" / "item", tree)


def test_trees_and_paths_are_inverse(tree):
    assert leaves_of(build_tree(leaves_of(tree).items())).keys() == {"key.kernel", "key.bias", "scale"}
    assert build_tree(leaves_of(tree).items())["key"]["bias"] is tree["key"]["bias"]
