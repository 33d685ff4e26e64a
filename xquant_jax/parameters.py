"""The one table of a model's arrays: each is a row with its path, its axes and how it is initialized.

The transformer makes its parameters from it, weights are read by it, partitions on a mesh and the converters' checks
come from it. A family with another norm, or with experts, has other rows.

Trees are nested dicts of arrays. A path such as `query.kernel` names a leaf; kernels are [in, out].
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from xquant_jax.config import ModelConfig

Tree = dict[str, Any]  # nested dicts of arrays
Layers = Tree | tuple[Tree, ...]  # arrays with the leading axis L, or each layer's own

KERNEL = jax.nn.initializers.lecun_normal()
EMBEDDING = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
SCALE = jax.nn.initializers.ones
BIAS = jax.nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a parameter."""

    size: int
    fields: str  # of config.json, those that fix the size, for error messages
    logical: str | None = None  # its name in `sharding.Rules`; None: whole on every device


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table: a leaf of one layer's tree, or of the outer one."""

    path: str
    axes: tuple[Axis, ...]
    initializer: Initializer  # of one layer's array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        """The name of every axis in `sharding.Rules`."""
        return tuple(axis.logical for axis in self.axes)

    @property
    def is_kernel(self) -> bool:
        """Whether it is a matrix that Hugging Face stores transposed, as [out, in]."""
        return self.path.endswith(".kernel")


def layer_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The rows of one layer; all layers have the same."""
    width = Axis(config.width, "hidden_size")
    queries = Axis(config.num_heads * config.head_dim, "num_attention_heads * head_dim", "heads")
    keys = Axis(config.kv_width, "num_key_value_heads * head_dim", "heads")
    mlp = Axis(config.mlp_width, "intermediate_size", "mlp")
    head = Axis(config.head_dim, "head_dim")
    return (
        Parameter("attention_norm.scale", (width,), SCALE),
        Parameter("mlp_norm.scale", (width,), SCALE),
        *_dense("query", width, queries, bias=config.qkv_bias),
        *_dense("key", width, keys, bias=config.qkv_bias),
        *_dense("value", width, keys, bias=config.qkv_bias),
        *_dense("output", queries, width, bias=config.output_bias),
        *_dense("gate", width, mlp, bias=config.mlp_bias),
        *_dense("up", width, mlp, bias=config.mlp_bias),
        *_dense("down", mlp, width, bias=config.mlp_bias),
        *(Parameter(f"{name}.scale", (head,), SCALE) for name in ("query_norm", "key_norm") if config.qk_norm),
    )


def outer_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The rows outside the layers: embedding, final norm and, unless tied, the output head."""
    width, vocabulary = Axis(config.width, "hidden_size"), Axis(config.vocab_size, "vocab_size", "vocabulary")
    embedding = Parameter("embed.embedding", (vocabulary, width), EMBEDDING)
    norm = Parameter("final_norm.scale", (width,), SCALE)
    head = () if config.tied_embeddings else (Parameter("head.kernel", (width, vocabulary), KERNEL),)
    return (embedding, norm, *head)


def _dense(name: str, inputs: Axis, outputs: Axis, *, bias: bool) -> tuple[Parameter, ...]:
    kernel = Parameter(f"{name}.kernel", (inputs, outputs), KERNEL)
    return (kernel, Parameter(f"{name}.bias", (outputs,), BIAS)) if bias else (kernel,)


def initialize(key: jax.Array, rows: Tree, dtype: str) -> Tree:
    """The arrays of a tree of rows, each drawn by its own initializer."""
    paths, parameters = zip(*leaves_of(rows).items(), strict=True)
    keys = jax.random.split(key, len(paths))
    drawn = (row.initializer(own, row.shape, dtype) for row, own in zip(parameters, keys, strict=True))
    return build_tree(zip(paths, drawn, strict=True))


def build_tree(leaves: Iterable[tuple[str, Any]]) -> Tree:
    """The nested dict of (path, leaf) pairs."""
    tree: Tree = {}
    for path, leaf in leaves:
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict by path; the inverse of `build_tree`."""
    leaves: dict[str, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            leaves |= leaves_of(node, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = node
    return leaves


def layer_name(index: int) -> str:
    """Where the parameters of a layer are, if those of all layers are not stacked."""
    return f"layers_{index}"


def layers_of(params: Mapping[str, Any]) -> Layers:
    """The layers of a transformer's parameters."""
    if "layers" in params:
        return params["layers"]
    return tuple(params[layer_name(i)] for i in range(sum(name.startswith(layer_name(0)[:-1]) for name in params)))


def outer_of(params: Mapping[str, Any]) -> Tree:
    """A transformer's parameters without its layers."""
    return {name: part for name, part in params.items() if not name.startswith("layers")}


def stacked(layers: Layers) -> Tree:
    """The arrays of all layers as one, with the leading axis L; they themselves if they are."""
    return jax.tree.map(lambda *own: jnp.stack(own), *layers) if isinstance(layers, tuple) else layers
