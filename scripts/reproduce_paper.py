"""The paper's tables, measured with your weights: `python scripts/reproduce_paper.py MODEL --text FILE`.

MODEL is Llama-2-7B or Llama-3.1-8B (a converted or Hugging Face directory), FILE the raw test split of WikiText-2.
Runs the rows of Tables 1 and 4 (Tomar et al. 2025, arXiv 2508.10395): windows of 2048 tokens, every cached token
quantized as published, the first three layers at 4 bits except for KVQuant; prints measured beside published. KVQuant
is left out unless `xquant calibrate MODEL --text TRAINING_TEXT --cache kvquant:2` was run. Any other model is measured
too, without published figures beside it. Takes hours on a CPU; `--json OUT --resume` goes on after a break.

`--tables 2 3` runs the same caches but KVQuant through LongBench (Table 2) and GSM8K with chain of thought (Table 3)
instead, with lm-evaluation-harness and the data that it downloads; no published figures stand beside those.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import xquant_jax as xq
from xquant_jax import cli
from xquant_jax.cli import terminal
from xquant_jax.config import ModelConfig
from xquant_jax.evaluation import evaluate
from xquant_jax.evaluation.results import Evaluation
from xquant_jax.evaluation.windows import cut, read_text
from xquant_jax.json_file import check_folder, read_json, write_json
from xquant_jax.model.loading import DTYPES
from xquant_jax.planning.plan import read_config

PUBLISHED = "rotate=false,clip=false,sink=0,"
# name in the paper, cache, and size and perplexity of Llama-2-7B and of Llama-3.1-8B
TABLE_1 = (
    ("KIVI*-4", "kivi:4,first=3@4", (0.27, 5.49), (0.27, 6.30)),
    ("KIVI*-2", "kivi:2,first=3@4", (0.15, 6.20), (0.15, 8.72)),
    ("KVQuant-2-1%", "kvquant:2", (0.15, 5.99), (0.15, 7.45)),
    ("XQuant-4", f"xquant:4,{{basis}}{PUBLISHED}first=3@4", (0.13, 5.54), (0.27, 6.31)),
    ("XQuant-3", f"xquant:3,{{basis}}{PUBLISHED}first=3@4", (0.10, 6.10), (0.21, 6.43)),
    ("XQuant-2", f"xquant:2,{{basis}}{PUBLISHED}first=3@4", (0.08, 11.21), (0.15, 7.38)),
)
PAPER_CL = f"input=post_norm,{{predict}}accumulator=bf16,{PUBLISHED}"
TABLE_4 = (
    ("XQuant-CL-4", f"xquant-cl:4,{PAPER_CL}first=3@4", (0.13, 5.48), (0.27, 6.29)),
    ("XQuant-CL-3", f"xquant-cl:3,{PAPER_CL}first=3@4", (0.10, 5.48), (0.21, 6.32)),
    ("XQuant-CL-2", f"xquant-cl:2,{PAPER_CL}first=3@4", (0.08, 5.57), (0.15, 6.60)),
)
TASKS = {2: "longbench", 3: "gsm8k_cot"}
"""What lm-evaluation-harness calls the data of the tables that are no perplexities."""

EXACT = (5.47, 6.24)
"""Perplexity at 16 bits."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="converted or Hugging Face directory")
    parser.add_argument("--text", type=Path, metavar="FILE", help="WikiText-2, raw, test split: for Tables 1 and 4")
    parser.add_argument("--tables", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 4], help="default: 1 4")
    parser.add_argument("--limit", type=int, help="documents of each task of Tables 2 and 3; the paper takes all")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--limit-windows", type=int, help="for a quick look; the paper takes all")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="for KVQuant (default: the model's own)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: the checkpoint's)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file, as they come")
    parser.add_argument("--resume", action="store_true", help="go on from what the file of --json holds")
    arguments = parser.parse_args()
    if arguments.text is None and {1, 4} & {*arguments.tables}:
        parser.error("Tables 1 and 4 are perplexities of a text: name it with --text")
    if arguments.resume and {*TASKS} & {*arguments.tables}:
        parser.error("--resume goes on with Tables 1 and 4 only: leave it out, or 2 and 3 out of --tables")
    try:
        if {1, 4} & {*arguments.tables}:
            reproduce(arguments)
        for table in sorted({*TASKS} & {*arguments.tables}):
            if code := harness(arguments, table):
                return code
    except (xq.XQuantError, OSError) as error:
        terminal.write(terminal.console(stderr=True), f"error: {error}")
        return 2
    return 0


