"""How a model and its cache lie on a mesh of devices: rules from logical axes to the mesh axes, and their checks.

The mesh is the one of `jax.set_mesh`. Dense arithmetic is left to XLA's partitioner, which `constrain` guides; what
reads or writes the cache runs on every device's own share (`on_shards`). Without a mesh the same code runs as it is.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import UNQUANTIZED, Blocks, StreamSpec

if TYPE_CHECKING:
    from xquant_jax.cache.config import CacheConfig
    from xquant_jax.cache.state import Cache

AXES = ("data", "sequence", "tensor")
"""The axes of a mesh, outermost first: neighbours along `tensor` talk most."""

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes that each logical axis is split over.

    Streams that belong to heads are split by head and by block; those that every head needs whole by block alone,
    over as many devices. The window's places are split like the blocks. Tokens fed at once share the devices along
    `sequence` out among themselves, where they divide.
    """

    batch: Axes = ("data",)
    tokens: Axes = ("sequence",)
    heads: Axes = ("tensor",)
    mlp: Axes = ("tensor",)
    vocabulary: Axes = ("tensor",)
    head_blocks: Axes = ("sequence",)
    whole_blocks: Axes = ("sequence", "tensor")

    def spec(self, *logical: str | None) -> P:
        """The partition of an array whose axes are these."""
        return P(*(getattr(self, name) if name else None for name in logical))


RULES = Rules()

PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embed.embedding": ("vocabulary", None),
    "head.kernel": (None, "vocabulary"),
    "query.kernel": (None, "heads"),
    "query.bias": ("heads",),
    "key.kernel": (None, "heads"),
    "key.bias": ("heads",),
    "value.kernel": (None, "heads"),
    "value.bias": ("heads",),
    "output.kernel": ("heads", None),
    "gate.kernel": (None, "mlp"),
    "gate.bias": ("mlp",),
    "up.kernel": (None, "mlp"),
    "up.bias": ("mlp",),
    "down.kernel": ("mlp", None),
}
"""Logical axes of one layer's parameters, of the embedding and the head; the others lie whole on every device."""

