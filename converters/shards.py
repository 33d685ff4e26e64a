"""The safetensors files of a Hugging Face directory: which tensors there are, and reading one of them.

Headers are read and checked up front. A tensor's bytes are mapped only while that tensor is read, because
mapped pages count as resident memory for as long as the file stays open.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from xquant_jax.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as its file's header describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, F16, BF16, I8, ...

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"

    def read(self) -> np.ndarray:
        """The values, copied out of the file."""
        with _opened(self.file) as shard:
            return shard.get_tensor(self.name)

    def read_part(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values that a slice of each axis selects."""
        with _opened(self.file) as shard:
            return shard.get_slice(self.name)[
                tuple(slice(*s.indices(n)) for s, n in zip(index, self.shape, strict=True))
            ]

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the values."""
        with _opened(self.file) as shard:
            return shard.get_slice(self.name)[start : min(stop, self.shape[0])]


def read_headers(directory: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint in `directory`, by name: one file, or an index and its shards.

    Raises:
        CheckpointError: no weights, an unreadable index, a shard that is missing, truncated or corrupt, or
            one that lacks a tensor which the index places in it. Names the file and the tensor.
    """
    if (directory / SINGLE_FILE).exists():
        return _read_header(directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).exists():
        raise CheckpointError(
            f"{directory} has no weights: looked for {SINGLE_FILE} and {INDEX_FILE}; other formats are not read"
        )
    placed = _weight_map(directory)

    tensors: dict[str, Tensor] = {}
    for shard in shard_names(directory):
        file = directory / shard
        names = [name for name in placed if placed[name] == shard]
        if not file.exists():
            raise CheckpointError(f"{file} is missing; {INDEX_FILE} places {names[0]} in it")
        header = _read_header(file)
        for name in names:
            if name not in header:
                raise CheckpointError(f"{file} has no tensor {name}, though {INDEX_FILE} places it there")
            tensors[name] = header[name]
    return tensors


def shard_names(directory: Path) -> list[str]:
    """The files that the index in `directory` places tensors in; CheckpointError if it cannot be read."""
    names = sorted(set(_weight_map(directory).values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{directory / INDEX_FILE} names {name!r}; a shard must be a file in the same directory"
            )
    return names


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; CheckpointError if it cannot be read or is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not valid: it must hold a JSON object, not {type(value).__name__}")
    return value


def _weight_map(directory: Path) -> dict[str, str]:
    """The file of every tensor, by its name."""
    index_file = directory / INDEX_FILE
    placed = read_json(index_file).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise CheckpointError(f"{index_file} has no weight_map from tensor names to file names")
    return placed


def _read_header(file: Path) -> dict[str, Tensor]:
    tensors = {}
    with _opened(file) as shard:
        for name in shard.keys():  # noqa: SIM118 - the handle is not iterable
            part = shard.get_slice(name)
            tensors[name] = Tensor(name, file, tuple(part.get_shape()), part.get_dtype())
    return tensors


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated, corrupt or unreadable: {error}") from error
