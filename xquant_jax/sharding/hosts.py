"""Many processes as one job: they join, agree on what they were started with, and share what one of them reads."""

import json
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from xquant_jax.errors import ConfigError, XQuantError


def join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    join_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Makes this process one of a `jax.distributed` job; on TPU slices and under SLURM it needs no names.

    coordinator: HOST:PORT of process 0
    processes: how many there are; 1: this one alone
    process: which one this is, from 0
    join_timeout: seconds to wait for the others; if they are not there by then, the process ends with an error
    heartbeat_timeout: seconds until a process that is silent counts as dead

    Raises `ConfigError` for names that cannot be, in the words of the command line.
    """
    sizes = {"processes": processes, "join-timeout": join_timeout, "heartbeat-timeout": heartbeat_timeout}
    for option, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} is not possible; choose 1 or more")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator {coordinator} must be HOST:PORT, as 10.0.0.1:12355")
    if processes == 1:
        return
    named = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    given = [name for name, value in named.items() if value is not None]
    if given and len(given) < len(named):
        raise ConfigError("--coordinator, --processes and --process belong together; give all three or none")

    def give_up() -> None:
        print(
            f"error: not all processes joined within --join-timeout {join_timeout} s; start the same command on every "
            f"host, with one number of processes, and let all of them reach {coordinator or 'process 0'}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    waiting = threading.Timer(join_timeout, give_up)  # jax itself would abort, with a stack trace
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            **named, initialization_timeout=2 * join_timeout + 60, heartbeat_timeout_seconds=heartbeat_timeout
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"this process cannot join a job: {str(error).splitlines()[0]}; name it with --coordinator HOST:PORT "
            f"--processes N --process I, or run alone with --processes 1"
        ) from error
    finally:
        waiting.cancel()


def check_same_options(options: dict[str, Any]) -> None:
    """Raises `ConfigError` in all processes if they were not all started with the same options."""
    shared = {name: str(value) for name, value in sorted(options.items()) if value}
    checksums = np.atleast_1d(multihost_utils.process_allgather(np.uint32(zlib.crc32(json.dumps(shared).encode()))))
    if differing := np.flatnonzero(checksums != checksums[0]).tolist():
        raise ConfigError(
            f"processes {differing} were started with other options than process 0 (this is process "
            f"{jax.process_index()}, with {shared}); start the same command on every host"
        )


def from_process_0(value: Any) -> Any:
    """What process 0 has, ready for JSON, in all processes."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(size, np.uint8)
    padded[: text.size] = text
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))


def on_process_0(function: Callable[[], Any]) -> Any:
    """What `function` returns on process 0, in all processes; so do its errors, as `ConfigError`."""
    outcome = None
    if jax.process_index() == 0:
        try:
            outcome = {"value": function()}
        except (XQuantError, OSError) as error:
            outcome = {"error": str(error)}
    outcome = from_process_0(outcome)
    if "error" in outcome:
        raise ConfigError(outcome["error"])
    return outcome["value"]
