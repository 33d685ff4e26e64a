"""Perplexity against size, as a picture. Needs matplotlib, the `plot` extra."""

from pathlib import Path
from typing import Any

from xquant_jax.evaluation.results import Evaluation
from xquant_jax.figures import COLOURS, new_figure

TICKS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
"""Sizes in percent that a logarithmic axis may name."""


def draw(evaluation: Evaluation, path: Path) -> None:
    """One line and colour per method, a dot per bit width, with the standard error of its difference to 16 bit."""
    figure = new_figure()
    axes = figure.add_subplot()
    rows = [row for row in map(evaluation.row, evaluation.measurements) if row["perplexity"] is not None]
    common = set.intersection(*(set(_options(row["cache"])) for row in rows)) if rows else set()
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = ", ".join([_head(row["cache"])[0], *(o for o in _options(row["cache"]) if o not in common)])
        series.setdefault(label, []).append(row)
    for number, (label, points) in enumerate(series.items()):
        points.sort(key=lambda row: row["paper_ratio"])
        x = [100 * row["paper_ratio"] for row in points]
        y = [row["perplexity"] for row in points]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            x,
            y,
            yerr=[row["perplexity"] * (row["stderr"] or 0.0) for row in points],
            color=colour,
            marker="o",
            markersize=9,
            linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
            capsize=3,
            label=label,
            zorder=3 + number,
        )
        for at, height, row in zip(x, y, points, strict=True):
            style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "size": 7, "weight": "bold"}
            axes.text(at, height, _head(row["cache"])[1], color="white", zorder=3.5 + number, **style)
    exact = evaluation.row(evaluation.baseline)["perplexity"]
    if exact is not None:
        axes.axhline(exact, color="gray", linestyle="--", linewidth=1, label=f"16 bit, no cache: {exact:.3f}")
        if rows and max(row["perplexity"] for row in rows) > 2 * exact:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
    sizes = [100 * row["paper_ratio"] for row in rows]
    if sizes and max(sizes) > 3 * min(sizes):
        axes.set_xscale("log")
        shown = [tick for tick in TICKS if min(sizes) / 1.2 <= tick <= max(sizes) * 1.2]
        axes.set_xticks(shown, [str(tick) for tick in shown])
        axes.set_xticks([], minor=True)
    axes.set_xlabel("size of a cached token, % of 16-bit keys and values (codes and scales); numbers in the dots: bits")
    axes.set_ylabel("perplexity (standard error of the difference to 16 bit)")
    every = f", all with {', '.join(sorted(common))}" if common else ""
    axes.set_title(
        f"{Path(evaluation.model).name} on {Path(evaluation.text).name}\n"
        f"{len(evaluation.predicted_bytes)} windows of {evaluation.seq_len} tokens, "
        f"protocol {evaluation.protocol}{every}",
        fontsize="medium",
    )
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * (1 + len(series)))  # the legend has a line per method, below
    figure.legend(fontsize="small", markerscale=0.7, loc="outside lower center")
    figure.savefig(path, dpi=150)


def _head(spec: str) -> tuple[str, str]:
    """Name and bits."""
    name, _, bits = spec.split(",")[0].partition(":")
    return name, bits


def _options(spec: str) -> list[str]:
    """Those that tell methods apart: the bits of the first layers do not."""
    return [option for option in spec.split(",")[1:] if not option.startswith("first=")]
