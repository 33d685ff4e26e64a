"""Trees of arrays on disk, one Orbax checkpoint per tree: written from numpy, read to numpy or to devices.

Orbax is imported by the functions that use it: reading a Hugging Face directory needs none, and it takes a while.
"""

import errno
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import Tree

_CHUNK_BYTES = 4 << 20  # read as a unit: who holds a shard of a matrix must not read all of it
_FULL = "No space left on device"


def write_tree(path: Path, tree: Tree) -> None:
    """Writes a nested dict of numpy arrays to the new directory `path`, bit by bit as they are.

    Raises whatever Orbax, TensorStore and the system raise; see `writing`.
    """
    import orbax.checkpoint as ocp

    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with _quiet():
        _checkpointer().save(path.absolute(), args=ocp.args.PyTreeSave(tree, save_args=arguments))


def read_tree(path: Path, sharding: Mapping[str, Any] | jax.sharding.Sharding | None = None) -> Tree:
    """The tree in `path`.

    Args:
        path: a directory that `write_tree` wrote.
        sharding: a tree of the same structure, or one sharding for all leaves: the arrays come back as
            `jax.Array`s on those devices, and a process reads only the chunks that its own devices hold.
            None: numpy arrays.

    Raises:
        CheckpointError: nothing is there, or it is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing; convert the checkpoint again")
    try:
        with _quiet():
            if sharding is None:
                return _checkpointer().restore(path.absolute())
            return _restore_sharded(path.absolute(), sharding)
    except Exception as error:  # Orbax and TensorStore raise whatever their layers raise
        raise CheckpointError(f"{path} is damaged or unreadable: {_first_line(error)}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what can happen to a writer of `path`, a full disk above all, into a CheckpointError."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # TensorStore reports a full disk as a ValueError with the system's text
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL in str(error)
        reason = "the disk is full" if full else _first_line(error)
        raise CheckpointError(f"{path} cannot be written: {reason}") from error


def _restore_sharded(path: Path, sharding: Any) -> Tree:
    import orbax.checkpoint as ocp

    checkpointer = _checkpointer()
    saved: Any = checkpointer.metadata(path).item_metadata
    if isinstance(sharding, jax.sharding.Sharding):
        arguments = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), saved.tree)
    else:
        arguments = jax.tree.map(lambda _, to: ocp.ArrayRestoreArgs(sharding=to), saved.tree, sharding)
    return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Uncompressed: zstd saves little of bf16 weights, and writing and reading took 2 to 4 times as long.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging every save, and every error that it also raises."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition(" [tensorstore_spec=")[0]
    return text.splitlines()[0] if text else type(error).__name__
