"""What XLA makes of a whole decode step for an H200 that need not be there.

    python -m benchmarks.static.gpu_step [--cache SPEC ...] [--batch B] [--tokens N]

Needs no GPU, but JAX's plugin for CUDA 13 (`pip install 'jax[cuda13]'`). Llama-3.1-8B at two depths, with its layers in
a loop over stacked weights and one after another (`load(..., scan_layers=...)`). `kernels`: launches of one layer,
flushes apart; `copied`: what kernels that do nothing but slice or join write for one layer; `rope`: launches that
compute cosines, in all layers; `temporaries`: of the whole step. Which kernels multiply is chosen on a device by trying
them, so that counts there may differ.
"""

import argparse
import dataclasses
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jax_triton import triton_lib

import xquant_jax as xq
from benchmarks.models import config_of
from benchmarks.static.pallas_gpu import DEVICE, GPU
from pallas_kernels import target
from xquant_jax.planning.shapes import method_params_of_one_layer, parameter_shapes

DEPTHS = (6, 10)  # of which xquant-cl stores the first three as xquant does
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
LAUNCHED = re.compile(r"%?(\S+) = (.*?) (?:fusion|custom-call|copy|sort)(-start)?\((.*)")


def compiled(spec: str, layers: int, scan_layers: bool, batch: int, tokens: int) -> Any:
    """One step of a model of so many layers."""
    config = config_of("Llama-3.1-8B")
    config = dataclasses.replace(config, num_layers=layers, sliding_windows=(None,) * layers)
    cache_config, transformer = xq.CacheConfig.parse(spec), xq.Transformer(config, scan_layers)
    params = parameter_shapes(config, scan_layers=scan_layers)
    one_layer, _ = method_params_of_one_layer(config, cache_config)

    def factors(shape: tuple[int, ...], a: Any) -> jax.ShapeDtypeStruct:
        dtype = config.dtype if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
        return jax.ShapeDtypeStruct((*shape, *a.shape[1:]), dtype)

    if scan_layers:
        method_params = jax.tree.map(lambda a: factors((layers,), a), one_layer)
    else:
        method_params = tuple((jax.tree.map(lambda a: factors((), a), own),) * layers for own in one_layer)
    cache = jax.eval_shape(lambda: xq.allocate(cache_config, config, batch=batch, tokens=tokens))

    def step(params: Any, method_params: Any, tokens: Any, cache: xq.Cache) -> Any:
        return xq.step(transformer, params, tokens, cache, method_params)

    topology = topologies.get_topology_desc("h200", "cuda", topology="1x1x1", target_config=DEVICE)
    device = SingleDeviceSharding(topology.devices[0])
    arguments = (params, method_params, jax.ShapeDtypeStruct((batch, 1), jnp.int32), cache)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), arguments)
    with (
        target.compiling_for("gpu", GPU.kind),
        mock.patch.object(triton_lib.triton_kernel_call_lib, "get_compute_capability", return_value=90),
    ):
        traced = jax.jit(step, donate_argnames="cache").trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).compile()


@dataclasses.dataclass
class Launches:
    """What a computation launches, those of its loops as often as they run (once if that depends on the data); without
    the branches of conditions."""

    kernels: int = 0
    copied: int = 0  # bytes
    rope: int = 0

    def add(self, other: "Launches", times: int) -> None:
        for name, count in dataclasses.asdict(other).items():
            setattr(self, name, getattr(self, name) + times * count)


def launches(text: str) -> Launches:
    """Those of a compiled module's entry."""
    computations: dict[str, list[str]] = {}
    own: list[str] = []
    for line in text.splitlines():
        if (begins := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)) is not None:
            own = computations["ENTRY" if begins[1] else begins[2]] = []
        own.append(line.strip())

    def count(name: str) -> Launches:
        found = Launches()
        for line in computations[name]:
            if (loop := re.search(r" while\(.*body=%?([\w.\-]+)", line)) is not None:
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                found.add(count(loop[1]), int(trips[1]) if trips else 1)
            elif (call := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line)) is not None:
                found.add(count(call[1]), 1)
            elif (launched := LAUNCHED.match(line.removeprefix("ROOT "))) is not None:
                kernel, written, asynchronous, rest = launched.groups()
                if asynchronous:  # written: ((what is read), what is written, a handle)
                    kernel, written = rest, written.split("), ")[1]
                # XLA calls those that multiply or attend from within a stack by the name of the slice alone
                sliced = re.search("_slice|concatenate", kernel) and not re.match("dynamic_slice|.*update", kernel)
                fused = re.search(r"calls=%?([\w.\-]+)", rest)
                rope = fused is not None and any(" cosine(" in own for own in computations[fused[1]])
                found.add(Launches(1, _bytes(written) if sliced else 0, int(rope)), 1)
        return found

    return count("ENTRY")


def _bytes(shapes: str) -> int:
    total = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        size = BYTES[kind]
        for n in sizes.split(","):
            size *= int(n or 1)
        total += size
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", nargs="+", default=["bf16", "xquant:4", "xquant-cl:2"], metavar="SPEC")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768, help="room of each sequence")
    arguments = parser.parse_args()
    print("| cache | layers | kernels a layer | copied a layer, MB | rope | temporaries, MB |")
    print("|---|---|---|---|---|---|")
    for spec in arguments.cache:
        for scan_layers in (True, False):
            steps = [compiled(spec, n, scan_layers, arguments.batch, arguments.tokens) for n in DEPTHS]
            few, many = (launches(step.as_text()) for step in steps)
            more = DEPTHS[1] - DEPTHS[0]
            kernels, copied = (many.kernels - few.kernels) / more, (many.copied - few.copied) / more / 1e6
            temporaries = steps[1].memory_analysis().temp_size_in_bytes / 1e6
            print(
                f"| {spec} | {'loop' if scan_layers else 'one after another'} | {kernels:.0f} | {copied:,.0f} | "
                f"{many.rope} | {temporaries:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
