"""Answers the prompts of a JSONL file on all devices of a pod: the same program on every host, started at once.

    python scripts/pod_generate.py MODEL PROMPTS.jsonl RESULTS.jsonl --mesh data=2,sequence=4,tensor=4 --cache xquant:4

On TPU slices and under SLURM the hosts find each other; elsewhere name them with --coordinator, --processes and
--process. MODEL must be readable on every host, PROMPTS and RESULTS only on that of process 0, which reads, writes and
shows progress. Files and restarts are those of `xquant batch`: killed at any moment and started again, with as many
hosts as before or not, it answers what has no result yet. docs/pods.md walks through it.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from xquant_jax import sharding
from xquant_jax.cli.batch import show
from xquant_jax.cli.options import add_options, options_of
from xquant_jax.cli.progress import progress
from xquant_jax.errors import ConfigError, XQuantError
from xquant_jax.generation import batch
from xquant_jax.generation.batch_files import Results, parse_prompts, settings_of
from xquant_jax.json_file import check_folder
from xquant_jax.model.loading import load


def join(arguments: argparse.Namespace) -> None:
    """Makes this process one of the job. Ends it with an error if the others are not there within --join-timeout."""
    for option in ("processes", "join_timeout", "heartbeat_timeout"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {value} is not possible; choose 1 or more")
    if arguments.coordinator is not None and not re.fullmatch(r".+:\d+", arguments.coordinator):
        raise ConfigError(f"--coordinator {arguments.coordinator} must be HOST:PORT, as 10.0.0.1:12355")
    if arguments.processes == 1:
        return
    named = {
        "coordinator_address": arguments.coordinator,
        "num_processes": arguments.processes,
        "process_id": arguments.process,
    }
    given = [name for name, value in named.items() if value is not None]
    if given and len(given) < len(named):
        raise ConfigError("--coordinator, --processes and --process belong together; give all three or none")
    timeout = arguments.join_timeout

    def give_up() -> None:
        print(
            f"error: not all processes joined within --join-timeout {timeout} s; start the same command on every host, "
            f"with one number of processes, and let all of them reach {arguments.coordinator or 'process 0'}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    waiting = threading.Timer(timeout, give_up)  # jax itself would abort, with a stack trace
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            **named, initialization_timeout=2 * timeout + 60, heartbeat_timeout_seconds=arguments.heartbeat_timeout
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"this process cannot join a job: {str(error).splitlines()[0]}; name it with --coordinator HOST:PORT "
            f"--processes N --process I, or run alone with --processes 1"
        ) from error
    finally:
        waiting.cancel()


def check_same_options(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` in all processes if they were not all started with the same options."""
    own = {"process", "coordinator", "model", "prompts", "results", "join_timeout", "heartbeat_timeout"}
    shared = {name: str(value) for name, value in sorted(vars(arguments).items()) if name not in own and value}
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


def on_process_0(function: Any) -> Any:
    """What `function` returns on process 0, in all processes; so do its errors."""
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


def run(arguments: argparse.Namespace) -> None:
    leads = jax.process_index() == 0
    check_same_options(arguments)
    options, size = options_of(arguments)
    sizes = sharding.parse_mesh(arguments.mesh) if arguments.mesh else {"data": jax.device_count()}
    mesh = sharding.make_mesh(**sizes)

    def read() -> str:
        check_folder("RESULTS", arguments.results)
        return arguments.prompts.read_bytes().decode("latin-1")  # any bytes, as they are

    raw = on_process_0(read).encode("latin-1")
    lines = parse_prompts(raw)
    model = load(arguments.model, dtype=arguments.dtype, calibration=arguments.calibration, mesh=mesh)
    prepared = batch.prepare(model, **options, **size)
    settings = settings_of(model, raw, **options)
    with contextlib.ExitStack() as stack:
        opened: list[Results] = []

        def open_results() -> list[int]:
            opened.append(stack.enter_context(Results.open(arguments.results, settings)))
            return list(opened[0].done)

        done = set(on_process_0(open_results))
        pending = [line for line in lines if line.number not in done]
        asked = [line for line in pending if line.request is not None]
        answers = prepared.answers(line.request for line in asked if line.request is not None)
        if not leads:
            for _ in answers:
                pass
            return
        results = opened[0]
        with progress(len(lines), len(done)) as report:
            for line in pending:
                if line.request is None:
                    results.write(line.record())
                    report(line.record())
            for answer in answers:
                record = asked[answer.index].record(answer)
                results.write(record)
                report(record)
        show(Console(stderr=True), arguments.results, lines, results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help='converted or Hugging Face directory, or "demo"')
    parser.add_argument("prompts", metavar="PROMPTS.jsonl", type=Path)
    parser.add_argument("results", metavar="RESULTS.jsonl", type=Path)
    add_options(parser)
    parser.add_argument("--mesh", help="data=2,sequence=4,tensor=4 (default: all devices along data)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--processes", type=int, help="how many there are; 1: this one alone")
    parser.add_argument("--process", type=int, help="which one this is, from 0")
    parser.add_argument("--join-timeout", type=int, default=300, help="seconds to wait for the others (300)")
    parser.add_argument("--heartbeat-timeout", type=int, default=100, help="seconds until a silent host is dead (100)")
    arguments = parser.parse_args()
    try:
        join(arguments)
        run(arguments)
    except (XQuantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
