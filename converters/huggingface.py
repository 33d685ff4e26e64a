"""A Hugging Face checkpoint directory: config.json and safetensors files, read one layer at a time.

Opening reads and checks headers only, so everything that can be wrong with names, shapes and types is found
at once. Numbers are checked when they are read.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.dtypes import DTYPES, cast, is_matrix, model_dtype, unchecked_cast, warn_of_casts, wide_vectors
from converters.families import declared_dtype, family_of, model_config
from converters.shards import Tensor, read_headers, read_json
from converters.svd import FactorKind, factor_kinds
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import Parameter, Tree, build_tree, layer_parameters, leaves_of, outer_parameters

_HARMLESS = (".rotary_emb.inv_freq",)  # a constant that old versions of transformers stored


class HuggingFaceCheckpoint:
    """The weights of a Hugging Face directory in our parameter tree, as numpy arrays.

    Kernels are views of [in, out]; nothing stays in memory between two calls. `layer` and `outer` take `sharding`, a
    tree like theirs, to read straight to devices instead. What is stored in another type than the model's is cast when
    it is read (see `converters.dtypes`); opening such a checkpoint warns of it.

    Raises on construction:
        CheckpointError: config.json or a shard is missing or unreadable; a tensor is missing, unexpected, of
            a shape that does not fit the config, or of an unsupported type. Names the file and the tensor.
        ConfigError: the config asks for something that is not supported.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory; download the model first")
        if not (self.path / "config.json").exists():
            raise CheckpointError(f"{self.path} has no config.json")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        declared = model_config(self.config)
        tensors = read_headers(self.path)
        self._names = _Names(self.config, bare="embed_tokens.weight" in tensors)
        self._tensors, self._tied_head = self._matched(declared, tensors)
        self._wide = wide_vectors((path, tensor) for (path, _), tensor in self._tensors.items())
        self.model_config: ModelConfig = dataclasses.replace(declared, dtype=self._chosen_dtype())

    @property
    def factor_kinds(self) -> tuple[FactorKind, ...]:
        """The kinds of factors that a model has: none where every query head has keys of its own (K = H)."""
        return factor_kinds(self.model_config)

    @cached_property
    def source_tensors(self) -> dict[str, Tensor]:
        """The tensors that make up the model, by their name in the files."""
        return {tensor.name: tensor for tensor in self._tensors.values()}

    def layer(self, index: int, sharding: Any = None) -> Tree:
        """The parameters of one layer. CheckpointError if a value is not finite."""
        return self._tree(layer_parameters(self.model_config), index, sharding)

    def outer(self, parts: Iterable[str] = ("embed", "final_norm", "head"), sharding: Any = None) -> Tree:
        """The parameters outside the layers, of these parts. CheckpointError if a value is not finite."""
        wanted = set(parts)
        if self._tied_head is not None and "embed" in wanted:
            self._require_tied(self._tied_head)
        return self._tree(
            [p for p in outer_parameters(self.model_config) if p.path.split(".")[0] in wanted], None, sharding
        )

    def _tree(self, parameters: Iterable[Parameter], layer: int | None, sharding: Any) -> Tree:
        if sharding is None:
            return build_tree((parameter.path, self._read(parameter, layer)) for parameter in parameters)
        to = leaves_of(sharding)
        return build_tree((p.path, self._read_shards(p, layer, to[p.path])) for p in parameters)

    def _read(self, parameter: Parameter, layer: int | None) -> np.ndarray:
        tensor = self._tensors[parameter.path, layer]
        values = cast(tensor.read(), tensor, self._dtype_of(parameter.path))
        return values.T if parameter.is_kernel else values

    def _read_shards(self, parameter: Parameter, layer: int | None, sharding: jax.sharding.Sharding) -> jax.Array:
        """Straight to devices; a process reads the parts that its own devices hold, each once."""
        tensor, parts = self._tensors[parameter.path, layer], {}

        def part(index: Any) -> np.ndarray:
            key = str(index)
            if key not in parts:
                stored = index[::-1] if parameter.is_kernel else index
                values = cast(tensor.read_part(stored), tensor, self._dtype_of(parameter.path))
                parts[key] = values.T if parameter.is_kernel else values
            return parts[key]

        return jax.make_array_from_callback(parameter.shape, sharding, part)

    def _matched(
        self, config: ModelConfig, tensors: dict[str, Tensor]
    ) -> tuple[dict[tuple[str, int | None], Tensor], Tensor | None]:
        """The tensor of every parameter, and a head beside tied embeddings; checks names and shapes."""
        matched: dict[tuple[str, int | None], Tensor] = {}
        for parameter, layer in _all_parameters(config):
            name = self._names.of(parameter.path, layer)
            if name not in tensors:
                raise CheckpointError(f"{self.path} has no tensor {name}, which its config.json requires")
            _check(tensors[name], parameter)
            matched[parameter.path, layer] = tensors[name]

        left = tensors.keys() - {tensor.name for tensor in matched.values()}
        head_name = self._names.of("head.kernel", None)
        head = tensors[head_name] if config.tied_embeddings and head_name in left else None
        if head is not None:
            untied = outer_parameters(dataclasses.replace(config, tied_embeddings=False))
            _check(head, next(parameter for parameter in untied if parameter.path == "head.kernel"))
        unexpected = sorted(name for name in left if not f".{name}".endswith(_HARMLESS) and name != head_name)
        if unexpected:
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise CheckpointError(f"{tensors[unexpected[0]]}{more}: a model of this config.json has no such tensor")
        return matched, head

    def _chosen_dtype(self) -> str:
        """The model's type; warns of tensors that are of another."""
        declared = declared_dtype(self.config)
        dtype = model_dtype(declared, (t for (path, _), t in self._tensors.items() if is_matrix(path)))
        others = [t for (path, _), t in self._tensors.items() if path not in self._wide and DTYPES[t.dtype] != dtype]
        if self._tied_head is not None and DTYPES[self._tied_head.dtype] != dtype:
            others.append(self._tied_head)
        warn_of_casts(self.path, others, dtype, declared)
        return dtype

    def _dtype_of(self, path: str) -> str:
        """The type that a parameter is read in."""
        return "float32" if path in self._wide else self.model_config.dtype

    def _require_tied(self, head: Tensor) -> None:
        """CheckpointError unless the head, as it is read, is the embedding."""
        embedding = self._tensors["embed.embedding", None]
        rows = max(1, (1 << 24) // embedding.shape[1])
        for start in range(0, embedding.shape[0], rows):
            ours, theirs = (
                unchecked_cast(tensor.read_rows(start, start + rows), self.model_config.dtype)
                for tensor in (head, embedding)
            )
            if not np.array_equal(ours, theirs, equal_nan=False):
                raise CheckpointError(
                    f"{head} differs from {embedding.name}, but config.json ties them; "
                    f"set tie_word_embeddings to false to use both"
                )


class _Names:
    """Hugging Face's names of our parameters; `bare` where the files leave out the leading `model.`."""

    def __init__(self, config: dict[str, Any], bare: bool) -> None:
        self._family, self._bare = family_of(config), bare

    def of(self, path: str, layer: int | None) -> str:
        if layer is None:
            name = self._family.outer_names[path]
        else:
            name = f"model.layers.{layer}.{self._family.layer_names[path]}"
        return name.removeprefix("model.") if self._bare else name


def _all_parameters(config: ModelConfig) -> Iterator[tuple[Parameter, int | None]]:
    yield from ((parameter, None) for parameter in outer_parameters(config))
    for layer in range(config.num_layers):
        yield from ((parameter, layer) for parameter in layer_parameters(config))


def _check(tensor: Tensor, parameter: Parameter) -> None:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{tensor} is {tensor.dtype}; supported: {', '.join(DTYPES)}")
    axes = parameter.axes[::-1] if parameter.is_kernel else parameter.axes  # stored as [out, in]
    if tensor.shape != tuple(axis.size for axis in axes):
        raise CheckpointError(
            f"{tensor} has shape {list(tensor.shape)}, but config.json makes it {[axis.size for axis in axes]} "
            f"({', '.join(axis.fields for axis in axes)})"
        )
