"""The conversion: a Hugging Face directory becomes a directory of Orbax checkpoints with all SVD factors.

One layer is in memory at a time. Everything that headers can tell is checked before the first byte is
written, and the directory appears only when it is complete.
"""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.converted import factor_item, layer_item, outer_item
from converters.files import copied_files
from converters.hub import local_directory
from converters.huggingface import HuggingFaceCheckpoint
from converters.manifest import MANIFEST, Manifest, bytes_on_disk
from converters.orbax_store import write_tree, writing
from converters.progress import steps
from converters.staging import require_free, staged
from converters.svd import factor_kinds, factor_shapes, layer_factors
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CheckpointError
from xquant_jax.parameters import Tree, layer_parameters, outer_parameters

_ITEM_BYTES = 64 << 10  # what Orbax adds to a tree: a dozen files and directories, mostly of one 4 KB block


def convert(source_dir: str | Path, out_dir: str | Path, *, progress: bool = True) -> Path:
    """Converts the checkpoint in `source_dir` to the new directory `out_dir`, and returns its path.

    The weights keep their bits unless they are of another type than the model (`converters.dtypes`); kernels become
    [in, out]. Factors of all kinds are added for models with fewer key/value heads than query heads. Files of the
    tokenizer are copied if there are any.

    Args:
        source_dir: a Hugging Face directory: config.json and safetensors files; or a string that names a model of
            the Hub (see `local_directory`).
        out_dir: must not exist or be empty. On any failure or interrupt nothing is left of it; a killed
            process leaves a hidden `.{name}.partial-*` beside it, which the next conversion to `out_dir`
            removes.
        progress: whether to show the layers done, on stderr.

    Raises:
        CheckpointError: the source is missing, damaged, cannot be downloaded or does not fit its config;
            `out_dir` is not empty or lies in the source; the disk has too little space or cannot be written.
        ConfigError: the model is not supported.
    """
    source, out = local_directory(source_dir).resolve(), Path(out_dir).resolve()
    if (source / MANIFEST).exists():
        raise CheckpointError(f"{source} is converted already")
    if out.is_relative_to(source):
        raise CheckpointError(f"{out} lies in the source {source}; choose a directory outside of it")
    require_free(out)
    checkpoint = HuggingFaceCheckpoint(source)
    copied = copied_files(source)
    with staged(out) as partial:
        needed = converted_bytes(checkpoint.model_config) + sum(file.stat().st_size for file in copied)
        _require_space(partial, needed)
        items = _write_items(checkpoint, partial, out, progress)
        with writing(out):
            for file in copied:
                target = partial / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
            _manifest(checkpoint, items).write(partial)
    return out


def _write_items(checkpoint: HuggingFaceCheckpoint, partial: Path, out: Path, progress: bool) -> dict[str, int]:
    """Writes all trees of what will be `out` to `partial`, and returns their bytes on disk."""
    config = checkpoint.model_config
    items: dict[str, int] = {}

    def write(item: str, tree: Tree) -> None:
        with writing(out):
            write_tree(partial / item, tree)
        items[item] = bytes_on_disk(partial / item)

    with steps(config.num_layers + 1, shown=progress) as done:
        for parameter in outer_parameters(config):  # one at a time: they may be the largest of all
            part = parameter.path.split(".")[0]
            write(outer_item(part), checkpoint.outer([part])[part])
        done("embedding and head")
        for index in range(config.num_layers):
            layer = checkpoint.layer(index)
            write(layer_item(index), layer)
            for kind, factors in layer_factors(checkpoint.factor_kinds, layer, config).items():
                write(factor_item(kind, index), factors)
            done(f"layer {index}")
    return items


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"{directory.parent} has {free / 1e9:.2f} GB free, but the converted checkpoint takes "
            f"{needed / 1e9:.2f} GB; free some space or choose another disk"
        )


def converted_bytes(config: ModelConfig) -> int:
    """How many bytes a converted checkpoint takes at most, without the files that are copied."""
    size = np.dtype(getattr(ml_dtypes, config.dtype, config.dtype)).itemsize
    kinds = factor_kinds(config)
    layer = sum(size * int(np.prod(parameter.shape)) for parameter in layer_parameters(config))
    factors = sum(4 * int(np.prod(shape)) for kind in kinds for shape in factor_shapes(kind, config).values())
    outer = sum(size * int(np.prod(parameter.shape)) for parameter in outer_parameters(config))
    return outer + config.num_layers * (layer + factors + (1 + len(kinds)) * _ITEM_BYTES) + 4 * _ITEM_BYTES


def _manifest(checkpoint: HuggingFaceCheckpoint, items: dict[str, int]) -> Manifest:
    return Manifest(
        num_layers=checkpoint.model_config.num_layers,
        dtype=checkpoint.model_config.dtype,
        factor_kinds=list(checkpoint.factor_kinds),
        items=items,
        source={
            name: {"file": tensor.file.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in checkpoint.source_tensors.items()
        },
    )
