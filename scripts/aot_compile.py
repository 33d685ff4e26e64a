"""Compiles prefill and the decode step for a TPU slice that is not there, and says whether they fit its memory.

    python scripts/aot_compile.py --topology v5e:4x4 --config scripts/configs/llama-3.1-8b.json \
        --cache xquant:4 --context 131072 --batch 16 --mesh data=1,sequence=4,tensor=4

The compiler is the real one, out of `libtpu` (`pip install 'xquant-jax[tpu]'`); no TPU is touched. Temporaries are
what it assigns to one device; weights and cache are that device's shards, which it lays out without padding (under
`compiled` the JSON has its own sums: arguments, and the cache among them, which is updated in place). Collectives are
read from the program that it wrote, with the bytes that a device receives for one. What fits by this count fits the
chip. The history is read with what `generate` would choose there: the TPU kernels, where they take the cache's
streams; `--implementation xla` compiles plain XLA instead.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xquant_jax.cache.partition import cache_specs, constrain_cache

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU whose metadata could be asked for
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may compile at the same time
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # any will do: it would be looked for otherwise
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from pallas_kernels import chips, target
from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush, flush_when_due
from xquant_jax.cache.state import Cache, allocate, cache_bytes
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError, XQuantError
from xquant_jax.json_file import check_folder, write_json
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.model.weights import parameter_specs
from xquant_jax.planning.plan import read_config
from xquant_jax.planning.shapes import method_params_of_one_layer, parameter_shapes
from xquant_jax.sharding import P

TRIES = 6
"""Compilations to find the largest context, at most."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


def factor_shapes(config: ModelConfig, cache: CacheConfig) -> tuple[Any, Any]:
    """Shapes of what the cache method multiplies with, and which of them are parameters."""
    method_params, parameters = method_params_of_one_layer(config, cache)
    shared = jax.tree.map(lambda a: id(a) in parameters, method_params)
    shapes, end = [], 0
    for (_, layers), tree in zip(cache.segments(config), method_params, strict=True):
        end += layers

        def shape(a: Any, end: int = end) -> jax.ShapeDtypeStruct:
            number = config.num_layers if id(a) in parameters else end
            return jax.ShapeDtypeStruct((number, *a.shape[1:]), a.dtype)

        shapes.append(jax.tree.map(shape, tree))
    return tuple(shapes), shared


def lie(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """The shapes, with where their arrays lie."""
    specs = jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )


def per_device(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Programs:
    """The two programs as `generate` runs them: a chunk of the prompts, and one more token."""

    model: Transformer

    def prefill(self, params: Any, method_params: Any, tokens: Any, counts: Any, cache: Cache) -> Any:
        logits, cache = forward(self.model, params, tokens, cache, method_params, counts)
        return logits, constrain_cache(flush(cache, method_params))

    def decode(self, params: Any, method_params: Any, tokens: Any, counts: Any, cache: Cache) -> Any:
        logits, cache = forward(self.model, params, tokens, cache, method_params, counts)
        cache = flush_when_due(cache, method_params)
        return jnp.argmax(logits, axis=-1), constrain_cache(cache)


def compile_for(
    devices: Any,
    config: ModelConfig,
    cache_config: CacheConfig,
    *,
    mesh_sizes: dict[str, int],
    context: int,
    batch: int,
    prefill_chunk: int = 512,
    implementation: str | None = None,
) -> dict[str, Any]:
    """What `--json` writes. Raises `ConfigError` where model, batch or mesh do not divide, and where an
    `implementation` that is named cannot read the cache."""
    mesh = sharding.make_mesh(**mesh_sizes, devices=devices)
    sharding.check_model(config, mesh)
    sharding.check_batch(batch, mesh)
    if batch < 1:
        raise ConfigError(f"batch={batch} is not possible; choose 1 or more")
    if context < 1 or not 1 <= prefill_chunk <= context:
        raise ConfigError(f"prefill_chunk={prefill_chunk} and context={context}: choose 1 <= prefill_chunk <= context")
    method_params, shared = factor_shapes(config, cache_config)
    params = parameter_shapes(config)
    params = lie(params, parameter_specs(config), mesh)
    with jax.set_mesh(mesh), target.compiling_for("tpu", devices[0].device_kind):
        sizes: dict[str, Any] = {"batch": batch, "tokens": context, "implementation": implementation}
        cache = jax.eval_shape(lambda: allocate(cache_config, config, **sizes))
        parts = {part: _bytes_of(cache, part, mesh) for part in ("codes", "scales", "window", "scratch")}
        cache = lie(cache, cache_specs(cache), mesh)
        method_params = lie(method_params, cache.partition.stacked_params(method_params), mesh)
        programs, results, memory, problems = Programs(Transformer(config)), [], {}, []
        reads_with = programs.model.implementation_of(cache, method_params, config.dtype)
        for name, length in (("prefill", prefill_chunk), ("decode", 1)):
            inputs = (jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32))
            jitted = jax.jit(getattr(programs, name), donate_argnames="cache")
            lowered = jitted.trace(params, method_params, *lie(inputs, P(), mesh), cache).lower(
                lowering_platforms=("tpu",)
            )
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                problems.append((name, str(error)))
                continue
            memory[name] = compiled.memory_analysis()
            results += [{"program": name, **c} for c in collectives(compiled.as_text() or "")]
    # factors that are parameters are the same arrays where they lie as these do: held once, but two arguments
    again = jax.tree.map(lambda a, is_parameter: a if is_parameter else None, method_params, shared)
    twice = per_device(again) if mesh.shape["tensor"] == 1 else 0
    weights, held = per_device(params) + per_device(method_params) - twice, per_device(cache)
    temporaries = max((m.temp_size_in_bytes for m in memory.values()), default=0)
    temporaries = max([temporaries, *(_needed(message) for _, message in problems)])
    total = weights + held + temporaries
    capacity = int(chips.tpu(devices[0].device_kind).usable * 2**30)
    return {
        "fits": not problems and total <= capacity,
        "context": context,
        "implementation": reads_with,
        "per_device": {
            "weights": weights,
            "cache": held,
            "cache_parts": parts,
            "temporaries": temporaries,
            "total": total,
            "capacity": capacity,
        },
        "compiled": {
            name: {
                "arguments": m.argument_size_in_bytes - twice,
                "updated_in_place": m.alias_size_in_bytes,
                "temporaries": m.temp_size_in_bytes,
            }
            for name, m in memory.items()
        },
        "collectives": results,
        "does_not_compile": [name for name, _ in problems],
    }


