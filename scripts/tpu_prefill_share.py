"""How much of prefill is quantizing and packing on a TPU, by the compiler's own estimate, with no TPU at hand.

    python scripts/tpu_prefill_share.py [--chips v5p v6e] [--caches xquant:4 xquant-cl:2] [--json OUT]

Compiles a chunk of prefill for one chip (libtpu), whole and without the flush that quantizes the windows, and adds up
the cycles that the compiler expects of every operation, loops as often as they turn. Of the `quantize` kernel it knows
none: `tpu_static_cost.py` says its bundles. Loops over the history count nothing: there is none yet, and with one the
share only falls. All layers of the model are compiled, as how their windows lie depends on how many there are: it has
to fit the chip (a v5e is too small for 8 billion parameters).
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from aot_compile import factor_shapes, parameter_shapes
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from converters.families import model_config
from converters.shards import read_json
from pallas_kernels import target
from xquant_jax.cache import allocate, flush
from xquant_jax.methods import CacheConfig
from xquant_jax.model import Transformer, forward
from xquant_jax.packing import BLOCK

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CONFIGS = Path(__file__).parent / "configs"


Costs = dict[tuple[int, str], float]
"""Bundles of the `quantize` kernel for each value of a stream, by bits and axis."""


def kernel_costs(chip: str, model: str) -> Costs:
    """Of this chip, read from the schedule of a stream as wide as the model's keys."""
    config = model_config(read_json(CONFIGS / f"{model}.json"))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "rows.json"
        script = [sys.executable, str(Path(__file__).with_name("tpu_static_cost.py"))]
        options = ["--kernels", "quantize", "--chips", chip, "--models", model, "--json", str(out)]
        subprocess.run([*script, *options], check=True, capture_output=True)
        rows = json.loads(out.read_text())["rows"]
    values = 1024 * config.num_kv_heads * config.head_dim
    return {(row["bits"], row["basis"]): row["bundles_per_1024"] / values for row in rows}


def quantized(line: str) -> tuple[int, int, str] | None:
    """How many values a call of the `quantize` kernel takes, at how many bits and along which axis."""
    call = re.match(r"\s*(?:ROOT )?%quantize[\w.\-]* = \((.*?)\) custom-call\(", line)
    if call is None:
        return None
    planes = [[int(n) for n in size.split(",")] for size in re.findall(r"u32\[([\d,]+)\]", call[1])]
    batch, blocks, _, width = planes[0]
    axis = "channel" if f"bf16[{batch},{blocks},{width}]" in call[1] else "token"
    return batch * blocks * BLOCK * width, sum(rows // 4 for _, _, rows, _ in planes), axis


def cycles(hlo: str, kernels: Costs) -> int:
    """What the compiler expects of a program: `estimated_cycles` of its operations, those of a loop as often as the
    constant in its condition says (a loop without one: never), of a choice the dearest branch."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = match[2]
            entry = name if match[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            computations.setdefault(name, []).append(line)

    def turns(condition: str) -> int:
        lines = "\n".join(computations[condition])
        compared = re.search(r"compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", lines)
        constant = compared and re.search(rf"%{re.escape(compared[1])} = s32\[\].* constant\((\d+)\)", lines)
        return int(constant[1]) if constant else 0

    def of(computation: str) -> int:
        total = 0
        for line in computations.get(computation, ()):
            if loop := re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                total += turns(loop[1]) * of(loop[2])
            elif choice := re.search(r"branch_computations=\{([^}]*)\}", line):
                total += max(of(branch.strip(" %")) for branch in choice[1].split(","))
            elif call := quantized(line):
                values, bits, axis = call
                total += round(values * kernels[bits, axis])
            elif found := re.search(r'"estimated_cycles":"(\d+)"', line):
                total += int(found[1])
        return total

    return of(entry)


def share(chip: str, model: str, cache: str, chunk: int, batch: int, implementation: str, kernels: Costs) -> dict:
    """One row of the table, see the module's docstring."""
    device = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0]
    config = model_config(read_json(CONFIGS / f"{model}.json"))
    cache_config = CacheConfig.parse(cache)
    factors, _ = factor_shapes(config, cache_config)
    kv = jax.eval_shape(lambda: allocate(cache_config, config, batch=batch, tokens=8 * chunk))
    tokens = jax.ShapeDtypeStruct((batch, chunk), jnp.int32)
    counts = jax.ShapeDtypeStruct((batch,), jnp.int32)
    transformer = Transformer(config, implementation)

    def without(params: Any, factors: Any, tokens: Any, counts: Any, cache: Any) -> Any:
        return forward(transformer, params, tokens, cache, factors, counts)

    def whole(params: Any, factors: Any, tokens: Any, counts: Any, cache: Any) -> Any:
        logits, cache = without(params, factors, tokens, counts, cache)
        return logits, flush(cache, factors, implementation)

    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device)),
        (parameter_shapes(config), factors, tokens, counts, kv),
    )
    with target.compiling_for("tpu", device.device_kind):
        lowered = [
            jax.jit(program, donate_argnums=4).trace(*args).lower(lowering_platforms=("tpu",))
            for program in (whole, without)
        ]
    took = [cycles(program.compile().as_text() or "", kernels) for program in lowered]
    return {
        "chip": chip,
        "model": model,
        "cache": cache,
        "chunk": chunk,
        "batch": batch,
        "quantized by": implementation,
        "prefill": took[0],
        "flush": took[0] - took[1],
        "share": round((took[0] - took[1]) / took[0], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(p.stem for p in CONFIGS.glob("*.json")))
    parser.add_argument("--caches", nargs="+", default=["xquant:4", "xquant:2", "xquant-cl:2", "kivi:4", "int8"])
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prompt that are fed at once")
    parser.add_argument("--batch", type=int, default=8, help="prompts that are fed side by side")
    parser.add_argument("--implementations", nargs="+", choices=("xla", "pallas_tpu"), default=["xla", "pallas_tpu"])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for chip in arguments.chips:
        kernels = kernel_costs(chip, arguments.model)
        for cache, implementation in itertools.product(arguments.caches, arguments.implementations):
            size = (arguments.chunk, arguments.batch)
            rows.append(share(chip, arguments.model, cache, *size, implementation, kernels))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
