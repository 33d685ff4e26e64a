"""Pictures: one canvas and one palette for all of them. Needs matplotlib, the `plot` extra."""

from pathlib import Path
from typing import Any

from xquant_jax.errors import ConfigError

# Okabe and Ito's palette, and two of Paul Tol's: told apart by colour-blind readers too
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F"),
    *("#882255", "#999933"),
)


def check(path: Path) -> None:
    """Raises `ConfigError` if no plot could be written to this file."""
    suffix = path.suffix.removeprefix(".")
    known = new_figure().canvas.get_supported_filetypes()
    if suffix not in known:
        raise ConfigError(f"--plot {path}: .{suffix} is not a picture; choose one of {', '.join(sorted(known))}")


def new_figure(width: float = 8.0, height: float = 5.5) -> Any:
    """An empty figure, sizes in inches. Raises `ConfigError` if matplotlib is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib; install it with: pip install 'xquant-jax[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")