def reproduce(arguments: argparse.Namespace) -> None:
    """Measures and prints; see the module's docstring."""
    console = terminal.console()
    check_folder("--json", arguments.json)
    text = read_text(arguments.text)
    context = max(arguments.seq_len, 1)  # what is no length is an error of the windows
    model = xq.load(arguments.model, dtype=arguments.dtype, calibration=arguments.calibration, context=context)
    windows = cut(model, text, arguments.seq_len, arguments.limit_windows)
    specs = {name: fill(spec, model.config) for name, spec, *_ in TABLE_1 + TABLE_4}
    ready = {}
    for name, spec in specs.items():
        try:
            cache = xq.CacheConfig.parse(spec)
            cache.segments(model.config)
            cache.method_params(model.source)
        except xq.ConfigError as error:
            terminal.write(console, f"{name} is left out: {error}")
        else:
            ready[name] = spec
    evaluation = evaluate.prepare(model, windows, list(ready.values()), name=arguments.model, text=str(arguments.text))
    if arguments.resume and arguments.json and arguments.json.exists():
        evaluation.adopt(Evaluation.from_json(read_json(arguments.json)))
    for measurement in evaluate.run(evaluation, model, windows):
        if arguments.json:
            write_json(arguments.json, evaluation.to_json())
        line = f"{measurement.cache}: {len(measurement.losses)}/{len(windows.tokens)} windows"
        terminal.write(terminal.console(stderr=True), line)
    show(console, evaluation, ready, published(model.config))


def harness(arguments: argparse.Namespace, table: int) -> int:
    """A table of tasks, through `xquant lm-eval`."""
    config = read_config(arguments.model)
    typed = ["lm-eval", arguments.model, "--tasks", TASKS[table], "--cache", "bf16"]
    typed += [fill(spec, config) for _, spec, *_ in TABLE_1 + TABLE_4 if not spec.startswith("kvquant")]
    given = {"limit": arguments.limit, "dtype": arguments.dtype, "calibration": arguments.calibration}
    typed += [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    if arguments.json:
        typed += ["--json", str(arguments.json.with_stem(f"{arguments.json.stem}-table{table}"))]
    return cli.main(typed)


def fill(spec: str, config: ModelConfig) -> str:
    """The paper's choices where the library has others too; they apply to grouped queries only."""
    grouped = not config.is_multi_head
    return spec.format(basis="basis=joint," if grouped else "", predict="predict=paper," if grouped else "")


def published(config: ModelConfig) -> int | None:
    """Which of the paper's two models has these sizes, if any."""
    sizes = (config.width, config.num_layers, config.num_heads, config.num_kv_heads, config.vocab_size)
    known = [(4096, 32, 32, 32, 32000), (4096, 32, 32, 8, 128256)]
    return known.index(sizes) if sizes in known else None


def show(console: Console, evaluation: Evaluation, specs: dict[str, str], column: int | None) -> None:
    """Measured beside published."""
    rows = {m.cache: evaluation.row(m) for m in evaluation.measurements}
    exact = evaluation.row(evaluation.baseline)["perplexity"]
    for title, table_rows in (("Table 1", TABLE_1), ("Table 4", TABLE_4)):
        windows = f"{len(evaluation.predicted_bytes)} windows of {evaluation.seq_len} tokens"
        table = Table(title=f"{title}: {terminal.visible(evaluation.model)}\n{windows}")
        for heading in ("method", "cache", "size", "paper", "perplexity", "paper", "difference"):
            named = heading in ("method", "cache")
            table.add_column(heading, justify="left" if named else "right", no_wrap=heading != "cache", overflow="fold")
        table.add_row("16 bit", "", "1.00", "1.00", *compare(exact, None if column is None else EXACT[column]))
        for name, _, *figures in table_rows:
            size, perplexity = (None, None) if column is None else figures[column]
            if name not in specs:
                table.add_row(name, "left out", "", number(size, ".2f"), "", number(perplexity, ".2f"), "")
                continue
            row = rows[specs[name]]
            sizes = (f"{row['paper_ratio']:.2f}", number(size, ".2f"))
            table.add_row(name, specs[name], *sizes, *compare(row["perplexity"], perplexity))
        console.print(table)


def compare(measured: float | None, expected: float | None) -> tuple[str, str, str]:
    """Measured, published, difference."""
    difference = None if measured is None or expected is None else measured - expected
    return number(measured, ".2f", "not finite"), number(expected, ".2f"), number(difference, "+.2f")


def number(value: Any, form: str, otherwise: str = "") -> str:
    return otherwise if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
