"""The results of an offline batch, one JSON object a line, and what makes a restart safe.

RESULTS.jsonl    {"line", "id", "text", "tokens", "logprobs", "finish_reason", "seed"} or {"line", "id", "error"}; see
                 `batch_lines`, where the prompts are read
RESULTS.jsonl.run    what the results depend on, so that they are never mixed with those of another run

Every line of prompts that is not blank gets one line of results, written as a whole and flushed to the disk. A line
that a kill cut short is dropped by the next start, and its prompt answered again.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from xquant_jax.errors import ConfigError
from xquant_jax.generation.request import Options, Request, check_wishes
from xquant_jax.json_file import read_json, write_json
from xquant_jax.model.loading import Model


class Results:
    """RESULTS.jsonl, open for this process alone. `done`: the lines of prompts that have their results."""

    def __init__(self, path: Path, file: BinaryIO, done: dict[int, dict[str, Any]]) -> None:
        self.path = path
        self.done = done
        self._file = file

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> "Results":
        """Starts the file, or goes on from what it holds.

        Raises `ConfigError` if it holds results that do not belong to these `settings`, or another process writes it.
        """
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"another process writes {path}; wait for it, or name another file") from None
        try:
            file.seek(0)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            _check_settings(path, settings, started=bool(text))
            done = _records(path, whole)
            file.truncate(len(whole))
        except BaseException:
            file.close()
            raise
        return cls(path, file, done)

    def write(self, record: dict[str, Any]) -> None:
        """One line more, on the disk when this returns."""
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[record["line"]] = record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _records(path: Path, text: bytes) -> dict[int, dict[str, Any]]:
    done = {}
    for number, raw in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(raw)
            done[record["line"]] = record
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path}, line {number} was not written by a batch; mend or remove it, or name another file"
            ) from None
    return done


def _check_settings(path: Path, settings: dict[str, Any], *, started: bool) -> None:
    """Writes them beside results that are not started yet; else they must be those that are there."""
    sidecar = path.with_name(f"{path.name}.run")
    if not started:
        write_json(sidecar, settings)
        return
    if not sidecar.exists():
        raise ConfigError(f"{path} exists, and there is no {sidecar.name} that says what it holds; name another file")
    before = read_json(sidecar)
    if not isinstance(before, dict):
        raise ConfigError(f"{sidecar} was not written by a batch; name another file for the results")
    for name in [*settings, *before]:
        if before.get(name) != settings.get(name):
            raise ConfigError(
                f"{path} is from another run: {name} was {before.get(name)!r} and is {settings.get(name)!r} now; "
                f"name another file, or remove it with {sidecar.name}"
            )


def recorded_seed(path: Path) -> int | None:
    """The seed of the results that are there, of a run that was not given one."""
    sidecar = path.with_name(f"{path.name}.run")
    settings = read_json(sidecar) if path.exists() and path.stat().st_size and sidecar.exists() else None
    seed = settings.get("seed") if isinstance(settings, dict) else None
    return seed if isinstance(seed, int) else None


def settings_of(model: Model, prompts: bytes, default: Request, options: Options, *, keep: bool) -> dict[str, Any]:
    """What results depend on, ready for JSON; how many run at once, on which devices and with which drafts is not part
    of it.

    prompts: the content of the file
    default: what is asked for where a line says nothing; its seed is a number

    Raises `ConfigError` for a default that cannot be honoured.
    """
    cache_config, asked = options.cache_config, check_wishes(model, default)
    said = {name: value for name, value in asked.items() if name not in ("logprobs", "speculate")}
    return {
        "weights": model.checksum,
        "dtype": model.dtype,
        "prompts": hashlib.sha256(prompts).hexdigest(),
        "cache": str(cache_config),
        "calibration": model.calibration_hash(cache_config),
        **said,
        "sampling": dataclasses.asdict(asked["sampling"]),
        "stop": list(asked["stop"]),
        "stop_ids": list(asked["stop_ids"]),
        "add_special_tokens": default.add_special_tokens,
        "prefill_chunk": options.prefill_chunk,
        "keep": keep,
    }
