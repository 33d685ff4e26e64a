"""A directory that appears whole or not at all.

It is written under a hidden name beside its place and renamed at the end. What a killed process left behind
is recognized by a lock that nobody holds any more, and removed by the next conversion to the same place.
"""

import fcntl
import glob
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from xquant_jax.errors import CheckpointError

_LOCK = ".lock"


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yields a new directory that becomes `directory` at the end of the block, or vanishes if that raises.

    SIGTERM in the block ends it like an interrupt from the keyboard.

    Raises:
        CheckpointError: `directory` is a file or is not empty, or its place cannot be written.
    """
    require_free(directory)
    with _terminable():
        partial = _create(directory)
        try:
            with (partial / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield partial
                (partial / _LOCK).unlink()
            _commit(partial, directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def require_free(directory: Path) -> None:
    """CheckpointError unless `directory` does not exist yet or is an empty directory."""
    if directory.is_dir():
        if any(directory.iterdir()):
            raise CheckpointError(f"{directory} is not empty; choose a new directory or remove it")
    elif directory.exists():
        raise CheckpointError(f"{directory} is a file; choose a new directory")


def _commit(partial: Path, directory: Path) -> None:
    try:
        partial.rename(directory)  # replaces an empty directory, and nothing else
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be put in place: {error.strerror or error}") from error
    descriptor = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(directory: Path) -> Path:
    partial = directory.parent / f".{directory.name}.partial-{secrets.token_hex(4)}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error
    return partial


def _remove_abandoned(directory: Path) -> None:
    for partial in directory.parent.glob(f".{glob.escape(directory.name)}.partial-*"):
        try:
            with (partial / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process is writing it, or it is not ours
            continue
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that cleaning up happens; only the main thread may ask for that."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
