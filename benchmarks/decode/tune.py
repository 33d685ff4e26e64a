"""Times tile sizes of the Triton kernels that read keys or add to sums, and says which are the fastest."""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.decode.order import KERNELS, LLAMA_2, LLAMA_3, SIZES, SMALL, SUMS, TINY
from benchmarks.decode.rows import ALLOWED, Row, SumRow
from benchmarks.decode.variants import chosen
from pallas_kernels.triton.tiling import Tiles


def tune(smoke: bool, deadline: float) -> list[dict[str, Any]]:
    """What was found of every row: `tiles`, their seconds, and the seconds of those that the rule takes.

    Each row has an equal share of the time until `deadline`, which is of `time.monotonic`.
    """
    rows, found = list(tuned(smoke)), []
    for number, row in enumerate(rows):
        now = time.monotonic()
        entry = tuned_row(row, smoke, until=now + (deadline - now) / (len(rows) - number))
        print(json.dumps(entry), file=sys.stderr, flush=True)
        found.append(entry)
    return found


def tuned(smoke: bool) -> Iterator[Row | SumRow]:
    """What tiles are looked for."""
    if smoke:
        yield Row(TINY, "xquant:4", *SMALL, KERNELS)
        yield SumRow(TINY, "xquant-cl:2", *SMALL, KERNELS)
        return
    for cache in ("xquant:4", "xquant:4,basis=joint", "xquant:2", "xquant:3", "int8", "kivi:4"):
        yield Row(LLAMA_3, cache, *SIZES[0], KERNELS)
    for options in ("", ",rebuild_dtype=fp8", ",rebuild_dtype=int8"):
        yield Row(LLAMA_2, f"xquant:4{options}", 8, 32768, KERNELS)
    for model, cache in (SUMS[0], SUMS[-1]):
        yield SumRow(model, cache, *SIZES[0], KERNELS)


def tuned_row(row: Row | SumRow, smoke: bool, until: float) -> dict[str, Any]:
    """The fastest tiles of those that are right."""
    by_rule = best = None
    tried = candidates(row)
    for tiles in [None, *(tried[:2] if smoke else tried)]:
        if time.monotonic() > until:
            print(f"{row.cache}: {tiles} and what follows was not tried, out of time", file=sys.stderr)
            break
        with chosen(row.kernel, lambda rule, tiles=tiles: tiles or rule):
            try:
                taken = row.seconds(repeats=3)
                faster = best is None or taken < best[0]
                error = row.shortened().error() if faster else 0.0
            except Exception as problem:  # noqa: BLE001  tiles that do not compile or fit are no candidates
                print(f"{row.cache}: {tiles} {type(problem).__name__}", file=sys.stderr)
                continue
        if not error < ALLOWED:
            print(f"{row.cache}: {tiles} is wrong by {error:.3g}", file=sys.stderr)
            continue
        if tiles is None:
            by_rule = taken
        if faster:
            best = taken, tiles
    taken, tiles = best or (None, None)
    return {
        **dataclasses.asdict(row),
        "seconds_by_rule": by_rule,
        "seconds": taken,
        "tiles": tiles and dataclasses.asdict(tiles),
    }


def candidates(row: Row | SumRow) -> list[Tiles]:
    """Tiles that are worth a try."""
    if isinstance(row, SumRow):
        if not row.shape.macs:  # without products
            return [Tiles(blocks, warps=warps) for blocks, warps in itertools.product((1, 2), (4, 8))]
        chunks = (32, 64, 128)
    elif row.shape.form == "dense":
        chunks = (32, 64, 128) if row.shape.rebuild.scale is None else (64, 128)
    else:
        cuts = itertools.product(
            (True, False),
            (0,) if row.shape.form == "identity" else (0, 16, 64),
            ((1, 4, 2), (1, 4, 3), (1, 8, 2), (2, 8, 2)),
        )
        return [Tiles(blocks, chunk, warps, stages, fused) for fused, chunk, (blocks, warps, stages) in cuts]
    cuts = itertools.product(chunks, ((2, 8, 1), (2, 8, 2), (2, 8, 3), (1, 4, 2), (1, 8, 2)))
    return [Tiles(blocks, chunk, warps, stages) for chunk, (blocks, warps, stages) in cuts]
