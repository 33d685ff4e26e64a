"""`xquant calibrate MODEL --text FILE`: find on text what some cache methods need, and keep it with the model.

With `--budget` it finds bits for every layer instead: `cli.budget`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xquant_jax.calibration.calibrate import calibrate, needs_of
from xquant_jax.cli import terminal
from xquant_jax.cli.budget import budget_of, search
from xquant_jax.cli.progress import Report, reported
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.windows import cut, read_text
from xquant_jax.json_file import check_folder
from xquant_jax.model.calibration_file import Calibration
from xquant_jax.model.loading import DTYPES, load

WINDOWS, BUDGET_WINDOWS = 64, 4
"""Where --limit-windows is not given; --budget goes through each of them once for every layer and number of bits."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="find on text what kvquant and xquant-cl with rank= need, or bits for every layer",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help='converted or Hugging Face directory, or "demo"')
    parser.add_argument(
        "--text", nargs="+", type=Path, required=True, metavar="FILE", help="UTF-8 texts like those to be"
    )
    parser.add_argument(
        "--cache",
        nargs="+",
        metavar="SPEC",
        help="caches to find it for (default: kvquant at 2, 3 and 4 bits and, where keys are shared, xquant-cl as it "
        "is and with a quarter of the directions); with --budget the one whose bits are found (default: xquant)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SIZE",
        help="find bits for every layer of the cache, so that it has at most this size: codes and scales, relative to "
        "keys and values of 16 bits",
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument(
        "--limit-windows",
        type=int,
        help=f"windows, spread evenly over the text (default: {WINDOWS}; with --budget {BUDGET_WINDOWS})",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write or add to (default: calibration.safetensors of the model)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write what --budget finds to this file")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="of xquant calibrate without --budget, for a cache that needs it (default: the model's own)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    check_folder("--out", arguments.out)
    budget = budget_of(arguments)
    text = "\n".join(map(read_text, arguments.text))
    context = max(arguments.seq_len, 1)  # what is no length is an error of the windows
    model = load(arguments.model, dtype=arguments.dtype, calibration=arguments.calibration, context=context)
    names = ", ".join(file.name for file in arguments.text)
    limit = arguments.limit_windows
    if budget is not None:
        windows = spread(cut(model, text, arguments.seq_len).tokens, BUDGET_WINDOWS if limit is None else limit)
        search(arguments, budget, model, windows, f"{windows.size} tokens of {names}")
        return
    path = arguments.out or model.calibration
    before = Calibration.read(path, model.fingerprint) if path.exists() else Calibration(model.fingerprint, {}, {})
    needs = needs_of(arguments.cache or default_caches(model.config), model.source)
    windows = spread(cut(model, text, arguments.seq_len).tokens, WINDOWS if limit is None else limit)
    with reported() as report:
        found = calibrate(model, _counted(windows, report), needs)
    for need, arrays in zip(needs, found, strict=True):
        before = before.add(need, arrays, f"{windows.size} tokens of {names}")
    before.write(path)
    console = terminal.console()
    terminal.write(console, f"wrote {path}, for:")
    for need in needs:
        terminal.write(console, f"  {need.cache}")


def _counted(windows: np.ndarray, report: Report) -> Iterator[np.ndarray]:
    """The windows, each reported when the next is asked for."""
    report(0, len(windows), "windows: compiling")
    for done, window in enumerate(windows, start=1):
        yield window
        report(done, len(windows), "windows")


def default_caches(config: ModelConfig) -> list[str]:
    """Every cache that needs calibration, with the options' defaults."""
    caches = [f"kvquant:{bits}" for bits in (2, 3, 4)]
    if not config.is_multi_head and config.num_layers > 3:
        caches.append("xquant-cl")
        caches.append(f"xquant-cl,predict=latent,basis=per_head,rank={config.kv_width // 2}")
    return caches


def spread(windows: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the windows, evenly spaced."""
    if limit < 1:
        raise ConfigError(f"--limit-windows {limit} leaves nothing to calibrate on; choose 1 or more")
    count = min(limit, len(windows))
    return windows[np.arange(count) * len(windows) // count]
