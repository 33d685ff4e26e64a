"""`xquant plan MODEL --device H200`: what fits on a device and how fast it can be, for every cache method."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from xquant_jax import figures
from xquant_jax.cli import terminal
from xquant_jax.json_file import check_folder, write_json
from xquant_jax.planning import plot
from xquant_jax.planning.costs import CHUNK
from xquant_jax.planning.devices import find_device, read_devices
from xquant_jax.planning.plan import ACCEPTANCE, PAPER_RIDGE, RESERVE, Plan, gib, plan, read_config, without_bits
from xquant_jax.planning.row import Row

WIDEST = 1000
"""Columns of a terminal that any table fits into; a narrower one than the table wraps its lines."""

PLOTTED = (2, 4)
"""Bit widths that a plot shows where no caches are named: more lines cannot be told apart."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="what fits on a device and how fast it can be",
        description="For every cache method and bit width: memory, the largest context and batch, and a roofline of "
        "prefill and decoding. Nothing is loaded or run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known = ", ".join(device.name for device in read_devices())
    parser.add_argument("model", metavar="MODEL|CONFIG", help='model directory, config.json alone, or "demo"')
    parser.add_argument("--device", required=True, help=f"one of {known}, or of --devices")
    parser.add_argument("--context", type=int, default=8192, help="tokens of every sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--cache", nargs="+", metavar="SPEC", help="only these caches (default: all there are)")
    parser.add_argument("--devices", type=Path, metavar="FILE", help="JSON with other devices, see docs/plan.md")
    parser.add_argument("--reserve", type=float, default=RESERVE, help="share of memory left to temporaries")
    parser.add_argument("--prefill-chunk", type=int, default=CHUNK, help="prompt tokens at once")
    parser.add_argument("--speculate", metavar="SPEC", help="speculative decoding: lookup:4, window:4 ...")
    parser.add_argument(
        "--acceptance",
        type=float,
        metavar="A",
        help=f"probability that a drafted token is accepted, 0 to 1 (default with --speculate: {ACCEPTANCE})",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw speed and memory against context")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        check_folder(option, path)
    if arguments.plot:
        figures.check(arguments.plot)
    device = find_device(arguments.device, arguments.devices)
    config = read_config(arguments.model)
    planned = plan(
        config,
        device,
        context=arguments.context,
        batch=arguments.batch,
        specs=arguments.cache,
        model=Path(arguments.model).name.removesuffix(".json"),
        chunk=arguments.prefill_chunk,
        reserve=arguments.reserve,
        speculate=arguments.speculate,
        acceptance=arguments.acceptance,
    )
    if arguments.json:
        write_json(arguments.json, planned.to_json())
    if arguments.plot:
        drawn = planned if arguments.cache else dataclasses.replace(planned, rows=[*filter(_plotted, planned.rows)])
        plot.draw(drawn, config, arguments.plot)
    show(terminal.console(), planned)


def _plotted(row: Row) -> bool:
    bits = without_bits(row.cache)[1]
    return bits is None or bits in PLOTTED


def show(console: Console, planned: Plan) -> None:
    """The table, and what it says about speed in words."""
    device, weights = planned.device, planned.baseline.memory["weights"]
    table = Table(
        title=terminal.visible(f"{planned.model} on {device.name}: {planned.batch} x {planned.context:,} tokens"),
        box=box.SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
    )
    table.add_column("cache", no_wrap=True)
    headings = ("KiB /\ntoken", "GiB\nin all", "largest\ncontext", "largest\nbatch", "FLOP /\nbyte")
    speculating = ("speculating\ntokens / s", "speedup") if planned.speculation else ()
    headings += ("prefill\ns", "step\nms", "tokens\n/ s", "speed\n/ bf16", "at largest\nbatch", *speculating)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in planned.rows:
        table.add_row(
            row.cache,
            f"{row.bytes_per_token / 1024:.1f}",
            f"{row.memory['total'] / 2**30:.1f}{'' if row.fits else ' !'}",
            f"{row.largest_context:,}",
            f"{row.largest_batch:,}",
            f"{row.decode.intensity:.0f}",
            f"{row.prefill_s:.2f}",
            f"{row.decode.seconds * 1e3:.2f}{'*' if row.counted else ''}",
            f"{row.tokens_per_second:,.0f}",
            f"{planned.speed(row):.2f}",
            "-" if row.best is None else f"{row.best:,.0f}",
            *_speculating(row),
            style=None if row.fits else "dim",
        )
    needed = console.measure(table, options=console.options.update(width=WIDEST)).maximum
    console.width = max(needed, console.width)  # what follows is not wrapped
    console.print(table)
    console.print(
        f"{planned.parameters / 1e9:.2f} G parameters, {gib(weights)} in bf16; {device.flops / 1e12:g} TFLOP/s, "
        f"{device.bandwidth / 1e9:g} GB/s, ridge {device.ridge:.0f} FLOP/byte; {gib(planned.usable)} of "
        f"{gib(device.memory)} usable",
        soft_wrap=True,
    )
    for line in remarks(planned):
        terminal.write(console, line)


def _speculating(row: Row) -> tuple[str, ...]:
    """The columns of speculation, where it was asked for."""
    found = row.speculating
    return (f"{found.tokens_per_second:,.0f}", f"{found.speedup:.2f}") if found else ()


def remarks(planned: Plan) -> list[str]:
    """What the table says, in words."""
    lines = []
    if any(not row.fits for row in planned.rows):
        lines.append(f"! does not fit into {gib(planned.usable)}; its times are what they would be if it did.")
    if any(row.counted for row in planned.rows):
        lines.append(
            "* history by what kernels take, where they were counted from their machine code; the rest is a roofline."
        )
    if speculating := planned.baseline.speculating:
        lines.append(
            f"Speculating with {planned.speculation}: {speculating.tokens_per_step:.2f} tokens a step are expected, "
            f"where each drafted one is accepted with probability {planned.acceptance:g}; speedup is over decoding "
            "without."
        )
    slower: dict[tuple[str, str], list[Row]] = {}
    for row in planned.rows:
        if planned.speed(row) < 1:
            slower.setdefault((without_bits(row.cache)[0], row.decode.bound), []).append(row)
    if slower:
        lines.append("Slower than bf16 at this context and batch:")
        for (form, bound), rows in slower.items():
            bits = ", ".join(str(bits) for row in rows if (bits := without_bits(row.cache)[1]))
            speeds = sorted({f"{planned.speed(row):.2f}" for row in rows})
            intensities = sorted({round(row.decode.intensity) for row in rows})
            why = {
                "compute": f"rebuilding takes longer than reading ({_range(intensities)} FLOP/byte)",
                "memory": "it moves more bytes (a running sum is read and written by every layer)",
                "kernels": "its kernels take longer than reading bf16 would",
            }[bound]
            lines.append(f"  {form}{f' at {bits} bits' if bits else ''}: {_range(speeds)} of its speed; {why}")
    else:
        lines.append("No cache is slower than bf16 at this context and batch.")
    limits = ", ".join(f"{_tokens(limit)} at {name}" for name, limit in planned.hidden_below.items())
    lines.append(
        "Rebuilding all keys and values of one sequence hides behind loading a layer's weights up to "
        f"{limits} (the XQuant paper's section 3.4; on its own device, {PAPER_RIDGE:.0f} FLOP/byte and 2 bits, "
        f"{_tokens(planned.hidden_below_in_paper)})."
    )
    return lines


def _range(values: Sequence[Any]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _tokens(limit: float | None) -> str:
    return "any number of tokens" if limit is None else f"{limit:,.0f} tokens"
