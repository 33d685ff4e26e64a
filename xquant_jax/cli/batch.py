"""`xquant batch MODEL PROMPTS.jsonl RESULTS.jsonl`: answer many prompts, and go on after a kill where it stopped."""

import argparse
from pathlib import Path

from rich.console import Console

from xquant_jax.cli.options import add_options, options_of
from xquant_jax.cli.progress import progress
from xquant_jax.generation import batch
from xquant_jax.generation.batch_files import Line, Results, parse_prompts, settings_of
from xquant_jax.json_file import check_folder
from xquant_jax.model.loading import load

SHOWN = 10
"""Lines with an error that are shown at the end; the results have them all."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "batch",
        help="answer the prompts of a JSONL file",
        description="PROMPTS: a JSON object a line, with prompt (a text) or tokens (ids), and if wanted id, "
        "max_new_tokens and seed. RESULTS gets a line for each, in the order in which they finish; started again, the "
        "command goes on from what is there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help='converted or Hugging Face directory, or "demo"')
    parser.add_argument("prompts", metavar="PROMPTS.jsonl", type=Path)
    parser.add_argument("results", metavar="RESULTS.jsonl", type=Path)
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    check_folder("RESULTS", arguments.results)
    options, size = options_of(arguments)
    prompts = arguments.prompts.read_bytes()
    lines = parse_prompts(prompts)
    model = load(arguments.model, dtype=arguments.dtype, calibration=arguments.calibration)
    prepared = batch.prepare(model, **options, **size)
    with Results.open(arguments.results, settings_of(model, prompts, **options)) as results:
        pending = [line for line in lines if line.number not in results.done]
        asked = [line for line in pending if line.request is not None]
        with progress(len(lines), len(results.done)) as report:
            for line in pending:
                if line.request is None:
                    results.write(line.record())
                    report(line.record())
            for answer in prepared.answers(line.request for line in asked if line.request is not None):
                record = asked[answer.index].record(answer)
                results.write(record)
                report(record)
        show(Console(stderr=True), arguments.results, lines, results)


def show(console: Console, path: Path, lines: list[Line], results: Results) -> None:
    """How it went, and which lines of the prompts could not be answered."""
    records = [results.done[line.number] for line in lines]
    failed = [record for record in records if "error" in record]
    new = sum(len(record.get("tokens", ())) for record in records)
    answered = len(records) - len(failed)
    console.print(f"{path}: {answered} answers, {new} tokens", highlight=False, markup=False, soft_wrap=True)
    for record in failed[:SHOWN]:
        message = f"line {record['line']}: {record['error']}"
        console.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    if failed:
        console.print(
            f"{len(failed)} of {len(records)} lines could not be answered; their results have an error",
            style="bold red",
            highlight=False,
        )
