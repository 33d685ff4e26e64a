"""Answers the prompts of a JSONL file on all devices of a pod: the same program on every host, started at once.

    python scripts/pod_generate.py MODEL PROMPTS.jsonl RESULTS.jsonl --mesh data=2,sequence=4,tensor=4 --cache xquant:4

On TPU slices and under SLURM the hosts find each other; elsewhere name them with --coordinator, --processes and
--process. MODEL must be readable on every host, PROMPTS and RESULTS only on that of process 0, which reads, writes and
shows progress. Files and restarts are those of `xquant batch`: killed at any moment and started again, with as many
hosts as before or not, it answers what has no result yet. docs/pods.md walks through it.
"""

import argparse
import contextlib
import sys

import jax

from xquant_jax import sharding
from xquant_jax.cli.batch import answer_lines, records, warn_of_columns
from xquant_jax.cli.options import add_batch_arguments, load_model, options_of, settled
from xquant_jax.errors import XQuantError
from xquant_jax.generation.batch import prepare
from xquant_jax.generation.batch_files import Results, recorded_seed, settings_of
from xquant_jax.generation.batch_lines import parse_prompts
from xquant_jax.json_file import check_folder
from xquant_jax.sharding.hosts import check_same_options, join, on_process_0

OWN = ("process", "coordinator", "model", "prompts", "results", "join_timeout", "heartbeat_timeout")
"""Options that may differ from host to host."""


def run(arguments: argparse.Namespace) -> int:
    check_same_options({name: value for name, value in vars(arguments).items() if name not in OWN})
    request, options = options_of(arguments)
    sizes = sharding.parse_mesh(arguments.mesh) if arguments.mesh else {"data": jax.device_count()}
    mesh = sharding.make_mesh(**sizes)

    def read() -> tuple[str, int | None]:
        check_folder("RESULTS", arguments.results)
        text = arguments.prompts.read_bytes().decode("latin-1")  # any bytes, as they are
        return text, recorded_seed(arguments.results)

    text, seed = on_process_0(read)
    raw, model = text.encode("latin-1"), load_model(arguments, mesh)
    request = settled(request, arguments, model, seed)
    lines = parse_prompts(raw, request, keep=arguments.keep)
    warn_of_columns(lines, keep=arguments.keep)
    prepared = prepare(model, options)
    settings = settings_of(model, raw, request, options, keep=arguments.keep)
    with contextlib.ExitStack() as stack:
        opened: list[Results] = []

        def open_results() -> list[int]:
            opened.append(stack.enter_context(Results.open(arguments.results, settings)))
            return list(opened[0].done)

        done, status = set(on_process_0(open_results)), 0
        if opened:
            status = answer_lines(prepared, lines, opened[0], keep=arguments.keep)
        else:
            for _ in records(prepared, lines, done, keep=arguments.keep):
                pass
        return on_process_0(lambda: status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_arguments(parser)
    parser.add_argument("--mesh", help="data=2,sequence=4,tensor=4 (default: all devices along data)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--processes", type=int, help="how many there are; 1: this one alone")
    parser.add_argument("--process", type=int, help="which one this is, from 0")
    parser.add_argument("--join-timeout", type=int, default=300, help="seconds to wait for the others (300)")
    parser.add_argument("--heartbeat-timeout", type=int, default=100, help="seconds until a silent host is dead (100)")
    arguments = parser.parse_args()
    timeouts = {name: getattr(arguments, name) for name in ("join_timeout", "heartbeat_timeout")}
    try:
        join(arguments.coordinator, arguments.processes, arguments.process, **timeouts)
        return run(arguments)
    except (XQuantError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
