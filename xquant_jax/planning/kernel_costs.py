"""What the kernels take for a cached token of one layer, as counted from their machine code: `kernel_costs.json`.

    {"v6e": {"source": "...", "ns": {"decode_attention 32/8x128 ...": 1.5, ...}}, ...}

`python -m benchmarks.static.costs` writes the file from the tables in `benchmarks/results`. A cost belongs to one chip,
and to calls of exactly the shapes that it was counted for, whatever model makes them.
"""

import functools
import json
from importlib.resources import files

import numpy as np

from pallas_kernels import MOST_NEW_TOKENS
from pallas_kernels.shapes import DecodeShape, SumShape
from xquant_jax.cache.methods.base import Method
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.quantization import StreamSpec
from xquant_jax.planning.devices import Device, find_device
from xquant_jax.planning.kernel_shapes import decode_shape, sum_shape


def seconds_per_token(device: Device, config: ModelConfig, method: Method, new: int = 1) -> float | None:
    """Seconds that a layer's kernels take for one cached token of one sequence and so many new ones; None unless the
    costs of all of them are known on this device, for one new token at least.

    Between the numbers of new tokens that were counted, attention's cost is a straight line; beyond the last of them
    every further one adds its matrix products at the device's rate. A running sum is the same for any number.
    """
    known = _known(device)
    if not known:
        return None
    attends = decode_shape(config, method)
    if attends is None:
        return None
    adds = sum_shape(config, method)
    if key_of(attends) not in known or (adds is not None and key_of(adds) not in known):
        return None
    costs = {n: known[key] for n in range(1, MOST_NEW_TOKENS + 1) if (key := key_of(attends, n)) in known}
    nanoseconds = float(np.interp(new, list(costs), list(costs.values())))
    if adds is not None:
        nanoseconds += known[key_of(adds)]
    of_query = 2 * (attends.macs - attends.rebuild_macs) / device.flops
    return nanoseconds * 1e-9 + max(0, new - max(costs)) * of_query


def key_of(shape: DecodeShape | SumShape, new: int = 1) -> str:
    """What a cost is found by: the operation and all that its cost depends on. new: tokens that attend at once."""
    if isinstance(shape, SumShape):
        matrices = " ".join(f"{a.shape[0]}x{a.shape[1]}" for a in shape.matrices)
        return f"accumulate {_stream(shape.running_sum)} + {_stream(shape.stream)} {matrices}".strip()
    rebuild = shape.rebuild
    form = [shape.form, *(name for name in ("bias", "norm") if getattr(rebuild, name) is not None)]
    if rebuild.scale is not None and rebuild.matrix is not None:
        form.append(str(rebuild.matrix.dtype))
    value = "key" if shape.value is None else _stream(shape.value)
    heads = f"{shape.heads}/{shape.kv_heads}x{shape.dim}"
    at_once = f" of {new}" if new > 1 else ""
    return f"decode_attention {heads} {'+'.join(form)} {_stream(shape.key)} {value}/{shape.value_heads}{at_once}"


def _stream(spec: StreamSpec) -> str:
    kind = "" if spec.format == "uniform" else f"{spec.format}:"
    outliers = f"+{spec.outliers}" if spec.outliers else ""
    return f"{kind}{spec.width}x{spec.bits}:{spec.axis}/{spec.group}{outliers}"


def _known(device: Device) -> dict[str, float]:
    """Costs on a device in nanoseconds; none on one of the user's own, even by the name of another."""
    entry = _table().get(device.name)
    return entry["ns"] if entry and find_device(device.name) == device else {}


@functools.cache
def _table() -> dict[str, dict]:
    return json.loads((files("xquant_jax.planning") / "kernel_costs.json").read_text("utf-8"))
