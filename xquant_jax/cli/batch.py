"""`xquant batch MODEL PROMPTS.jsonl RESULTS.jsonl`: answer many prompts, and go on after a kill where it stopped."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from xquant_jax.cli import terminal
from xquant_jax.cli.options import add_batch_arguments, options_of
from xquant_jax.cli.progress import progress
from xquant_jax.generation.batch import Batch, prepare
from xquant_jax.generation.batch_files import Line, Results, parse_prompts, settings_of
from xquant_jax.generation.request import check_wishes
from xquant_jax.json_file import check_folder
from xquant_jax.model.loading import load

SHOWN = 10
"""Lines with an error that are shown at the end; the results have them all."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "batch",
        help="answer the prompts of a JSONL file",
        description="PROMPTS: a JSON object a line, with prompt (a text) or tokens (ids), and if wanted id, and what "
        "differs from the options: max_new_tokens, seed, temperature, stop and so on. RESULTS gets a line for each, in "
        "the order in which they finish; started again, the command goes on from what is there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_batch_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    check_folder("RESULTS", arguments.results)
    request, options = options_of(arguments)
    prompts = arguments.prompts.read_bytes()
    lines = parse_prompts(prompts, request)
    model = load(arguments.model, dtype=arguments.dtype, calibration=arguments.calibration)
    check_wishes(model, request)
    prepared = prepare(model, options)
    with Results.open(arguments.results, settings_of(model, prompts, request, options)) as results:
        answer_lines(prepared, lines, results)


def answer_lines(prepared: Batch, lines: list[Line], results: Results) -> None:
    """Answers the lines that have no result yet, showing how far it is, and what could not be answered at the end."""
    pending = [line for line in lines if line.number not in results.done]
    with progress(len(lines), len(results.done)) as report:
        for record in records(prepared, pending):
            results.write(record)
            report(record)
    show(terminal.console(stderr=True), results.path, lines, results)


def records(prepared: Batch, lines: list[Line]) -> Iterator[dict[str, Any]]:
    """The results of these lines, in the order in which they finish."""
    yield from (line.record() for line in lines if line.request is None)
    asked = [(line, line.request) for line in lines if line.request is not None]
    for answer in prepared.answers([request for _, request in asked]):
        yield asked[answer.index][0].record(answer)


def show(console: Console, path: Path, lines: list[Line], results: Results) -> None:
    """How it went, and which lines of the prompts could not be answered."""
    done = [results.done[line.number] for line in lines]
    failed = [record for record in done if "error" in record]
    new = sum(len(record.get("tokens", ())) for record in done)
    answered = len(done) - len(failed)
    terminal.write(console, f"{path}: {answered} answers, {new} tokens")
    for record in failed[:SHOWN]:
        terminal.write(console, f"line {record['line']}: {record['error']}", style="red")
    if failed:
        console.print(
            f"{len(failed)} of {len(done)} lines could not be answered; their results have an error",
            style="bold red",
        )
