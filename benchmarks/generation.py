"""Compile time against depth, programs compiled by a second call, decode time against the length of the cache.

    python -m benchmarks.generation [--model DIR] [--cache SPEC ...] [--only PART ...] [--json OUT]

Random weights where only shapes matter. Times are medians; everything runs in one process on the default device, the
caches of a row of the table in turn.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

import xquant_jax as xq
from xquant_jax.generation.decode import STEPS, advance
from xquant_jax.generation.prefill import feed
from xquant_jax.generation.slots import Arrivals, Slots
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.parameters import outer_of, stacked

METHODS = ("bf16", "int8", "xquant:4", "xquant:4,basis=joint", "xquant:2")
LENGTHS = (1024, 8192, 32768)
TIMED = 16
"""Decoded tokens per measurement."""

PROMPT = 1024
"""Tokens of the prompt whose prefill is timed."""

PARTS = ("compile", "second_call", "decode_ms")


def start(model: xq.Model, batch: int) -> Slots:
    """Slots whose prompts are already in the cache and whose last token is 1."""
    slots = Slots.free(batch, model.config.vocab_size, 8)
    limit, last = np.full(batch, 2**30, np.int32), np.ones(batch, np.int32)
    return dataclasses.replace(slots, asked=dataclasses.replace(slots.asked, limit=limit), last=last, made=last)


def compile_seconds(model: xq.Model, layers: int, spec: str) -> float:
    """Tracing, lowering and compiling prefill and decode for a model of this depth."""
    config = dataclasses.replace(model.config, num_layers=layers, sliding_windows=(None,) * layers)
    transformer = xq.Transformer(config)

    def deeper(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((layers, *a.shape[1:]), a.dtype), tree)

    cache_config = xq.CacheConfig.parse(spec)
    params = {**outer_of(model.params), "layers": deeper(stacked(model.layers))}
    method_params = deeper(cache_config.method_params(model.source))
    cache = jax.eval_shape(lambda: xq.allocate(cache_config, config, batch=1, tokens=1024))
    arrivals = Arrivals.of([[None]], 16, 8)
    parts, live = (transformer, params, method_params, None, start(model, 1), cache), np.ones(1, bool)
    jax.clear_caches()
    before = time.perf_counter()
    feed.lower(*parts, arrivals, live, chunk=16).compile()
    advance.lower(*parts, live, np.int32(STEPS), np.bool_(False)).compile()
    return time.perf_counter() - before


def depth(model: xq.Model, rounds: int = 3) -> list[dict[str, Any]]:
    """8 against 32 layers of the same width, in turn."""
    rows = []
    for spec in ("bf16", "xquant:4"):
        pairs = [[compile_seconds(model, layers, spec) for layers in (8, 32)] for _ in range(rounds)]
        rows.append(
            {
                "cache": spec,
                "layers_8_s": statistics.median(short for short, _ in pairs),
                "layers_32_s": statistics.median(deep for _, deep in pairs),
                "ratio": statistics.median(deep / short for short, deep in pairs),
            }
        )
    return rows


def second_call(model: xq.Model) -> list[dict[str, Any]]:
    """Programs that XLA compiles in the first call and in one with other prompts of the same bucket."""
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    rows = []
    for prompt in ("def add(a, b):", "class Stack(list):"):
        compiled.clear()
        xq.generate(model, prompt, cache="xquant:4", max_new_tokens=11)
        rows.append({"prompt": prompt, "programs": len(compiled), "seconds": sum(compiled)})
    monitoring.unregister_event_duration_listener(listen)
    return rows


def stepping(model: xq.Model, spec: str, length: int) -> Callable[[], float]:
    """Decodes on from a cache that holds `length` random tokens; each call gives milliseconds per token."""
    cache_config = xq.CacheConfig.parse(spec)
    method_params = cache_config.method_params(model.source)
    cache = xq.allocate(cache_config, model.config, batch=1, tokens=length + BLOCK)
    rng = np.random.default_rng(0)

    def fill(a: jax.Array) -> jax.Array:
        if a.dtype == jnp.uint32:
            return jnp.asarray(rng.integers(0, 2**32, a.shape, dtype=np.uint32))
        return jnp.asarray(rng.random(a.shape, dtype=np.float32), a.dtype)

    full = {
        "lengths": jnp.full(1, length, jnp.int32),
        "history_blocks": jnp.full(1, length // BLOCK, jnp.int32),
    }
    cache = dataclasses.replace(cache, segments=jax.tree.map(fill, cache.segments), **full)
    held = {"slots": start(model, 1), "cache": cache}

    def step() -> float:
        before = time.perf_counter()
        at_length = jax.tree.map(jnp.copy, full)  # every call begins there
        slots, cache, _ = jax.block_until_ready(
            advance(
                model.transformer,
                model.params,
                method_params,
                None,
                held["slots"],
                dataclasses.replace(held["cache"], **at_length),
                np.ones(1, bool),
                np.int32(TIMED),
                np.bool_(False),
            )
        )
        held.update(slots=slots, cache=cache)
        return (time.perf_counter() - before) / TIMED * 1e3

    return step


def prefilling(model: xq.Model, spec: str) -> Callable[[], float]:
    """Each call gives the seconds that a prompt of `PROMPT` random tokens takes to be fed, compiling aside."""
    prompt = np.random.default_rng(0).integers(1, model.config.vocab_size, PROMPT).tolist()
    return lambda: xq.generate(model, [prompt], cache=spec, max_new_tokens=1, stop_ids=[]).prefill_s


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int = 3) -> dict[str, float]:
    """The median of each run over the rounds. One round goes through all of them, so that a machine whose speed drifts
    does not decide; the first, which compiles, is not counted."""
    times = [{name: run() for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(one[name] for one in times) for name in runs}


def decoding(model: xq.Model, specs: Sequence[str]) -> list[dict[str, Any]]:
    """Milliseconds per token by tokens in the cache, and seconds of prefill; a row for each cache."""
    by_length = {str(n): in_turn({spec: stepping(model, spec, n) for spec in specs}) for n in LENGTHS}
    prefill = in_turn({spec: prefilling(model, spec) for spec in specs})
    return [
        {"cache": spec, **{n: times[spec] for n, times in by_length.items()}, "prefill_s": prefill[spec]}
        for spec in specs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a directory, or a name on the Hub")
    parser.add_argument("--cache", nargs="+", default=METHODS, metavar="SPEC")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    model = xq.load(arguments.model, dtype="float32")
    parts = {
        "compile": lambda: depth(model),
        "second_call": lambda: second_call(model),
        "decode_ms": lambda: decoding(model, arguments.cache),
    }
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": Path(arguments.model).name,
        **{name: parts[name]() for name in arguments.only},
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
