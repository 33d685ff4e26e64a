"""The picture: nanoseconds a token and layer takes against the tokens in the batch, a line for each cache."""

from pathlib import Path
from typing import Any

import numpy as np


def best_bf16(layers: list[dict[str, Any]], model: str, batch: int, context: int) -> float | None:
    """Seconds of the fastest attention to bf16 keys and values of this size, of the rows that were timed."""
    same = {"model": model, "cache": "bf16", "batch": batch, "context": context}
    return min((e["seconds"] for e in layers if same.items() <= e.items()), default=None)


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    models = sorted({e["model"] for e in result["layers"]})
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for axes, model in zip(np.atleast_1d(figure.subplots(1, len(models))), models, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for e in result["layers"]:
            if e["model"] == model:
                label = f"{e['cache']} ({e['implementation']}{e['variant'] and ', '}{e['variant']})"
                lines.setdefault(label, []).append((e["batch"] * e["context"], e["ns_per_token"]))
        for label, points in lines.items():
            axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set(
            title=f"{model}, {result['device']}", xlabel="cached tokens in the batch", ylabel="ns per token and layer"
        )
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
