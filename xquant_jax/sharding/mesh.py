"""Meshes of devices: made, read from what users type, and held against a model and a batch."""

import contextlib
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.sharding.rules import AXES, RULES, Axes


def make_mesh(data: int = 1, sequence: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh over `devices`, by default all there are. Raises `ConfigError` if their number is another one."""
    devices = jax.devices() if devices is None else devices
    sizes = (data, sequence, tensor)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {describe(sizes)} takes {math.prod(sizes)} devices, and there are {len(devices)}; "
            f"choose sizes whose product is {len(devices)}"
        )
    if isinstance(devices, np.ndarray):
        devices = devices.ravel().tolist()
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by axis from `data=1,sequence=4,tensor=4`; an axis that is left out has size 1."""
    sizes = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in AXES or not equals or not value.isdigit() or int(value) < 1 or name in sizes:
            raise ConfigError(f"mesh {text!r}: {part!r} must be {', '.join(AXES)}, each once, = devices; as tensor=4")
        sizes[name] = int(value)
    return sizes


def describe(sizes: tuple[int, ...]) -> str:
    """Sizes as `parse_mesh` takes them."""
    return ",".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))


def checked(mesh: Mesh) -> Mesh:
    """The mesh with its axes left to XLA's partitioner. Raises `ConfigError` unless it has the axes of `AXES`."""
    if mesh.axis_names != AXES:
        raise ConfigError(f"mesh axes {mesh.axis_names} must be {AXES}; xquant_jax.make_mesh makes such a mesh")
    return Mesh(mesh.devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """`jax.set_mesh`, or nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` where the model's weights do not divide by the mesh."""
    sizes = {
        "num_attention_heads": (config.num_heads, RULES.heads),
        "num_key_value_heads": (config.num_kv_heads, RULES.heads),
        "intermediate_size": (config.mlp_width, RULES.mlp),
        "vocab_size": (config.vocab_size, RULES.vocabulary),
    }
    fitting = set(range(1, config.num_kv_heads + 1))
    for size, _ in sizes.values():
        fitting &= set(divisors(size))
    for name, (size, axes) in sizes.items():
        if size % _parts(mesh, axes):
            raise ConfigError(
                f"{name}={size} cannot be split over {_named(mesh, axes)}; for this model "
                f"{'*'.join(axes)} can be {_listed(fitting)}"
            )


def check_batch(batch: int, mesh: Mesh, what: str = "prompts") -> None:
    """Raises `ConfigError` where the sequences of a batch do not divide by the mesh."""
    parts = batch_parts(mesh)
    if batch % parts:
        raise ConfigError(
            f"{batch} {what} cannot be split over {_named(mesh, RULES.batch)}; give a multiple of {parts} {what}, "
            f"or a mesh with data={_listed(divisors(batch))}"
        )


def batch_parts(mesh: Mesh | None) -> int:
    """Into how many parts a batch is split."""
    return 1 if mesh is None else _parts(mesh, RULES.batch)


def divisors(n: int) -> list[int]:
    """All of them, smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _parts(mesh: Mesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _named(mesh: Mesh, axes: Axes) -> str:
    return ",".join(f"{axis}={mesh.shape[axis]}" for axis in axes)


def _listed(numbers: Any) -> str:
    *others, last = sorted(numbers)
    return f"{', '.join(map(str, others))} or {last}" if others else str(last)
