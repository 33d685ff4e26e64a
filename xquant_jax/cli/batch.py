"""`xquant batch MODEL PROMPTS.jsonl RESULTS.jsonl`: answer many prompts, and go on after a kill where it stopped."""

import argparse
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from xquant_jax.cli import terminal
from xquant_jax.cli.options import PREFIX, add_batch_arguments, load_model, options_of, prefix_of, settled, told
from xquant_jax.cli.progress import progress
from xquant_jax.errors import XQuantWarning
from xquant_jax.generation.answer import Drafted
from xquant_jax.generation.batch import Batch, prepare
from xquant_jax.generation.batch_files import Results, recorded_seed, settings_of
from xquant_jax.generation.batch_lines import Line, parse_prompts, unknown_columns
from xquant_jax.json_file import check_folder

SHOWN = 10
"""Lines with an error that are shown at the end; the results have them all."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "batch",
        help="answer the prompts of a JSONL file",
        description="PROMPTS: a JSON object a line, with prompt (a text), tokens (ids) or messages (a conversation), "
        "and if wanted id, and what differs from the options: max_tokens, seed, temperature, stop, n and so on; lines "
        "of OpenAI's batch API are taken too. RESULTS gets a line for each, in the order in which they finish; started "
        "again, the command goes on from what is there. The exit status is 1 if lines could not be answered.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_batch_arguments(parser)
    parser.add_argument("--prefix", type=Path, help=PREFIX)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_folder("RESULTS", arguments.results)
    request, options = options_of(arguments)
    prompts = arguments.prompts.read_bytes()
    model = load_model(arguments)
    request = settled(request, arguments, model, recorded_seed(arguments.results))
    lines = parse_prompts(prompts, request, keep=arguments.keep)
    warn_of_columns(lines, keep=arguments.keep)
    prepared = prepare(model, options, prefix_of(arguments, model, options))
    settings = settings_of(model, prompts, request, options, keep=arguments.keep)
    with Results.open(arguments.results, settings) as results:
        terminal.write(terminal.console(stderr=True), f"sampling: {told(request)}")
        return answer_lines(prepared, lines, results, keep=arguments.keep)


def answer_lines(prepared: Batch, lines: list[Line], results: Results, *, keep: bool) -> int:
    """Answers the lines that have no result yet, showing how far it is, and what could not be answered at the end.

    Returns the exit status: 1 if there is a line that could not be answered.
    """
    with progress(len(lines), len(results.done)) as report:
        for record in records(prepared, lines, results.done, keep=keep):
            results.write(record)
            report(record)
    return show(terminal.console(stderr=True), results.path, lines, results)


def records(prepared: Batch, lines: list[Line], done: Collection[int], *, keep: bool) -> Iterator[dict[str, Any]]:
    """The results of these lines, less those whose numbers are done, in the order in which they finish."""
    yield from (line.record(keep=keep) for line in lines if line.request is None and line.number not in done)
    asked = [(line, line.request) for line in lines if line.request is not None]
    answered = {index for index, (line, _) in enumerate(asked) if line.number in done}
    for answer in prepared.answers([request for _, request in asked], answered=answered):
        yield asked[answer.index][0].record(answer, keep=keep)


def warn_of_columns(lines: list[Line], *, keep: bool) -> None:
    """Says once which columns mean nothing here, unless they are kept."""
    columns = unknown_columns(lines, keep=keep)
    if columns and not keep:
        names = ", ".join(columns)
        warnings.warn(
            f"columns of the prompts that mean nothing here are left: {names} (--keep carries them to the results)",
            XQuantWarning,
            stacklevel=2,
        )


def show(console: Console, path: Path, lines: list[Line], results: Results) -> int:
    """How it went, and which lines of the prompts could not be answered; 1 if there are any."""
    done = [results.done[line.number] for line in lines]
    failed = [record for record in done if "error" in record]
    answers = [answer for record in done for answer in record.get("samples", [record])]
    new, answered = sum(len(answer.get("tokens", ())) for answer in answers), len(done) - len(failed)
    terminal.write(console, f"{path}: {answered} answers, {new} tokens")
    drafted = [Drafted(**answer["speculation"]) for answer in answers if "speculation" in answer]
    if drafted:
        terminal.write(console, sum(drafted[1:], drafted[0]).told())
    for record in failed[:SHOWN]:
        terminal.write(console, f"line {record['line']}: {record['error']}", style="red")
    if failed:
        console.print(
            f"{len(failed)} of {len(done)} lines could not be answered; their results have an error",
            style="bold red",
        )
    return int(bool(failed))
