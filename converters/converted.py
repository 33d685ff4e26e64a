"""A converted directory: what `convert` wrote, read back one layer at a time.

This is where its parts lie:

    xquant.json  config.json  tokenizer files
    outer/embed  outer/final_norm  outer/head          one Orbax checkpoint each
    layers/00000  layers/00001  ...
    factors/joint/00000  factors/per_head/00000  factors/kv/00000  ...
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.families import model_config
from converters.manifest import read_manifest
from converters.orbax_store import read_tree
from converters.shards import read_json
from converters.svd import FactorKind, factor_kinds, factor_shapes, require_kind
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import Tree, layer_parameters, leaves_of, outer_parameters


def outer_item(part: str) -> str:
    """Where a part outside the layers lies: `embed`, `final_norm` or `head`."""
    return f"outer/{part}"


def layer_item(index: int) -> str:
    """Where the parameters of a layer lie."""
    return f"layers/{index:05d}"


def factor_item(kind: FactorKind, index: int) -> str:
    """Where the factors of a layer lie."""
    return f"factors/{kind}/{index:05d}"


class ConvertedCheckpoint:
    """The same interface as `HuggingFaceCheckpoint` over what `convert` wrote, and the factors of its layers.

    Every reading method takes `sharding` (see `read_tree`), to read straight to devices instead of to numpy.

    Raises on construction:
        CheckpointError: the directory is damaged, of another version, or its config.json was edited out of
            step.
        ConfigError: the config asks for something that is not supported.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        manifest = read_manifest(self.path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.model_config: ModelConfig = dataclasses.replace(model_config(self.config), dtype=manifest.dtype)
        if manifest.num_layers != self.model_config.num_layers:
            raise CheckpointError(
                f"{self.path} has {manifest.num_layers} layers, but its config.json says "
                f"num_hidden_layers={self.model_config.num_layers}"
            )
        if manifest.factor_kinds != list(factor_kinds(self.model_config)):
            raise CheckpointError(
                f"{self.path} has factors {manifest.factor_kinds}, but a model of its config.json has "
                f"{list(factor_kinds(self.model_config))}; convert the checkpoint again"
            )

    @property
    def factor_kinds(self) -> tuple[FactorKind, ...]:
        """The kinds that `factors` accepts: none where every query head has keys of its own (K = H)."""
        return factor_kinds(self.model_config)

    def layer(self, index: int, sharding: Any = None) -> Tree:
        """The parameters of one layer."""
        shapes = {parameter.path: parameter.shape for parameter in layer_parameters(self.model_config)}
        return self._read(layer_item(index), shapes, sharding)

    def outer(self, parts: Iterable[str] = ("embed", "final_norm", "head"), sharding: Any = None) -> Tree:
        """The parameters outside the layers, of these parts. `sharding` is by part where it is a tree."""
        wanted, tree = set(parts), {}
        for parameter in outer_parameters(self.model_config):
            part, leaf = parameter.path.split(".")
            if part in wanted:
                to = sharding[part] if isinstance(sharding, Mapping) else sharding
                tree[part] = self._read(outer_item(part), {leaf: parameter.shape}, to)
        return tree

    def factors(self, kind: FactorKind, index: int, sharding: Any = None) -> Tree:
        """The SVD factors of one layer, float32."""
        require_kind(kind, self.model_config)
        return self._read(factor_item(kind, index), factor_shapes(kind, self.model_config), sharding)

    def _read(self, item: str, shapes: Mapping[str, tuple[int, ...]], sharding: Any) -> Tree:
        tree = read_tree(self.path / item, sharding)
        found = {path: tuple(np.shape(leaf)) for path, leaf in leaves_of(tree).items()}
        if found != dict(shapes):
            wrong = next(p for p in shapes.keys() | found.keys() if shapes.get(p) != found.get(p))
            raise CheckpointError(
                f"{self.path / item} has {wrong} of shape {found.get(wrong)}, but config.json makes it "
                f"{shapes.get(wrong)}"
            )
        return tree