PER_HEAD_FACTORS: dict[str, tuple[str | None, ...]] = {
    "down": (None, "heads", None),
    "up": ("heads", None, None),
    "bias": ("heads",),
}
"""Logical axes of one layer's factors where each head has its own, by the name of the leaf."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh axes that a method's streams are split over: their blocks (and window places), and their channels."""

    blocks: Axes
    channels: Axes

    @property
    def history(self) -> P:
        """Of [L, B, N, rows, C]."""
        return P(None, RULES.batch, self.blocks, None, self.channels)

    @property
    def window(self) -> P:
        """Of [L, B, W, C]."""
        return P(None, RULES.batch, self.blocks, self.channels)

    @property
    def sink(self) -> P:
        """Of [L, B, n, C]."""
        return P(None, RULES.batch, None, self.channels)

    @property
    def running(self) -> P:
        """Of [B, N, rows, C]."""
        return P(RULES.batch, self.blocks)

    def factors(self, tree: Any) -> Any:
        """Of the leaves of one layer's factors."""
        return named_specs(tree, PER_HEAD_FACTORS if self.channels else {})

    def stacked_factors(self, tree: Any) -> Any:
        """The same for factors of all layers, leading axis L."""
        return jax.tree.map(lambda spec: P(None, *spec), self.factors(tree), is_leaf=lambda x: isinstance(x, P))

    def share(self, history: dict[str, Blocks]) -> dict[str, Blocks]:
        """Within `on_shards`: a device's own arrays, described as streams of their own width."""
        parts = devices_along(self.channels)

        def own(spec: StreamSpec) -> StreamSpec:
            group = 0 if spec.bits == UNQUANTIZED else spec.group
            return dataclasses.replace(spec, width=spec.width // parts, group=group)

        return {name: dataclasses.replace(blocks, spec=own(blocks.spec)) for name, blocks in history.items()}


def layout(cache_config: "CacheConfig", config: ModelConfig) -> Layout:
    """By head if all streams of all layers belong to heads and no group of channels spans those of two devices."""
    segments, parts = cache_config.segments(config), devices_along(RULES.heads)
    groups = [
        spec.width // spec.group
        for method, _ in segments
        for spec in method.streams(config).values()
        if spec.axis == "token" and spec.bits != UNQUANTIZED
    ]
    by_head = all(method.by_head(config) for method, _ in segments) and all(n % parts == 0 for n in groups)
    return Layout(RULES.head_blocks, RULES.heads) if by_head else Layout(RULES.whole_blocks, ())


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


def active() -> bool:
    """Whether arrays are to be spread over the mesh of `jax.set_mesh`."""
    return set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def devices_along(axes: Axes) -> int:
    """Into how many parts these axes split; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in axes)


def tokens_axis(length: int) -> str | None:
    """The logical axis of `length` new tokens: split if they divide."""
    return None if length % devices_along(RULES.tokens) else "tokens"


def constrain(x: Any, *logical: str | None) -> Any:
    """The array, asked to lie as the rules say."""
    return jax.lax.with_sharding_constraint(x, RULES.spec(*logical)) if active() else x


def constrain_as(tree: Any, specs: Any) -> Any:
    """The arrays of a tree, asked to lie as a tree of partitions says, or all as one does."""
    if not active():
        return tree
    specs = jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def on_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on every device's own part of its arguments; `function` itself without a mesh."""
    if not active():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shard_index(axes: Axes) -> Any:
    """Within `on_shards`: which of the parts that these axes split into this device has."""
    return lax.axis_index(axes) if active() and axes else 0


def gather(x: Any, axes: Axes, axis: int) -> Any:
    """Within `on_shards`: the parts of all devices along these mesh axes, joined along the array's `axis`."""
    return lax.all_gather(x, axes, axis=axis, tiled=True) if active() and axes else x


def named_specs(tree: Any, axes: dict[str, tuple[str | None, ...]]) -> Any:
    """The partition of every leaf of a tree by its own name."""

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        return RULES.spec(*axes.get(getattr(path[-1], "key", ""), ()))

    return jax.tree_util.tree_map_with_path(spec, tree, is_leaf=lambda x: type(x) is tuple and isinstance(x[0], int))


def named(specs: Any, mesh: Mesh) -> Any:
    """A tree of partitions as shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def parameter_spec(path: str) -> P:
    """The partition of a parameter of one layer or of the outer part."""
    return RULES.spec(*PARAMETER_AXES.get(path, ()))


def cache_specs(cache: "Cache") -> "Cache":
    """The partition of every array of a cache, in its own structure."""
    segments = tuple(
        dataclasses.replace(
            segment,
            history=jax.tree.map(lambda _: cache.layout.history, segment.history),
            window=jax.tree.map(lambda _: cache.layout.window, segment.window),
            sink=jax.tree.map(lambda _: cache.layout.sink, segment.sink),
        )
        for segment in cache.segments
    )
    return dataclasses.replace(
        cache,
        lengths=RULES.spec("batch"),
        flushed=RULES.spec("batch"),
        segments=segments,
        running=jax.tree.map(lambda _: cache.layout.running, cache.running),
    )


def constrain_cache(cache: "Cache") -> "Cache":
    """The cache, asked to lie as `cache_specs` says."""
    return constrain_as(cache, cache_specs(cache))


def place(tree: Any, specs: Any, mesh: Mesh | None) -> Any:
    """The arrays of a tree, put where a tree of partitions (or one for all) says; what lies there stays.

    Numpy arrays must be the same in every process.
    """
    if mesh is None:
        return tree
    specs = jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs

    def put(x: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        if isinstance(x, jax.Array) and (sharding.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, specs)


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


def round_up(n: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-n // step) * step


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
