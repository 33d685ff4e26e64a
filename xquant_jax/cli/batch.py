"""`xquant batch MODEL PROMPTS.jsonl RESULTS.jsonl`: answer many prompts, and go on after a kill where it stopped."""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xquant_jax.errors import ConfigError
from xquant_jax.generation import batch
from xquant_jax.generation.batch_files import Line, Results, parse_prompts, settings_of
from xquant_jax.generation.sampling import Sampling
from xquant_jax.json_file import check_folder
from xquant_jax.model.loading import DTYPES, load

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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything but the files; `options_of` turns it into arguments."""
    parser.add_argument("--cache", default="xquant:4", help="name[:bits][,option=value...]: bf16, int8, xquant:4 ...")
    parser.add_argument("--slots", type=int, help=f"sequences at the same time (default: {batch.DEFAULT_SLOTS})")
    parser.add_argument("--memory", help="instead of --slots, bytes that the caches may take: 500000000, 12GB or 8GiB")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of every prompt that does not name its own")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends an answer; may be repeated")
    parser.add_argument("--stop-id", action="append", type=int, help="a token id that does, instead of the model's own")
    parser.add_argument("--prefill-chunk", type=int, default=512, help="prompt tokens at once; 0: the whole prompt")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the model's; float32 on CPU)")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of xquant calibrate (default: the model's own)"
    )


def options_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that `batch.prepare` and `settings_of` share, and those that only say how much runs at once."""
    options = {
        "cache": arguments.cache,
        "max_new_tokens": arguments.max_new_tokens,
        "sampling": Sampling(
            repetition_penalty=arguments.repetition_penalty,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
        ),
        "seed": arguments.seed,
        "stop": arguments.stop,
        "stop_ids": arguments.stop_id,
        "prefill_chunk": arguments.prefill_chunk or None,
    }
    return options, {"slots": arguments.slots, "memory": parse_bytes(arguments.memory)}


def parse_bytes(text: str | None) -> int | None:
    """Bytes from 500000000, 12GB (powers of 1000) or 8GiB (powers of 1024)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])(i?)B)?", text, flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--memory {text} is not a number of bytes; write 500000000, 12GB or 8GiB")
    number, prefix, binary = match.groups()
    power = 0 if prefix is None else "KMGT".index(prefix.upper()) + 1
    return int(float(number) * (1024 if binary else 1000) ** power)


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


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on a terminal, a plain line at every tenth of the prompts elsewhere; on stderr."""
    console = Console(stderr=True)
    if done:
        console.print(f"{done} of {total} lines have their results already", highlight=False)
    if not console.is_terminal:
        finished = done

        def line(record: dict[str, Any]) -> None:
            nonlocal finished
            finished += 1
            if finished * 10 // total > (finished - 1) * 10 // total:
                console.print(f"{finished}/{total}", highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=total, completed=done)
        new = 0

        def advance(record: dict[str, Any]) -> None:
            nonlocal new
            new += len(record.get("tokens", ()))
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = f"{new / elapsed:,.0f} tokens/s" if elapsed else "answering"
            bar.update(task, advance=1, description=rate)

        yield advance


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
