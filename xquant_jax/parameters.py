"""The parameter tree of a model: which arrays a layer and the outer part have, and which shape each must
have.

Trees are nested dicts of arrays. A path such as `query.kernel` names a leaf; kernels are [in, out].
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from xquant_jax.config import ModelConfig

Tree = dict[str, Any]  # nested dicts of arrays


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the tree."""

    path: str
    shape: tuple[int, ...]
    fields: str  # the fields of config.json that fix the shape, for error messages

    @property
    def is_kernel(self) -> bool:
        """Whether it is a matrix that Hugging Face stores transposed, as [out, in]."""
        return self.path.endswith(".kernel")


def layer_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The leaves of one layer; all layers have the same."""
    d = config.head_dim
    width = (config.width, "hidden_size")
    queries = (config.num_heads * d, "num_attention_heads * head_dim")
    keys = (config.kv_width, "num_key_value_heads * head_dim")
    mlp = (config.mlp_width, "intermediate_size")
    head = (d, "head_dim")
    matrices = (
        ("query", width, queries, config.qkv_bias),
        ("key", width, keys, config.qkv_bias),
        ("value", width, keys, config.qkv_bias),
        ("output", queries, width, config.output_bias),
        ("gate", width, mlp, config.mlp_bias),
        ("up", width, mlp, config.mlp_bias),
        ("down", mlp, width, config.mlp_bias),
    )
    parameters = [_parameter("attention_norm.scale", width), _parameter("mlp_norm.scale", width)]
    for name, inputs, outputs, bias in matrices:
        parameters.append(_parameter(f"{name}.kernel", inputs, outputs))
        if bias:
            parameters.append(_parameter(f"{name}.bias", outputs))
    if config.qk_norm:
        parameters += [_parameter("query_norm.scale", head), _parameter("key_norm.scale", head)]
    return tuple(parameters)


def outer_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """The leaves outside the layers: embedding, final norm and, unless tied, the output head."""
    width, vocabulary = (config.width, "hidden_size"), (config.vocab_size, "vocab_size")
    parameters = [_parameter("embed.embedding", vocabulary, width), _parameter("final_norm.scale", width)]
    if not config.tied_embeddings:
        parameters.append(_parameter("head.kernel", width, vocabulary))
    return tuple(parameters)


def _parameter(path: str, *axes: tuple[int, str]) -> Parameter:
    return Parameter(path, tuple(size for size, _ in axes), ", ".join(field for _, field in axes))


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
