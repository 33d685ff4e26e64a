"""Time to the first token behind a long beginning: from a saved prefix, against feeding the whole prompt.

    python -m benchmarks.prefix [--model DIR] [--cache SPEC] [--tokens N] [--json OUT]

Random tokens; 64 more follow the beginning. Compiling is not counted, and done before; the two in turn.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import xquant_jax as xq

FOLLOWING = 64
"""Tokens behind the beginning."""


def first_token(model: xq.Model, cache: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds by part, medians over the rounds; the first round, which compiles, is not counted."""
    prompt = np.random.default_rng(0).integers(1, model.config.vocab_size, tokens + FOLLOWING).tolist()
    alike: dict[str, Any] = {"cache": cache, "max_new_tokens": 1, "stop_ids": []}
    with tempfile.TemporaryDirectory() as directory:
        saved = Path(directory) / "prefix"
        prefix = xq.prefill(model, prompt[:tokens], cache=cache)
        prefix.save(saved)
        size = sum(file.stat().st_size for file in saved.iterdir())
        rows = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            loaded = xq.load_prefix(model, saved)
            jax.block_until_ready(loaded.cache)
            load = time.perf_counter() - start
            behind = xq.generate(model, [prompt], prefix=loaded, **alike).prefill_s
            rows.append((xq.generate(model, [prompt], **alike).prefill_s, load, behind))
    whole, load, behind = (statistics.median(times) for times in zip(*rows[1:], strict=True))
    return {
        "cache": cache,
        "tokens": tokens,
        "stored": prefix.stored,
        "megabytes": size / 1e6,
        "whole_s": whole,
        "load_s": load,
        "prefix_s": behind,
        "share": statistics.median(b / w for w, _, b in rows[1:]),
        "share_with_load": statistics.median((x + b) / w for w, x, b in rows[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a directory, or a name on the Hub")
    parser.add_argument("--cache", default="xquant:4", metavar="SPEC")
    parser.add_argument("--tokens", type=int, default=8192, help="of the beginning")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    model = xq.load(arguments.model)
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": Path(arguments.model).name,
        "dtype": model.dtype,
        "rounds": arguments.rounds,
        **first_token(model, arguments.cache, arguments.tokens, arguments.rounds),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
