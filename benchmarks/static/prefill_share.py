"""How much of prefill is quantizing and packing on a TPU, by the compiler's own estimate, with no TPU at hand.

    python -m benchmarks.static.prefill_share [--chips v5p v6e] [--caches xquant:4 xquant-cl:2] [--json OUT]

Compiles a chunk of prefill for one chip (libtpu) and adds up the cycles that the compiler expects of every operation,
loops as often as they turn. Of kernels it expects none: `benchmarks.static.tpu` says their bundles. `flush` is what
moves whole blocks from the windows into the history, `quantize` what of it quantizes and packs; the rest moves windows
and, for `xquant-cl`, adds to running sums. Operations are told apart by the scope that they were traced in.

Loops over the history count nothing: there is none yet, and with one the shares only fall. All layers of the model are
compiled, as how their windows lie depends on how many there are: it has to fit the chip (a v5e is too small for 8
billion parameters).
"""

import argparse
import dataclasses
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
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from benchmarks.models import FILES, config_of
from pallas_kernels import target
from pallas_kernels.chips import TPUS
from scripts.aot_compile import Programs, factor_shapes, parameter_shapes
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate
from xquant_jax.model.transformer import Transformer
from xquant_jax.numerics.packing import BLOCK

ROOT = Path(__file__).parents[2]
CHIPS = ("v5p", "v6e")
SCOPES = ("flush", "quantize")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Bundles of the kernels, as `benchmarks.static.tpu` prints them for a model. width: of its keys."""

    rows: list[dict[str, Any]]
    width: int

    @classmethod
    def of(cls, chip: str, model: str) -> "Kernels":
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "rows.json"
            script = [sys.executable, "-m", "benchmarks.static.tpu"]
            options = ["--kernels", "quantize", "accumulate", "remat_project", "--chips", chip, "--models", model]
            subprocess.run([*script, *options, "--json", str(out)], check=True, capture_output=True, cwd=ROOT)
            return cls(json.loads(out.read_text())["rows"], config_of(model).kv_width)

    def cycles(self, kernel: str, out: str, bits: int) -> int:
        """Of a call with results of these shapes, in a program whose streams have so many bits."""
        if kernel == "remat_project":
            shape = [int(n) for n in re.findall(r"\w\[([\d,]+)\]", out)[0].split(",")]
            return self._bundles(shape[0] * shape[1] * BLOCK, kernel)
        planes = [[int(n) for n in size.split(",")] for size in re.findall(r"u32\[([\d,]+)\]", out)]
        batch, blocks, _, width = planes[0]
        if kernel == "accumulate":
            return self._bundles(batch * blocks * BLOCK, kernel, bits=bits)
        bits = sum(rows // 4 for _, _, rows, _ in planes)
        axis = "channel" if f"bf16[{batch},{blocks},{width}]" in out else "token"
        return self._bundles(batch * blocks * BLOCK * width / self.width, kernel, bits=bits, basis=axis)

    def _bundles(self, tokens: float, kernel: str, **which: Any) -> int:
        wanted = {"kernel": kernel, **which}
        return round(next(r["bundles_per_1024"] for r in self.rows if wanted.items() <= r.items()) * tokens / 1024)


def cycles(hlo: str, kernels: Kernels, bits: int) -> dict[str, int]:
    """What the compiler expects of a program, all of it and by scope: `estimated_cycles` of its operations, those of a
    loop as often as the constant in its condition says (a loop without one: never)."""
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
    total: dict[str, int] = dict.fromkeys(("prefill", *SCOPES), 0)

    def turns(condition: str) -> int:
        lines = "\n".join(computations[condition])
        compared = re.search(r"compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", lines)
        constant = compared and re.search(rf"%{re.escape(compared[1])} = s32\[\].* constant\((\d+)\)", lines)
        return int(constant[1]) if constant else 0

    def add(computation: str, times: int, within: frozenset[str]) -> None:
        for line in computations.get(computation, ()):
            path = re.search(r'op_name="([^"]*)"', line)
            scopes = within | {scope for scope in SCOPES if path and f"/{scope}/" in path[1]}
            found = re.search(r'"estimated_cycles":"(\d+)"', line)
            kernel = re.match(r"\s*(?:ROOT )?%([a-z_]+)[\w.\-]* = (.*?) custom-call\(.*tpu_custom_call", line)
            if loop := re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                add(loop[2], times * turns(loop[1]), scopes)
            elif kernel or found:
                taken = int(found[1]) if found else 0
                if kernel and "flush" in scopes:  # the others read the history
                    taken = kernels.cycles(kernel[1], kernel[2], bits)
                for part in ("prefill", *scopes):
                    total[part] += times * taken

    add(entry, 1, frozenset())
    return total


def share(chip: str, model: str, cache: str, chunk: int, batch: int, implementation: str, kernels: Kernels) -> dict:
    """One row of the table, see the module's docstring."""
    device = topologies.get_topology_desc(TPUS[chip].topology, "tpu").devices[0]
    config = config_of(model)
    cache_config = CacheConfig.parse(cache)
    method_params, _ = factor_shapes(config, cache_config)
    sizes: dict[str, Any] = {"batch": batch, "tokens": 8 * chunk, "implementation": implementation}
    with target.compiling_for("tpu", device.device_kind):
        kv = jax.eval_shape(lambda: allocate(cache_config, config, **sizes))
    tokens = jax.ShapeDtypeStruct((batch, chunk), jnp.int32)
    counts = jax.ShapeDtypeStruct((batch,), jnp.int32)
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device)),
        (parameter_shapes(config), method_params, tokens, counts, kv),
    )
    programs = Programs(Transformer(config))
    with target.compiling_for("tpu", device.device_kind):
        lowered = jax.jit(programs.prefill, donate_argnums=4).trace(*args).lower(lowering_platforms=("tpu",))
    bits = getattr(cache_config.method, "bits", 0)  # bf16 has none, and no running sum that would ask
    took = cycles(lowered.compile().as_text() or "", kernels, bits)
    return {
        "chip": chip,
        "model": model,
        "cache": cache,
        "chunk": chunk,
        "batch": batch,
        "kernels": implementation,
        **took,
        "flush share": round(took["flush"] / took["prefill"], 4),
        "quantize share": round(took["quantize"] / took["prefill"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--model", default="Llama-3.1-8B", choices=FILES)
    parser.add_argument("--caches", nargs="+", default=["xquant:4", "xquant-cl:2"])
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the prompt that are fed at once")
    parser.add_argument("--batch", type=int, default=8, help="prompts that are fed side by side")
    parser.add_argument("--implementations", nargs="+", choices=("xla", "pallas_tpu"), default=["xla", "pallas_tpu"])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for chip in arguments.chips:
        kernels = Kernels.of(chip, arguments.model)
        for cache, implementation in itertools.product(arguments.caches, arguments.implementations):
            size = (arguments.chunk, arguments.batch)
            rows.append(share(chip, arguments.model, cache, *size, implementation, kernels))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
