"""What kernels were counted to take, put where `xquant plan` finds it: `xquant_jax/planning/kernel_costs.json`.

    python -m benchmarks.static.tpu --json tpu.json
    python -m benchmarks.static.triton --gpu H200 --json h200.json
    python -m benchmarks.static.costs tpu.json h200.json

Costs of devices and shapes that the files do not have stay as they are. Of a TPU a cost is the microseconds of a layer
at 32 k context over its tokens: all bundles of the schedule, at the chip's clock. Of a GPU it is what the busiest unit
takes for each kernel, one kernel after the other: a limit, as stalls are not in it.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.models import FILES, NARROW, decode_shape, sum_shape
from benchmarks.static.tpu import BLOCKS, decode_cases, sum_cases
from benchmarks.static.triton import CASES, nanoseconds
from pallas_kernels.chips import GPUS, TPUS
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.planning import kernel_costs

OUT = Path(kernel_costs.__file__).with_name("kernel_costs.json")
BITS = [2, 3, 4, 8]


def of_tpus(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """Device, key and nanoseconds of a token."""
    columns = ("kernel", "model", "basis", "bits", "rebuild_dtype", "group")
    known = {}
    for model in (*FILES, *NARROW):
        for case in decode_cases(model, BITS):
            shape = decode_shape(model, case.cache)
            dtype = case.cache.partition("rebuild_dtype=")[2] or "bf16"
            identity = ("decode_attention", model, case.basis, shape.key.bits, dtype, shape.key.group)
            known[identity] = shape
        for case in sum_cases(model, BITS):
            shape = sum_shape(model, case.cache)
            identity = ("accumulate", model, case.basis, shape.stream.bits, "bf16", shape.stream.group)
            known[identity] = shape
    for row in rows:
        identity = tuple(row[name] for name in columns)
        if identity in known:
            yield (
                row["chip"],
                kernel_costs.key_of(known[identity], row["new"]),
                1000 * row["layer_us"] / (BLOCKS * BLOCK),
            )


def of_gpu(name: str, rows: list[dict[str, Any]], sums: list[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """The same; kernels that run one after the other are added up."""
    caches = {
        (model, basis, bits, cache.partition("rebuild_dtype=")[2] or "bf16"): cache.format(bits)
        for model, cache, basis in CASES
        for bits in BITS
    }
    found: dict[str, float] = defaultdict(float)
    for row in rows:
        cache = caches[row["model"], row["basis"], row["bits"], row["rebuild_dtype"]]
        key = kernel_costs.key_of(decode_shape(row["model"], cache), row["new"])
        cycles = (row[f"{what}_per_1024"] for what in ("issue", "shared", "matrix"))
        found[key] += nanoseconds(max(cycles), GPUS[name])
    for row in sums:
        key = kernel_costs.key_of(sum_shape(row["model"], row["cache"]))
        cycles = (row[f"{what}_per_1024"] for what in ("issue", "matrix", "memory"))
        found[key] += nanoseconds(max(cycles), GPUS[name])
    for key, cost in found.items():
        yield name, key, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="+", type=Path, help="what `--json` of the two benchmarks wrote")
    arguments = parser.parse_args()
    table = json.loads(OUT.read_text())
    for path in arguments.counts:
        counts = json.loads(path.read_text())
        if "gpu" in counts:
            costs, how = of_gpu(counts["gpu"], counts["rows"], counts["sums"]), "a limit by machine code"
        else:
            costs, how = of_tpus(counts["rows"]), "bundles of the compiler's schedule"
        for device, key, nanoseconds_ in costs:
            clock = (TPUS | GPUS)[device].clock / 1e9
            entry = table.setdefault(device, {"source": "", "ns": {}})
            entry["source"] = f"{how}, {counts['versions']}, at {clock:g} GHz"
            entry["ns"][key] = round(nanoseconds_, 3)
    OUT.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"wrote {OUT.name}: " + ", ".join(f"{device} {len(entry['ns'])}" for device, entry in table.items()))


if __name__ == "__main__":
    main()
