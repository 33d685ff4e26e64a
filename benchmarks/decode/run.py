"""Decode attention and whole decode steps on the device at hand: checks the outputs, then times.

    python -m benchmarks.decode.run --json OUT.json --plot OUT.png    under 8 minutes: what does not fit is named
    python -m benchmarks.decode.run --tune --json TILES.json          the fastest tile sizes, beside the rule's
    python -m benchmarks.decode.run --only layers --caches 'xquant:4*' bf16    some of it, without checks
    python -m benchmarks.decode.run --smoke                           tiny shapes on the interpreter, on any machine

`of_copy` and `of_matrix` are the shares of this device's own bandwidth and matrix rate, which are measured first, that
the bytes and operations of a row take up.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # half of the memory is to be filled

import jax

from benchmarks.decode.ceilings import ceilings
from benchmarks.decode.figure import best_bf16, draw
from benchmarks.decode.order import KERNELS, LLAMA_3, first_layers, more_checks, more_layers, sums
from benchmarks.decode.rows import ALLOWED, Row
from benchmarks.decode.steps import StepRow, steps
from benchmarks.decode.tune import tune
from benchmarks.models import config_of
from pallas_kernels import target
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.packing import BLOCK

KINDS = ("checks", "layers", "steps", "sums")
VERSIONS = ("jax", "jaxlib", "jax-triton", "triton", "tokamax", "torch", "xquant-jax")


@dataclasses.dataclass
class Report:
    """What was found, in lists by kind. `deadline` is of `time.monotonic`; no row is started after it."""

    result: dict[str, Any]
    deadline: float
    path: Path | None

    def attempt(self, kind: str, row: Any, unit: str, measure: Callable[[], float]) -> dict[str, Any] | None:
        """The entry of a row, or None: then `skipped` has it with the reason, or `wrong` if it is a check that did not
        run. Writes everything down each time."""
        entry = dataclasses.asdict(row)
        if time.monotonic() > self.deadline:
            self.result["skipped"].append({**entry, "reason": "out of time"})
            return None
        try:
            entry[unit] = measure()
        except Exception as problem:  # noqa: BLE001  whatever it is, the other rows are worth having
            refused = kind != "checks" or isinstance(
                problem, ConfigError
            )  # a check that fails otherwise proves nothing
            reason = f"{type(problem).__name__}: {str(problem)[:200]}"
            self.result["skipped" if refused else "wrong"].append({**entry, "reason": reason})
            self.save()
            return None
        self.result[kind].append(entry)
        print(json.dumps(entry), file=sys.stderr, flush=True)
        self.save()
        return entry

    def save(self) -> None:
        if self.path:
            self.path.write_text(json.dumps(self.result, indent=1) + "\n")


def measure(
    smoke: bool, deadline: float, path: Path | None, only: Collection[str] = KINDS, caches: Sequence[str] = ("*",)
) -> dict[str, Any]:
    """Checks and times what matters most first."""
    result: dict[str, Any] = {
        "device": jax.local_devices()[0].device_kind,
        "versions": {name: version for name in VERSIONS if (version := installed(name))},
        "interpreted": smoke,
        "ceilings": ceilings(256 if smoke else 8192),
        **{kind: [] for kind in ("checks", "wrong", "sums", "layers", "steps", "skipped")},
    }
    report = Report(result, deadline, path)
    for kind, row in jobs(smoke, only, caches):
        if kind == "checks":
            check(report, row)
        elif kind == "layers":
            time_layer(report, row)
        else:
            report.attempt(kind, row, "seconds", row.seconds)
    for entry in result["layers"]:
        best = best_bf16(result["layers"], entry["model"], entry["batch"], entry["context"])
        entry["times_as_fast_as_bf16"] = best and best / entry["seconds"]
    if not smoke:
        result["steps"] += best_bf16_step(result, steps(smoke)[0])
    report.save()
    return result


def jobs(smoke: bool, only: Collection[str], caches: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Kinds and rows in the order of what matters most, each kernel's check before it is timed; of the kinds in `only`,
    and of caches like one of the patterns `caches`."""
    seen: set[Any] = set()

    def of(kind: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        for row in rows:
            if not any(fnmatch.fnmatch(row.cache, pattern) for pattern in caches):
                continue
            if row.implementation == KERNELS and not isinstance(row, StepRow):
                short = row if kind == "checks" else row.shortened()
                if "checks" in only and short not in seen:
                    seen.add(short)
                    yield "checks", short
            if kind in only and kind != "checks":
                yield kind, row

    yield from of("layers", first_layers(smoke))
    if "steps" in only:
        whole_steps = steps(smoke)
        if not smoke:  # attention of the steps to bf16
            yield from of("layers", [Row(LLAMA_3, "bf16", whole_steps[0].batch, whole_steps[0].context, "cudnn")])
        yield from of("steps", whole_steps)
    yield from of("layers", more_layers(smoke))
    yield from of("sums", sums(smoke))
    yield from of("checks", more_checks(smoke))


def check(report: Report, row: Any) -> None:
    """Holds a row against the reference."""
    entry = report.attempt("checks", row, "error", row.error)
    if entry and not entry["error"] < ALLOWED:
        report.result["wrong"].append(entry)


def time_layer(report: Report, row: Row) -> None:
    """Times attention to a layer, and says how much of the device it takes up."""
    if entry := report.attempt("layers", row, "seconds", row.seconds):
        taken, most = entry["seconds"], report.result["ceilings"]
        entry |= {
            "bytes": row.bytes,
            "flops": row.flops,
            "ns_per_token": 1e9 * taken / (row.batch * row.context),
            "of_copy": row.bytes / taken / most["copy_bytes"],
            "of_matrix": row.flops / taken / most["matrix_flops"],
        }


def best_bf16_step(result: dict[str, Any], row: StepRow) -> list[dict[str, Any]]:
    """A step with bf16 keys and values and the best attention to them: one without history, and that of all layers."""
    empty = [e["seconds"] for e in result["steps"] if e["cache"] == "bf16" and e["context"] == BLOCK]
    layer = best_bf16(result["layers"], row.model, row.batch, row.context)
    if not empty or layer is None:
        return []
    name = "bf16, with the best attention: sum of a step without history and of its layers"
    total = empty[0] + config_of(row.model).num_layers * layer
    return [{**dataclasses.asdict(row), "cache": name, "seconds": total}]


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(result: dict[str, Any]) -> None:
    for e in result["layers"]:
        shares = f"copy {e['of_copy']:.0%}, matrix {e['of_matrix']:.0%}"
        print(f"{_name(e)} {1e3 * e['seconds']:9.3f} ms {e['ns_per_token']:7.3f} ns/token, {shares}")
    for e in result["sums"]:
        print(f"{_name(e)} {1e3 * e['seconds']:9.3f} ms a layer of the running sum")
    for e in result["steps"]:
        print(f"step {e['cache']:24} {e['batch']:3} x {e['context']:6} {1e3 * e['seconds']:9.2f} ms")
    for e in result["skipped"]:
        what = " ".join(str(value) for name, value in e.items() if name != "reason")
        print(f"skipped: {what}: {e['reason']}")
    for e in result["wrong"]:
        print(f"wrong (more than {ALLOWED} off, or it failed): {e}")


def _name(e: dict[str, Any]) -> str:
    variant = e.get("variant", "")
    return f"{e['model']:13} {e['cache']:26} {e['implementation']:8} {variant:8} {e['batch']:3} x {e['context']:6}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything here")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write a picture here")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no further row after this long")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="what to do")
    parser.add_argument("--caches", nargs="+", metavar="NAME", default=["*"], help="which ones; patterns with * too")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, kernels on the interpreter")
    parser.add_argument("--tune", action="store_true", help="look for the fastest tile sizes instead")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    with target.interpreted() if arguments.smoke else contextlib.nullcontext():
        if arguments.tune:
            found = tune(arguments.smoke, deadline)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")
            return 0
        result = measure(arguments.smoke, deadline, arguments.json, arguments.only, arguments.caches)
    if arguments.plot:
        draw(result, arguments.plot)
    show(result)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
