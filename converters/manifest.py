"""`xquant.json`: the last file that a conversion writes, and what makes a converted directory complete.

It lists every item (a directory that holds one tree) with its size on disk, so that a directory that lost or
cut a file after the conversion is found when it is opened.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from converters.shards import read_json
from xquant_jax.errors import CheckpointError

MANIFEST = "xquant.json"
_FORMAT, _VERSION = "xquant-jax checkpoint", 3


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted directory holds."""

    num_layers: int
    dtype: str  # of the matrices
    factor_kinds: list[str]  # computed for every layer, float32
    items: dict[str, int]  # path of every tree, relative to the directory -> bytes on disk
    source: dict[str, dict[str, Any]]  # name of every source tensor -> file, dtype, shape
    format: str = _FORMAT
    version: int = _VERSION

    def write(self, directory: Path) -> None:
        """Writes the manifest and makes sure that it is on the disk."""
        with (directory / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a converted directory, after checking that every item is there in its full size.

    Raises:
        CheckpointError: the manifest is invalid or of another version, or an item is missing or cut short.
    """
    file = directory / MANIFEST
    values = read_json(file)
    if values.get("format") != _FORMAT or values.get("version") != _VERSION:
        raise CheckpointError(
            f"{file} has format {values.get('format')!r}, version {values.get('version')!r}; "
            f"this program reads {_FORMAT!r}, version {_VERSION}; convert the checkpoint again"
        )
    if values.keys() != {field.name for field in dataclasses.fields(Manifest)}:
        raise CheckpointError(f"{file} is incomplete; convert the checkpoint again")
    manifest = Manifest(**values)
    for item, expected in manifest.items.items():
        found = bytes_on_disk(directory / item)
        if found != expected:
            raise CheckpointError(
                f"{directory / item} holds {found} bytes instead of {expected}: the directory is damaged; "
                f"convert the checkpoint again"
            )
    return manifest


def bytes_on_disk(directory: Path) -> int:
    """The sum of the sizes of all files below `directory`, in bytes; 0 if there is none."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
