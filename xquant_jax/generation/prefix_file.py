"""The directory that a prefix is saved in.

prefix.json          its tokens, what its blocks depend on besides them, and a checksum of all that is in both files
cache.safetensors    every array of its cache by its path in the pytree
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from safetensors.flax import load_file, save

from converters.staging import staged
from xquant_jax.errors import CheckpointError
from xquant_jax.json_file import write_json

FORMAT = "xquant-jax prefix 1"
SAID, ARRAYS = "prefix.json", "cache.safetensors"


def write(directory: Path, said: dict[str, Any], arrays: Any) -> None:
    """Writes what is said of a prefix, ready for JSON, and a pytree of arrays; whole or not at all.

    Raises `CheckpointError` for a directory that is not empty, or cannot be written.
    """
    said = {"format": FORMAT, **said}
    with staged(directory) as partial:
        (partial / ARRAYS).write_bytes(save(by_path(jax.device_get(arrays))))
        write_json(partial / SAID, {**said, "checksum": _checksum(said, _digest(partial / ARRAYS))})


def read(directory: Path) -> dict[str, Any]:
    """What is said of the prefix that a directory holds, once it and the arrays are known to be as they were written.

    Raises `CheckpointError` if they are not.
    """
    try:
        said = json.loads((directory / SAID).read_bytes())
        arrays = _digest(directory / ARRAYS)
    except OSError as error:
        raise CheckpointError(
            f"{directory} holds no saved prefix: {error.filename}: {error.strerror}; make one with xquant prefill"
        ) from error
    except ValueError:  # not JSON, or not text
        said, arrays = None, ""
    if isinstance(said, dict) and said.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{directory} was saved by another version of xquant-jax; make the prefix anew")
    if not isinstance(said, dict) or said.pop("checksum", None) != _checksum(said, arrays):
        raise CheckpointError(f"{directory} is damaged: its files are not as they were written; make the prefix anew")
    return said


def read_arrays(directory: Path, structure: Any) -> Any:
    """The arrays of a directory that was `read`, as leaves of a pytree with these shapes and types.

    Raises `CheckpointError` for arrays of other shapes or types.
    """
    arrays, expected = load_file(directory / ARRAYS), by_path(structure)
    if {name: (a.shape, a.dtype) for name, a in arrays.items()} != {
        name: (a.shape, a.dtype) for name, a in expected.items()
    }:
        raise CheckpointError(f"{directory} stores its blocks otherwise than this version does; make the prefix anew")
    return jax.tree.unflatten(jax.tree.structure(structure), [arrays[name] for name in expected])


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, such as `segments.0.history.key.scale`, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _checksum(said: dict[str, Any], arrays: str) -> str:
    """SHA-256 of what is said, with that of the file of arrays."""
    return hashlib.sha256(json.dumps([said, arrays], sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
