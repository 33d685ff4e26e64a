"""Models of the Hugging Face Hub by name: `org/model` or `org/model@revision` becomes a directory in the Hub's cache.

Only what is read is downloaded: config, tokenizer, chat templates and safetensors, not the same weights in other
formats. Needs `huggingface_hub` (`pip install 'xquant-jax[hub]'`), and no network for what is in the cache.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.files import COPIED_FILES
from converters.shards import INDEX_FILE, SINGLE_FILE, shard_names
from xquant_jax.errors import CheckpointError

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/-]*))?")


def local_directory(model: str | Path) -> Path:
    """The directory of a model: itself, or that of a Hub name, downloaded unless it is in the cache.

    model: a directory, or a name: `org/model`, or `org/model@revision` with a branch, tag or commit. A name must be a
        string; a `Path`, and whatever exists here, is never looked for elsewhere.

    Raises `CheckpointError` for what is neither, or cannot be downloaded.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory
    name = _NAME.fullmatch(model) if isinstance(model, str) else None
    if name is None or directory.exists():
        raise CheckpointError(f"{directory} is not a directory; a model is a directory with config.json and weights")
    return _downloaded(name["repository"], name["revision"])


def _downloaded(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{repository} is not a directory, and models of the Hugging Face Hub need huggingface_hub; install it "
            f"with pip install 'xquant-jax[hub]'"
        ) from error

    def fetch(revision: str | None, *files: str) -> Path:
        with _explained(repository, revision):
            return Path(
                snapshot_download(repository, revision=revision, allow_patterns=list(files), library_name="xquant-jax")
            )

    directory = fetch(revision, *COPIED_FILES, SINGLE_FILE, INDEX_FILE)
    if not (directory / SINGLE_FILE).exists() and (directory / INDEX_FILE).exists():
        fetch(directory.name, *shard_names(directory))  # a snapshot is called by its commit: the same for both calls
    return directory


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turns what can happen to a download into a CheckpointError of one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated; accept its conditions at {constants.ENDPOINT}/{repository}, then hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a directory here nor a model that {constants.ENDPOINT} shows to you; check the "
            f"name, and run hf auth login if the model is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision!r}; name a branch, a tag or a commit of it after the @"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{repository} is not whole in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
                f"download it; unset HF_HUB_OFFLINE, or name a directory"
            ) from error
        raise CheckpointError(
            f"{repository} is not a directory here and cannot be downloaded from {constants.ENDPOINT}: "
            f"{_first_line(error.__cause__ or error)}; check the network, or name a directory"
        ) from error
    except Exception as error:  # whatever the client, its transport and the disk raise
        raise CheckpointError(
            f"{repository} cannot be downloaded from {constants.ENDPOINT}: {_first_line(error)}; try again, or name a "
            f"directory"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".;:") if text else type(error).__name__
