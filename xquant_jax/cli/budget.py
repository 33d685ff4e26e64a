"""`xquant calibrate --budget`: bits for every layer, found on text for a size, as a spec that `--cache` takes."""

import argparse
import shlex
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cli import terminal
from xquant_jax.cli.progress import reported
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.budget import Budget, Found, find
from xquant_jax.evaluation.evaluate import paper_ratio
from xquant_jax.json_file import check_folder, write_json
from xquant_jax.model.loading import Model


def budget_of(arguments: argparse.Namespace) -> Budget | None:
    """What is asked for; None without --budget. Raises `ConfigError` for options that do not go together."""
    if arguments.budget is None:
        for option in ("json", "calibration"):
            if getattr(arguments, option) is not None:
                raise ConfigError(f"--{option} is for --budget; leave it out, or name a size")
        return None
    if arguments.out is not None:
        raise ConfigError(f"--out {arguments.out} is for levels and directions; choose --json for what --budget finds")
    check_folder("--json", arguments.json)
    caches = arguments.cache or ["xquant"]
    if len(caches) > 1:
        raise ConfigError(f"--budget finds bits for one cache, and --cache names {len(caches)}: choose one")
    return Budget(CacheConfig.parse(caches[0]), arguments.budget)


def search(arguments: argparse.Namespace, budget: Budget, model: Model, windows: np.ndarray, source: str) -> None:
    """Finds the bits, writes the JSON and prints the spec beside uniform bits."""
    with reported() as report:
        report(0, 1, "measurements: compiling")
        found = find(model, budget, windows, lambda done, total: report(done, total, "measurements"))
    sizes = {cache: paper_ratio(cache, model.config) for cache in found.measured}
    if arguments.json:
        write_json(arguments.json, _document(arguments, model, budget, found, sizes, source))
    console = terminal.console()
    show(console, found, sizes, f"{arguments.model} on {source}")
    command = f"xquant eval {shlex.quote(arguments.model)} --text OTHER_FILE --cache {shlex.quote(str(found.cache))}"
    terminal.write(console, command)


def show(console: Console, found: Found, sizes: dict[CacheConfig, float], title: str) -> None:
    """What was found, beside the same bits for all layers."""
    table = Table(title=terminal.visible(title), box=box.SIMPLE_HEAD, padding=0)
    table.add_column("cache", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("divergence\nin nats", justify="right", no_wrap=True)
    for cache, divergence in sorted(found.measured.items(), key=lambda item: sizes[item[0]]):
        style = "bold" if cache == found.cache else None
        table.add_row(str(cache), f"{sizes[cache]:.1%}", f"{divergence:.5f}", style=style)
    console.print(table)
    console.print(
        "size: codes and scales of a token, relative to keys and values of 16 bits; divergence: of the next token's "
        "distribution from the model's without a cache (Kullback-Leibler), on the text that bits were found on",
        style="dim",
    )


def _document(
    arguments: argparse.Namespace,
    model: Model,
    budget: Budget,
    found: Found,
    sizes: dict[CacheConfig, float],
    source: str,
) -> dict[str, Any]:
    return {
        "model": arguments.model,
        "weights": model.fingerprint,
        "source": source,
        "seq_len": arguments.seq_len,
        "dtype": model.dtype,
        "budget": budget.ratio,
        "cache": str(found.cache),
        "paper_ratio": sizes[found.cache],
        "bits": list(found.bits),
        "divergence_of_layers": found.divergences.tolist(),
        "rows": [
            {"cache": str(cache), "paper_ratio": sizes[cache], "divergence": divergence}
            for cache, divergence in found.measured.items()
        ],
    }
