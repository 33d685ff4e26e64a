"""What kernels were counted to take, put where `xquant plan` finds it: `xquant_jax/planning/kernel_costs.json`.

    python -m benchmarks.static.tpu --json tpu.json
    python -m benchmarks.static.costs tpu.json [...]

Takes rows of `benchmarks.static.tpu`; devices that no row is of keep what they have. A cost is the microseconds of a
layer at 32 k context over its tokens: all bundles of the schedule, at the chip's clock.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.models import FILES, NARROW, decode_shape, sum_shape
from benchmarks.static.tpu import BLOCKS, decode_cases, sum_cases
from pallas_kernels.chips import TPUS
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.planning import kernel_costs

OUT = Path(kernel_costs.__file__).with_name("kernel_costs.json")
BITS = (2, 3, 4, 8)


def keys() -> Iterator[tuple[tuple[Any, ...], str]]:
    """How rows tell their cases apart, and the key of each one's shape."""
    for model in (*FILES, *NARROW):
        for case in decode_cases(model, list(BITS)):
            shape = decode_shape(model, case.cache)
            dtype = case.cache.partition("rebuild_dtype=")[2] or "bf16"
            yield (
                ("decode_attention", model, case.basis, shape.key.bits, dtype, shape.key.group),
                kernel_costs.key_of(shape),
            )
        for case in sum_cases(model, list(BITS)):
            shape = sum_shape(model, case.cache)
            yield (
                ("accumulate", model, case.basis, shape.stream.bits, "bf16", shape.stream.group),
                kernel_costs.key_of(shape),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path)
    arguments = parser.parse_args()
    known, table = dict(keys()), json.loads(OUT.read_text())
    for path in arguments.rows:
        found = json.loads(path.read_text())
        for row in found["rows"]:
            identity = tuple(row[name] for name in ("kernel", "model", "basis", "bits", "rebuild_dtype", "group"))
            if row.get("new", 1) != 1 or identity not in known:
                continue
            entry = table.setdefault(row["chip"], {"source": "", "ns": {}})
            clock = TPUS[row["chip"]].clock / 1e9
            entry["source"] = f"bundles of {found['versions']}, at {clock:g} GHz (benchmarks.static.tpu)"
            entry["ns"][known[identity]] = round(row["layer_us"] * 1000 / (BLOCKS * BLOCK), 3)
    OUT.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {OUT}: " + ", ".join(f"{chip} {len(entry['ns'])}" for chip, entry in table.items()))


if __name__ == "__main__":
    main()
