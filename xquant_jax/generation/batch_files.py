"""The files of an offline batch: prompts in, results out, one JSON object a line, and what makes a restart safe.

PROMPTS.jsonl    {"prompt": text} or {"tokens": [ids]}, and if wanted "id" and what differs from the run: the fields of
                 `Request` ("max_new_tokens", "seed", "stop", "stop_ids", "logprobs") and of `Sampling`
RESULTS.jsonl    {"line", "id", "text", "tokens", "logprobs", "finish_reason"} or {"line", "id", "error"}; with
                 "top_logprobs" where "logprobs" asks for them
RESULTS.jsonl.run    what the results depend on, so that they are never mixed with those of another run

Every line of prompts that is not blank gets one line of results, written as a whole and flushed to the disk; `line`
counts from 1. A line that a kill cut short is dropped by the next start, and its prompt answered again.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from xquant_jax.errors import ConfigError
from xquant_jax.generation.request import Answer, Options, Request
from xquant_jax.json_file import read_json, write_json
from xquant_jax.model.loading import Model
from xquant_jax.model.weights import weights_checksum

WHOLE = ("max_new_tokens", "seed", "top_k", "logprobs")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
FIELDS = ("id", "prompt", "tokens", "max_new_tokens", "seed", *SAMPLING, "stop", "stop_ids", "logprobs")


@dataclasses.dataclass(frozen=True)
class Line:
    """Line `number` of the prompts: a request, or the error that it is. `id` is the user's own, None without one."""

    number: int
    id: Any
    request: Request | None
    error: str | None = None

    def record(self, answer: Answer | None = None) -> dict[str, Any]:
        """Its line of results."""
        known = {"line": self.number} | ({} if self.id is None else {"id": self.id})
        if answer is None or answer.completion is None:
            return known | {"error": self.error if answer is None else answer.error}
        completion = answer.completion.to_json()
        del completion["prompt"]
        return known | completion


def parse_prompts(text: bytes, default: Request) -> list[Line]:
    """All lines that are not blank, with what `default` says where they say nothing; a malformed one has an `error`."""
    lines, first_with_id = [], {}
    for number, raw in enumerate(text.split(b"\n"), start=1):
        if not raw.strip():
            continue
        identity = None
        try:
            entry = _entry(raw)
            identity = _writable(entry.get("id"))
            if identity is not None and (earlier := first_with_id.setdefault(_plain(identity), number)) != number:
                raise ValueError(f"id {identity!r} is that of line {earlier} too; give every line its own")
            lines.append(Line(number, identity, _request(entry, default)))
        except ValueError as error:
            lines.append(Line(number, identity, None, str(error)))
    return lines


def _entry(raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON {type(entry).__name__}; it must be an object with prompt or tokens")
    return entry


def _writable(identity: Any) -> Any:
    """An id that results can repeat: no NaN, no infinity, nothing but Unicode."""
    try:
        json.dumps(identity, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("its id is not valid Unicode") from None
    except ValueError:
        raise ValueError("its id holds a number that JSON does not have") from None
    return identity


def _request(entry: dict[str, Any], default: Request) -> Request:
    if unknown := entry.keys() - set(FIELDS):
        raise ValueError(f"{min(unknown)!r} is not known; known: {', '.join(FIELDS)}")
    if ("prompt" in entry) == ("tokens" in entry):
        raise ValueError("it must have either prompt or tokens")
    prompt: Any = entry.get("prompt", entry.get("tokens"))
    if "prompt" in entry and not isinstance(prompt, str):
        raise ValueError(f"prompt is a JSON {type(prompt).__name__}; it must be a string")
    if "tokens" in entry and not _is_list(prompt, _is_integer):
        raise ValueError("tokens must be a list of whole numbers")
    said = {name: entry[name] for name in FIELDS[3:] if entry.get(name) is not None}
    for name, value in said.items():
        if name in WHOLE and not _is_integer(value):
            raise ValueError(f"{name}={value!r} is not a whole number")
        if name in NUMBERS and not (_is_integer(value) or isinstance(value, float)):
            raise ValueError(f"{name}={value!r} is not a number")
    if not _is_list(said.get("stop", []), lambda string: isinstance(string, str)):
        raise ValueError("stop must be a list of strings")
    if not _is_list(said.get("stop_ids", []), _is_integer):
        raise ValueError("stop_ids must be a list of whole numbers")
    sampling = {name: said.pop(name) for name in SAMPLING if name in said}
    return dataclasses.replace(
        default, prompt=prompt, sampling=dataclasses.replace(default.sampling, **sampling), **said
    )


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(identity: Any) -> str:
    return json.dumps(identity, sort_keys=True)


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


def settings_of(model: Model, prompts: bytes, default: Request, options: Options) -> dict[str, Any]:
    """What results depend on, ready for JSON; how many run at once and on which devices is not part of it.

    prompts: the content of the file
    default: what is asked for where a line says nothing
    """
    cache_config = options.cache_config
    return {
        "weights": f"{weights_checksum(model.params):08x}",
        "dtype": model.dtype,
        "prompts": hashlib.sha256(prompts).hexdigest(),
        "cache": str(cache_config),
        "calibration": model.calibration_hash(cache_config),
        "max_new_tokens": default.max_new_tokens,
        "sampling": dataclasses.asdict(default.sampling),
        "seed": default.seed,
        "stop": list(default.stop),
        "stop_ids": list(model.stop_ids if default.stop_ids is None else default.stop_ids),
        "prefill_chunk": options.prefill_chunk,
    }
