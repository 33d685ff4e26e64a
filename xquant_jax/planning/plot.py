"""Speed and memory against context, as a picture. Needs matplotlib, the `plot` extra."""

from pathlib import Path
from typing import Any

import numpy as np

from xquant_jax.cache.config import CacheConfig
from xquant_jax.config import ModelConfig
from xquant_jax.figures import COLOURS, new_figure
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.planning.costs import Costs
from xquant_jax.planning.plan import Plan, without_bits

SHORTEST = 1024
"""Tokens that the axis begins with."""

STYLES = {8: ":", 4: "-", 3: "-.", 2: "--"}
"""Of lines, by bits; a method without a choice of bits has a solid one."""


def draw(plan: Plan, config: ModelConfig, path: Path) -> None:
    """Tokens per second on the left and memory on the right, one colour per method, one kind of line per bit width.

    Lines are faint where the memory is too small; a dot marks the largest context that fits.
    """
    figure = new_figure(12.0, 6.5)
    speed, memory = figure.subplots(1, 2)
    longest = max(4 * plan.context, *(row.largest_context for row in plan.rows))
    contexts = BLOCK * np.unique(np.round(np.geomspace(SHORTEST, longest, 200) / BLOCK))
    colours: dict[str, str] = {}
    for row in plan.rows:
        method, bits = without_bits(row.cache)
        colour = colours.setdefault(method, COLOURS[len(colours) % len(COLOURS)])
        costs = Costs(config, CacheConfig.parse(row.cache), plan.chunk)
        rates = plan.batch / costs.decode_seconds(plan.device, plan.batch, contexts)
        blocks = contexts / BLOCK - 1  # beyond the first
        sizes = costs.total(plan.batch, BLOCK) + plan.batch * blocks * costs.bytes_per_token * BLOCK
        style: dict[str, Any] = {"color": colour, "linestyle": STYLES.get(bits or 4, "-")}
        fits = sizes <= plan.usable
        for axes, values in ((speed, rates), (memory, sizes / 2**30)):
            axes.plot(contexts[fits], values[fits], label=row.cache, linewidth=1.8, **style)
            axes.plot(contexts[~fits], values[~fits], linewidth=0.8, alpha=0.35, **style)
            if fits.any():
                axes.plot(contexts[fits][-1], values[fits][-1], marker="o", markersize=5, color=colour)
    memory.axhline(plan.usable / 2**30, color="black", linewidth=1)
    memory.annotate(
        f"usable memory of {plan.device.name}",
        (contexts[0], plan.usable / 2**30),
        xytext=(3, 3),
        textcoords="offset points",
        size="small",
    )
    speed.set_ylabel("tokens per second of the whole batch, decoding")
    memory.set_ylabel("memory of weights and cache, GiB")
    for axes, base in ((speed, 10), (memory, 2)):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=base)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("tokens in the cache of every sequence (k = 1024)")
        axes.grid(alpha=0.3)
    memory.set_ylim(0.8 * plan.baseline.memory["weights"] / 2**30, 1.6 * plan.usable / 2**30)
    figure.suptitle(
        f"{plan.model} on {plan.device.name}, {plan.batch} sequences: what a roofline allows, or counted kernels take\n"
        "dots: the largest context that fits; faint beyond it"
    )
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)
