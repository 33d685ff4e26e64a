"""`xquant generate MODEL --prompt ...`: continue prompts, show the text and what the cache took."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xquant_jax.cli import terminal
from xquant_jax.cli.options import (
    MODEL,
    PREFIX,
    add_options,
    load_model,
    options_of,
    prefix_of,
    read_text,
    settled,
    told,
)
from xquant_jax.errors import ConfigError
from xquant_jax.generation.generate import Generation, generate_requests, stream_requests
from xquant_jax.generation.prompts import Chat
from xquant_jax.generation.request import Request
from xquant_jax.json_file import check_folder, write_json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate", help="continue prompts", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--prompt", action="append", default=[], help="a text to continue; may be repeated")
    parser.add_argument("--prompt-file", action="append", default=[], help="a file whose text is a prompt; -: stdin")
    parser.add_argument("--chat", action="append", default=[], help="a message to answer, by the model's chat template")
    parser.add_argument("--system", help="the system message before those of --chat")
    parser.add_argument("--prefix", type=Path, help=PREFIX)
    parser.add_argument("-n", type=int, default=1, help="answers to every prompt")
    add_options(parser)
    parser.add_argument("--cache-tokens", type=int, help="tokens per sequence that the cache holds (default: enough)")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes (one prompt)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    prompts = [*arguments.prompt, *map(read_text, arguments.prompt_file), *_chats(arguments.chat, arguments.system)]
    if arguments.stream and (len(prompts) != 1 or arguments.n != 1 or arguments.json):
        raise ConfigError("--stream prints one prompt's text as it comes: give one --prompt, no -n and no --json")
    check_folder("--json", arguments.json)
    request, options = options_of(arguments)
    model = load_model(arguments)
    request = settled(request, arguments, model)
    requests = [dataclasses.replace(request, prompt=prompt) for prompt in prompts]
    prefix = prefix_of(arguments, model, options)
    console = terminal.console()
    if arguments.stream:
        tokens = stream_requests(model, requests, options, prefix)
        if isinstance(prompts[0], str):
            terminal.write(console, prompts[0], style="dim", end="")
        error = None
        for token in tokens:
            terminal.write(console, token.text, end="")
            error = token.error
        terminal.write(console, "")
        if error:
            terminal.write(terminal.console(stderr=True), f"error: {error}", style="red")
        return int(error is not None)
    generation = generate_requests(model, requests, options, prefix)
    if arguments.json:
        write_json(arguments.json, generation.to_json())
    _show(console, [prompt for prompt in prompts for _ in range(arguments.n)], generation, request)
    return int(any(result.error for result in generation.results))


def _chats(messages: Sequence[str], system: str | None) -> list[Chat]:
    if system is not None and not messages:
        raise ConfigError("--system goes before a message of --chat, and there is none")
    first = [] if system is None else [{"role": "system", "content": system}]
    return [Chat([*first, {"role": "user", "content": message}]) for message in messages]


def _show(console: Console, prompts: Sequence[Any], generation: Generation, request: Request) -> None:
    for prompt, result in zip(prompts, generation.results, strict=True):
        if isinstance(prompt, str):  # an answer to a message stands alone
            terminal.write(console, prompt, style="dim", end="")
        terminal.write(console, result.text)
        console.print(f"({len(result.tokens)} tokens, {result.finish_reason})\n", style="dim")
        if result.error is not None:
            terminal.write(terminal.console(stderr=True), f"error: {result.error}", style="red")
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
    if generation.speculation is not None:
        console.print(generation.speculation.told())
    console.print(f"sampling: {told(request)}")
