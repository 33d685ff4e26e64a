"""Opening a checkpoint, whatever its kind: what the kinds have in common, and the choice between them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from converters.converted import ConvertedCheckpoint
from converters.hub import local_directory
from converters.huggingface import HuggingFaceCheckpoint
from converters.manifest import MANIFEST
from converters.shards import INDEX_FILE, SINGLE_FILE
from converters.svd import FactorKind
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import Tree


class Checkpoint(Protocol):
    """A model on disk, read one layer at a time as nested dicts of numpy arrays.

    `layer` and `outer` hold the parameters in the type of the model (`model_config.dtype`; vectors may be
    float32). With `sharding`, a tree like theirs, they read straight to devices, each process its own shards.
    """

    path: Path
    config: dict[str, Any]  # config.json
    model_config: ModelConfig

    @property
    def factor_kinds(self) -> tuple[FactorKind, ...]:
        """The kinds of factors that the model has: none where every query head has keys of its own (K = H)."""
        ...

    def layer(self, index: int, sharding: Any = None) -> Tree:
        """The parameters of one layer."""
        ...

    def outer(self, parts: Iterable[str] = ..., sharding: Any = None) -> Tree:
        """The parameters outside the layers, of these parts: `embed`, `final_norm`, `head` unless tied."""
        ...


def open_checkpoint(path: str | Path) -> HuggingFaceCheckpoint | ConvertedCheckpoint:
    """Opens a converted directory (one with `xquant.json`) or a Hugging Face directory.

    path: the directory, or a string that names a model of the Hub (see `local_directory`)

    Raises:
        CheckpointError: the path holds neither, or a conversion that was not finished, or a damaged
            checkpoint; or the model cannot be downloaded.
        ConfigError: the model is not supported.
    """
    directory = local_directory(path)
    if (directory / MANIFEST).exists():
        return ConvertedCheckpoint(directory)
    if (directory / "layers").is_dir() and not any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(
            f"{directory} has layers but no {MANIFEST}: its conversion was not finished; remove it and convert again"
        )
    if not (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory} is not a model: looked for {MANIFEST} (converted) and for config.json with "
            f"{SINGLE_FILE} or {INDEX_FILE} (Hugging Face)"
        )
    return HuggingFaceCheckpoint(directory)
