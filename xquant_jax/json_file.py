"""JSON files that commands write: whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from xquant_jax.errors import ConfigError


def check_folder(option: str, path: Path | None) -> None:
    """Raises `ConfigError` if a file that is to be written in the end has no folder."""
    if path and not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}")
    if path and path.is_dir():
        raise ConfigError(f"{option} {path} is a directory; name a file")


def write_json(path: Path, document: Any) -> None:
    """Replaces the file in one step, so that a reader (or a crash) never meets half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Raises `ConfigError` if the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); choose another file") from error
