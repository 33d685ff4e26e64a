"""Compile time against depth, programs compiled by a second call, decode time against the length of the cache.

    python -m benchmarks.generation [--json OUT]

Random weights where only shapes matter. Times are medians; everything runs in one process on the default device.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

import xquant_jax as xq
from xquant_jax.generation.decoding import Decoding, advance
from xquant_jax.numerics.packing import BLOCK

METHODS = ("bf16", "int8", "xquant:4", "xquant:4,basis=joint", "xquant:2")
LENGTHS = (512, 2048, 8192, 32768)
STEPS = 32


def start(model: xq.Model, batch: int, new: int) -> Decoding:
    """A batch whose prompts are already in the cache and whose last token is 1."""
    return Decoding(
        prompts=jnp.zeros((batch, 16), jnp.int32),
        prompt_lengths=jnp.zeros(batch, jnp.int32),
        fed=jnp.int32(0),
        step=jnp.int32(1),
        tokens=jnp.ones((batch, new), jnp.int32),
        logprobs=jnp.zeros((batch, new), jnp.float32),
        counts=jnp.ones(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        seeds=jnp.zeros(batch, jnp.int32),
        seen=None,
    )


def compile_seconds(model: xq.Model, layers: int, spec: str) -> float:
    """Tracing, lowering and compiling prefill and decode for a model of this depth."""
    config = dataclasses.replace(model.config, num_layers=layers, sliding_windows=(None,) * layers)
    transformer = xq.Transformer(config)

    def deeper(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((layers, *a.shape[1:]), a.dtype), tree)

    cache_config = xq.CacheConfig.parse(spec)
    params = {**model.params, "layers": deeper(model.params["layers"])}
    method_params = deeper(cache_config.method_params(model.source))
    cache = jax.eval_shape(lambda: xq.allocate(cache_config, config, batch=1, tokens=1024))
    arguments = (params, method_params, start(model, 1, 128), cache, xq.Sampling().checked())
    jax.clear_caches()
    before = time.perf_counter()
    advance.lower(transformer, *arguments, jnp.zeros(1, jnp.int32), jnp.int32(1), chunk=16).compile()
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


def decode_milliseconds(model: xq.Model, spec: str, length: int, batch: int = 1, rounds: int = 5) -> float:
    """Per step, for a cache that holds `length` random tokens per sequence."""
    cache_config = xq.CacheConfig.parse(spec)
    method_params = cache_config.method_params(model.source)
    cache = xq.allocate(cache_config, model.config, batch=batch, tokens=length + rounds * STEPS + BLOCK)
    rng = np.random.default_rng(0)

    def fill(a: jax.Array) -> jax.Array:
        if a.dtype == jnp.uint32:
            return jnp.asarray(rng.integers(0, 2**32, a.shape, dtype=np.uint32))
        return jnp.asarray(rng.random(a.shape, dtype=np.float32), a.dtype)

    cache = dataclasses.replace(
        cache,
        segments=jax.tree.map(fill, cache.segments),
        lengths=jnp.full(batch, length, jnp.int32),
        history_blocks=jnp.full(batch, length // BLOCK, jnp.int32),
    )
    state = start(model, batch, (rounds + 1) * STEPS + 1)
    ends, sampling = jnp.full(1, -1), xq.Sampling().checked()
    times = []
    for i in range(rounds + 1):
        before = time.perf_counter()
        limit = jnp.int32(1 + (i + 1) * STEPS)
        state, cache = jax.block_until_ready(
            advance(model.transformer, model.params, method_params, state, cache, sampling, ends, limit, chunk=16)
        )
        times.append((time.perf_counter() - before) / STEPS * 1e3)
    return statistics.median(times[1:])  # the first compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    model = xq.load("demo", dtype="float32")
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "compile": depth(model),
        "second_call": second_call(model),
        "decode_ms": [
            {"cache": spec, **{str(n): decode_milliseconds(model, spec, n) for n in LENGTHS}} for spec in METHODS
        ],
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
