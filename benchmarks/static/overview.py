"""Speed and memory of one model on one chip of several kinds: the table and the picture of docs/performance.md.

    python -m benchmarks.static.overview [--plot docs/performance/llama-3.1-8b.png]

Everything is from `xquant plan`: memory exactly, times by a roofline, and where the cycles of kernels were counted on a
device, by these (*). Nothing is measured by a clock.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xquant_jax.cache.config import CacheConfig
from xquant_jax.figures import COLOURS, new_figure
from xquant_jax.planning.costs import Costs
from xquant_jax.planning.devices import Device, find_device
from xquant_jax.planning.plan import RESERVE, read_config

DEVICES = ("v5e", "v6e", "v7x", "H100", "H200")
CACHES = ("bf16", "int8", "xquant:4", "xquant-cl:2")
CONTEXTS = (8_192, 32_768, 131_072)
CONFIG = "scripts/configs/llama-3.1-8b.json"


def usable(device: Device) -> int:
    """Bytes that weights and cache may take."""
    return int(device.memory * (1 - RESERVE))


def table(costs: Sequence[Costs], devices: Sequence[Device]) -> str:
    """One row for each device and cache, in markdown."""
    heads = [f"{context // 1024} k" for context in CONTEXTS]
    lines = [
        f"| chip | cache | KiB a token | GiB at 32 k | largest context | {' | '.join(heads)} | largest batch at 32 k |",
        "|---" * (6 + len(heads)) + "|",
    ]
    for device in devices:
        for cost in costs:
            star = "*" if cost.counted(device) else ""
            room, largest = usable(device), cost.largest_batch(usable(device), 32_768)

            def speed(batch: int, context: int, cost=cost, device=device, star=star, room=room) -> str:
                if not batch or cost.total(batch, context) > room:
                    return "-"
                return f"{batch / cost.decode_seconds(device, batch, context):,.0f}{star}"

            many = f"{speed(largest, 32_768)} ({largest})" if largest else "-"
            memory = cost.total(1, 32_768) / 2**30
            alone = " | ".join(speed(1, context) for context in CONTEXTS)
            lines.append(
                f"| {device.name} | `{cost.cache_config}` | {cost.bytes_per_token / 1024:.0f} | {memory:.1f} | "
                f"{cost.largest_context(room, 1):,} | {alone} | {many} |"
            )
    return "\n".join(lines)


def draw(costs: Sequence[Costs], devices: Sequence[Device], path: Path) -> None:
    """Tokens a second of one sequence against its context, a panel for each device; then memory."""
    figure = new_figure(12.0, 7.5)
    panels = figure.subplots(2, 3).ravel()
    contexts = np.unique(np.round(np.geomspace(1024, 2**20, 100) / 128) * 128).astype(int)
    for panel, device in zip(panels, devices, strict=False):
        for cost, colour in zip(costs, COLOURS, strict=False):
            rates: Any = 1 / cost.decode_seconds(device, 1, contexts)
            fits: Any = np.asarray([cost.total(1, int(context)) <= usable(device) for context in contexts])
            style = "-" if cost.counted(device) else "--"
            panel.plot(contexts[fits], rates[fits], style, color=colour, label=str(cost.cache_config))
            panel.plot(contexts[~fits], rates[~fits], style, color=colour, alpha=0.25, linewidth=0.8)
        panel.set_title(device.name)
        panel.set_ylabel("tokens a second")
        panel.set_ylim(bottom=0)
    memory = panels[-1]
    for cost, colour in zip(costs, COLOURS, strict=False):
        sizes = [cost.total(1, int(context)) / 2**30 for context in contexts]
        memory.plot(contexts, sizes, color=colour, label=str(cost.cache_config))
    for device in devices:
        memory.axhline(usable(device) / 2**30, color="black", linewidth=0.6)
        memory.annotate(device.name, (contexts[0], usable(device) / 2**30), size="small", va="bottom")
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    memory.set_title("weights and cache")
    memory.set_ylabel("GiB")
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k")
        panel.set_xlabel("tokens in the cache")
        panel.grid(alpha=0.3)
    figure.suptitle(
        "Llama-3.1-8B, one sequence, decoding: solid: kernels counted, dashed: roofline; faint: does not fit.\n"
        "No figure is measured by a clock."
    )
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=len(costs))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="OUT.png")
    arguments = parser.parse_args()
    config = read_config(Path(__file__).parents[2] / CONFIG)
    costs = [Costs(config, CacheConfig.parse(cache)) for cache in CACHES]
    devices = [find_device(name) for name in DEVICES]
    print(table(costs, devices))
    if arguments.plot:
        draw(costs, devices, arguments.plot)


if __name__ == "__main__":
    main()
