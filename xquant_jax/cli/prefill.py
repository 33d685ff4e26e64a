"""`xquant prefill MODEL --prompt-file DOCUMENT --out DIR`: feed once what prompts will begin with, and save it."""

import argparse
import time
import warnings
from pathlib import Path

from converters.staging import require_free
from xquant_jax.cache.state import cache_bytes
from xquant_jax.cli import terminal
from xquant_jax.cli.options import MODEL, add_storing_options, load_model, read_text
from xquant_jax.errors import XQuantWarning
from xquant_jax.generation.prefix import prefill


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "prefill",
        help="feed what prompts begin with, and save it",
        description="DIR is for --prefix of xquant generate and xquant batch, with the same model and options.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="a text that prompts begin with")
    text.add_argument("--prompt-file", help="a file whose text they begin with; -: stdin")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a directory that is not there yet")
    add_storing_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    require_free(arguments.out)
    text = arguments.prompt if arguments.prompt_file is None else read_text(arguments.prompt_file)
    model = load_model(arguments)
    start = time.perf_counter()
    prefix = prefill(
        model,
        text,
        cache=arguments.cache,
        prefill_chunk=arguments.prefill_chunk or None,
        add_special_tokens=arguments.add_special_tokens,
    )
    seconds = time.perf_counter() - start
    prefix.save(arguments.out)
    size = cache_bytes(prefix.cache).total
    terminal.write(
        terminal.console(),
        f"{arguments.out}: {len(prefix.tokens)} tokens, {prefix.stored} of them stored in {size:,} bytes; "
        f"{seconds:.1f} s with compiling",
    )
    if not prefix.stored:
        warnings.warn(
            f"nothing is stored: tokens are stored {arguments.prefill_chunk} at a time; lower --prefill-chunk, or give "
            f"a longer text",
            XQuantWarning,
            stacklevel=2,
        )