def largest_context(devices: Any, config: ModelConfig, cache_config: CacheConfig, **sizes: Any) -> dict[str, Any]:
    """`compile_for` with as many tokens as fit, within a hundredth; does not fit where not even the first try does."""
    best = compile_for(devices, config, cache_config, context=8192, **sizes)
    parts = 128 * len(devices)  # whatever the mesh, every device has whole blocks
    slope = best["per_device"]["cache"] / best["context"]
    for _ in range(TRIES):
        free = best["per_device"]["capacity"] - best["per_device"]["total"]
        more = int((best["context"] + free / slope) // parts * parts)
        if not best["fits"] or more < 1.01 * best["context"]:
            break
        other = compile_for(devices, config, cache_config, context=more, **sizes)
        grown = other["per_device"]["total"] - best["per_device"]["total"]
        slope = max(slope, 1.001 * grown / (more - best["context"]))  # temporaries may grow too
        best = other if other["fits"] else best
    return best


def _bytes_of(cache: Cache, part: str, mesh: Mesh) -> int:
    """Of one device: every array of these is split evenly over all devices, but for the lengths."""
    return getattr(cache_bytes(cache), part) // mesh.size


def _needed(message: str) -> int:
    """Bytes of temporaries that the compiler says a program takes that does not fit."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", message)
    if found is None:
        raise RuntimeError(message)
    return int(float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1)))


def collectives(hlo: str) -> list[dict[str, Any]]:
    """Every collective of a compiled program: how often it runs in a step and the bytes that a device receives.

    `when`: "step", or "flush" for those in a branch that only a step with a whole block takes.
    """
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            bodies[name] = []
            if line.startswith("ENTRY"):
                bodies["ENTRY"] = bodies[name]
        elif name and line.strip() and line[0].isspace():
            bodies[name].append(line)
    found: Counter[tuple[str, int, str]] = Counter()
    counted: set[str] = set()  # one that overlaps computation is written several times

    def walk(body: str, times: int, when: str) -> None:
        for line in bodies.get(body, ()):
            if kind := re.search(rf" ({'|'.join(COLLECTIVES)})(-start)?\(", line):
                size = _received(line, kind[1], bool(kind[2]))
                channel, origin = (re.search(p, line) for p in (r"channel_id=(\d+)", r'op_name="([^"]*)"'))
                key = f"{size} {channel and channel[1]} {origin and origin[1]}"
                if channel is None or key not in counted:
                    found[kind[1], size, when] += times
                counted.add(key)
            elif loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                walk(loop[2], times * _trips(bodies[loop[1]]), when)
            elif " conditional(" in line:
                for inner in re.findall(r"%?([\w.\-]+)", _branches(line)):
                    walk(inner, times, "flush")
            elif inner := re.search(r"(?:calls|called_computations)=\{?%?([\w.\-]+)", line):
                walk(inner[1], times, when)

    walk("ENTRY", 1, "step")
    return [
        {"op": op, "when": when, "count": count, "bytes": size * count, "bytes_each": size}
        for (op, size, when), count in sorted(found.items(), key=lambda item: -item[1] * item[0][1])
    ]


def _trips(condition: list[str]) -> int:
    """How often a loop over layers runs: the constant that its counter is compared with; 1 if that is not constant."""
    constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(constants[0]) if len(constants) == 1 else 1


def _branches(line: str) -> str:
    several = re.search(r"branch_computations=\{([^}]*)\}", line)
    if several:
        return several[1]
    return " ".join(re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line))


def _received(line: str, op: str, started: bool) -> int:
    """Bytes of the results; a start returns its operands before its results."""
    result = line.split(" = ", 1)[1].split(f" {op}", 1)[0]
    sizes = [
        ITEM_BYTES.get(dtype, 4) * math.prod(map(int, dims.split(",") if dims else []))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
    if started and op != "all-reduce":
        sizes = [size for size in sizes if size > 4]
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def shortened(config: ModelConfig, layers: int) -> ModelConfig:
    """The model with its first layers only. Raises `ConfigError` where it does not have so many."""
    if not 1 <= layers <= config.num_layers:
        raise ConfigError(f"--layers {layers} is not possible; this model has 1 to {config.num_layers}")
    return dataclasses.replace(config, num_layers=layers, sliding_windows=config.sliding_windows[:layers])


def topology_devices(name: str) -> Any:
    """The devices of a slice such as v5e:4x4. Raises `ConfigError` for one that does not exist or is not known."""
    ways_out = "write v5e:2x2, v5e:4x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x1 ..."
    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--topology {name}: {str(error).splitlines()[0]}; {ways_out}") from error
    if chips.tpu(devices[0].device_kind) is chips.UNKNOWN_TPU:
        raise ConfigError(f"--topology {name}: the memory of a {devices[0].device_kind} is not known; {ways_out}")
    return devices


def show(report: dict[str, Any]) -> None:
    console, sizes = Console(width=120), report["per_device"]
    table = Table("part", "bytes per device", "GiB")
    rows = {"weights": sizes["weights"], "cache": sizes["cache"]}
    rows |= {f"  {part}": size for part, size in sizes["cache_parts"].items()}
    rows |= {name: sizes[name] for name in ("temporaries", "total", "capacity")}
    for name, size in rows.items():
        table.add_row(name, f"{size:,}", f"{size / 2**30:.3f}")
    console.print(table)
    table = Table("program", "collective", "when", "times", "bytes of a step and device")
    for c in report["collectives"]:
        table.add_row(c["program"], c["op"], c["when"], str(c["count"]), f"{c['bytes']:,}")
    console.print(table)
    verdict = "fit" if report["fits"] else "do not fit"
    console.print(
        f"{report['context']:,} tokens per sequence {verdict}; decoding reads them with {report['implementation']}",
        style="bold",
        highlight=False,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help="v5e:2x2, v5e:4x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x1 ...")
    parser.add_argument("--config", required=True, type=Path, help="a config.json")
    parser.add_argument("--cache", default="xquant:4")
    parser.add_argument("--context", required=True, help="tokens per sequence, or largest: as many as fit")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mesh", default="", help="data=1,sequence=4,tensor=4 (default: all devices along sequence)")
    parser.add_argument("--prefill-chunk", type=int, default=512)
    parser.add_argument("--layers", type=int, help="compile so many layers only")
    parser.add_argument("--implementation", help="xla or pallas_tpu (default: what generate would choose)")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args(argv)
    try:
        check_folder("--json", arguments.json)
        config = read_config(arguments.config)
        if arguments.layers is not None:
            config = shortened(config, arguments.layers)
        devices = topology_devices(arguments.topology)
        sizes: dict[str, Any] = {
            "mesh_sizes": sharding.parse_mesh(arguments.mesh) if arguments.mesh else {"sequence": len(devices)},
            "batch": arguments.batch,
            "prefill_chunk": arguments.prefill_chunk,
            "implementation": arguments.implementation,
        }
        model = (devices, config, CacheConfig.parse(arguments.cache))
        if arguments.context == "largest":
            report = largest_context(*model, **sizes)
        elif arguments.context.isdigit():
            report = compile_for(*model, context=int(arguments.context), **sizes)
        else:
            raise ConfigError(f"--context {arguments.context} is neither a number of tokens nor largest")
    except XQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        write_json(arguments.json, report)
    show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
