"""`xquant generate MODEL --prompt ...`: continue prompts, show the text and what the cache took."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xquant_jax.cli import terminal
from xquant_jax.cli.options import MODEL, add_options, options_of
from xquant_jax.errors import ConfigError, PromptError
from xquant_jax.generation.generate import Generation, generate_requests, stream_requests
from xquant_jax.json_file import check_folder, write_json
from xquant_jax.model.loading import load


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate", help="continue prompts", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--prompt", action="append", default=[], help="a text to continue; may be repeated")
    parser.add_argument("--prompt-file", action="append", default=[], type=Path, help="a file whose text is a prompt")
    add_options(parser)
    parser.add_argument("--cache-tokens", type=int, help="tokens per sequence that the cache holds (default: enough)")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes (one prompt)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    prompts = [*arguments.prompt, *map(_read, arguments.prompt_file)]
    if arguments.stream and (len(prompts) != 1 or arguments.json):
        raise ConfigError("--stream prints one prompt's text as it comes: give one --prompt and no --json")
    check_folder("--json", arguments.json)
    request, options = options_of(arguments)
    model = load(arguments.model, dtype=arguments.dtype, calibration=arguments.calibration)
    requests = [dataclasses.replace(request, prompt=prompt) for prompt in prompts]
    console = terminal.console()
    if arguments.stream:
        tokens = stream_requests(model, requests, options)
        terminal.write(console, prompts[0], style="dim", end="")
        for token in tokens:
            terminal.write(console, token.text, end="")
        terminal.write(console, "")
        return
    generation = generate_requests(model, requests, options)
    if arguments.json:
        write_json(arguments.json, generation.to_json())
    _show(console, prompts, generation)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _show(console: Console, prompts: Sequence[str], generation: Generation) -> None:
    for prompt, result in zip(prompts, generation.results, strict=True):
        terminal.write(console, prompt, style="dim", end="")
        terminal.write(console, result.text)
        console.print(f"({len(result.tokens)} tokens, {result.finish_reason})\n", style="dim")
    size = generation.cache_bytes
    new = sum(len(result.tokens) for result in generation.results)
    table = Table("codes", "scales", "window", "scratch", "total", title="cache bytes")
    table.add_row(*(f"{n:,}" for n in (size.codes, size.scales, size.window, size.scratch, size.total)))
    console.print(table)
    rate = f"{new / generation.decode_s:,.0f} tokens/s" if generation.decode_s > 0.001 else "one step"
    console.print(
        f"compile {generation.compile_s:.1f} s, prefill {generation.prefill_s:.3f} s, "
        f"decode {generation.decode_s:.3f} s ({rate}), kernels {generation.implementation}"
    )
