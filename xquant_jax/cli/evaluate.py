"""`xquant eval MODEL --text FILE --cache A B C`: perplexity, size and speed of cache methods, side by side."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from xquant_jax import figures
from xquant_jax.cli import terminal
from xquant_jax.cli.progress import reported
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation import continuations, evaluate, plot
from xquant_jax.evaluation.evaluate import BATCH
from xquant_jax.evaluation.results import Evaluation, Measurement
from xquant_jax.evaluation.scoring import CHUNK, PROTOCOLS
from xquant_jax.evaluation.windows import cut, read_text
from xquant_jax.json_file import check_folder, read_json, write_json
from xquant_jax.model.loading import DTYPES, load

WIDE = 110
"""Columns of a terminal from which on a cache's options stay on one line."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure perplexity, size and speed of cache methods on a text",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help='converted or Hugging Face directory, or "demo"')
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to predict")
    parser.add_argument("--cache", nargs="+", required=True, metavar="SPEC", help="name[:bits][,option=value...]")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window (the paper: 2048)")
    parser.add_argument("--limit-windows", type=int, help="windows from the start of the text (default: all)")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="paper",
        help="paper: every cached token quantized; streaming: through the real cache, window of newest tokens included",
    )
    parser.add_argument("--chunk", type=int, default=CHUNK, help='tokens fed at once in protocol "streaming"')
    parser.add_argument("--batch", type=int, default=BATCH, help="windows at once")
    parser.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="also let the model continue every window by N greedy tokens, and see where each cache would differ",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and activations; in float32 nothing but the cache rounds",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of xquant calibrate (default: the model's own)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file, as they come")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw perplexity against size")
    parser.add_argument("--resume", action="store_true", help="go on from what the file of --json holds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.resume and not arguments.json:
        raise ConfigError("--resume goes on from the file of --json: name it")
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        check_folder(option, path)
    for option in ("batch", "generate"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise ConfigError(f"--{option} {value} is not possible; choose 1 or more")
    if arguments.plot:
        figures.check(arguments.plot)
    text = read_text(arguments.text)
    earlier = None
    if arguments.resume and arguments.json.exists():
        earlier = Evaluation.from_json(read_json(arguments.json))
    context = max(arguments.seq_len, 1)  # what is no length is an error of the windows
    model = load(arguments.model, dtype=arguments.dtype, calibration=arguments.calibration, context=context)
    windows = cut(model, text, arguments.seq_len, arguments.limit_windows)
    evaluation = evaluate.prepare(
        model,
        windows,
        arguments.cache,
        protocol=arguments.protocol,
        chunk=arguments.chunk,
        name=arguments.model,
        text=str(arguments.text),
    )
    if earlier:
        evaluation.adopt(earlier)
    everything = [evaluation.baseline, *evaluation.measurements]
    count = len(evaluation.predicted_bytes) * len(everything)

    def keep() -> None:
        if arguments.json:
            write_json(arguments.json, evaluation.to_json())

    with reported() as report:
        for measurement in evaluate.run(evaluation, model, windows, batch=arguments.batch):
            keep()
            report(sum(len(m.losses) for m in everything), count, _name(measurement, evaluation))
    if arguments.generate:
        with reported() as report:
            report(0, len(everything), "continuations")
            if evaluation.generated != arguments.generate:
                evaluation.renew(continuations.write(model, windows, arguments.generate))
            for measurement in continuations.follow(evaluation, model, windows, batch=arguments.batch):
                keep()
                done = sum(m.differing is not None for m in everything)
                report(done, len(everything), f"continuation, {_name(measurement, evaluation)}")
    keep()
    if arguments.plot:
        plot.draw(evaluation, arguments.plot)
    show(terminal.console(), evaluation)


def _name(m: Measurement, evaluation: Evaluation) -> str:
    return "none" if m is evaluation.baseline else m.cache


def show(console: Console, evaluation: Evaluation) -> None:
    """The table of results."""
    names = terminal.visible(f"{evaluation.model} on {evaluation.text}")
    table = Table(
        title=f"{names}\n{len(evaluation.predicted_bytes)} windows of {evaluation.seq_len} tokens, "
        f"protocol {evaluation.protocol}",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    wide = console.width >= WIDE
    table.add_column("cache", overflow="fold", min_width=12)
    for heading in (
        *("perplexity", "nats over\n16 bit", "KL", "same\ntop"),
        *(["bits/\nbyte"] if wide else []),
        *("size", "allocated", "tokens/s"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in [evaluation.baseline, *evaluation.measurements]:
        row, exact = evaluation.row(m), m is evaluation.baseline
        difference = "" if exact else _number(row["delta_nll"], "+.4f")
        if not exact and row["stderr"] is not None:
            difference += f" ± {row['stderr']:.4f}"
        table.add_row(
            _name(m, evaluation) if wide else _name(m, evaluation).replace(",", ",\n"),
            _number(row["perplexity"], ".4f"),
            difference,
            "" if exact else _number(row["kl_divergence"], ".4f"),
            "" if exact else _number(row["top1_agreement"], ".1%"),
            *([_number(row["bits_per_byte"], ".4f")] if wide else []),
            "" if exact else f"{m.paper_ratio:.1%}",
            "" if exact else f"{m.allocated.total:,}",
            _number(row["tokens_per_second"], ",.0f"),
        )
    console.print(table)
    console.print(
        "none: without a cache, what the others are compared with; KL: mean divergence of the distribution of the next "
        "token from it, in nats; same top: tokens at which the likeliest one is the same; size: codes and scales of a "
        "token and its share of first tokens that are kept, relative to keys and values of 16 bits; allocated: bytes "
        f"of a cache for one sequence of {evaluation.seq_len} tokens, with window and scratch",
        style="dim",
    )
    if evaluation.continuations:
        _show_continuations(console, evaluation)


def _show_continuations(console: Console, evaluation: Evaluation) -> None:
    length = evaluation.generated
    quarters = [f"{length * i // 4}-{length * (i + 1) // 4}" for i in range(4)] if length >= 4 else []
    table = Table(
        title=f"{len(evaluation.continuations)} windows continued greedily by {length} tokens",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("cache", overflow="fold")
    for heading in ("first\ndiffers", "same", *(f"of\n{quarter}" for quarter in quarters)):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in [evaluation.baseline, *evaluation.measurements]:
        if m.differing is None:
            continue
        row = evaluation.row(m)
        counts, edges = np.histogram(np.concatenate(m.differing), [length * i // 4 for i in range(5)])
        along = 1 - counts / np.diff(edges) / len(m.differing) if quarters else []
        table.add_row(
            _name(m, evaluation) if console.width >= WIDE else _name(m, evaluation).replace(",", ",\n"),
            f"{row['first_divergence']:g}",
            f"{row['continuation_agreement']:.1%}",
            *(f"{share:.1%}" for share in along),
        )
    console.print(table)
    console.print(
        "The text is what the model writes without a cache; each cache sees it as protocol streaming does. first "
        f"differs: after how many tokens its likeliest one is another, the median over windows ({length}: never); same:"
        " tokens at which it is the same, and of each quarter of the text",
        style="dim",
    )


def _number(value: Any, form: str) -> str:
    return "not finite" if value is None else format(value, form)
