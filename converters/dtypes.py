"""The type that a checkpoint's numbers are read in, and the cast of those that are stored in another.

As in transformers, config.json decides. Where it says nothing, the type is that of the matrices, and float32, which
holds every number of all of them, where they differ; transformers would take the type of the first tensor that it
finds. Vectors (norms, biases) that are float32 in every layer stay so beside narrower matrices: they are few.
"""

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.finite import all_finite
from converters.shards import Tensor
from xquant_jax.errors import CheckpointError, XQuantWarning

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""From safetensors' names of the supported types to ours."""

_PACKAGES = tuple(str(Path(__file__).parents[1] / name) for name in ("converters", "xquant_jax"))


def model_dtype(declared: str | None, matrices: Iterable[Tensor]) -> str:
    """The type of the model's matrices. declared: by config.json, None where it says nothing"""
    stored = {DTYPES[tensor.dtype] for tensor in matrices}
    return declared or (stored.pop() if len(stored) == 1 else "float32")


def wide_vectors(tensors: Iterable[tuple[str, Tensor]]) -> frozenset[str]:
    """The paths of vectors that are float32 in every layer. tensors: each with its path in our parameter tree"""
    vectors = [(path, tensor.dtype) for path, tensor in tensors if not is_matrix(path)]
    return frozenset(path for path, _ in vectors) - {path for path, dtype in vectors if dtype != "F32"}


def is_matrix(path: str) -> bool:
    """Whether the parameter at this path of our tree is a matrix, not a vector."""
    return path.endswith((".kernel", ".embedding"))


def warn_of_casts(directory: Path, others: Collection[Tensor], dtype: str, declared: str | None) -> None:
    """One warning for all the tensors that are of another type than `dtype`, which they are read in."""
    if not others:
        return
    first = next(iter(others))
    reason = "config.json says" if declared else "config.json names no dtype and the tensors differ, so the model is"
    which = "it is" if len(others) == 1 else f"it and {len(others) - 1} more are"
    rounded = f"rounded to it where {dtype} does not hold their values; a wider dtype in config.json keeps them"
    loss = "which is exact" if dtype == "float32" else rounded
    warnings.warn(
        f"{directory}: {first} is {DTYPES[first.dtype]}, but {reason} {dtype}; {which} cast to {dtype}, as by "
        f"transformers where no other is asked for, {loss}",
        XQuantWarning,
        skip_file_prefixes=_PACKAGES,
    )


def cast(values: np.ndarray, tensor: Tensor, dtype: str) -> np.ndarray:
    """The values of a tensor in another type; CheckpointError if one is not finite, before or after."""
    if not all_finite(values):
        raise CheckpointError(f"{tensor} has values that are not finite; the checkpoint is damaged")
    if values.dtype.name == dtype:
        return values
    narrow = unchecked_cast(values, dtype)
    if not all_finite(narrow):
        wider = sorted({DTYPES[tensor.dtype], "float32"})
        raise CheckpointError(
            f"{tensor} has values that are not finite in {dtype}: it is {DTYPES[tensor.dtype]}, and some are too large "
            f"for the {dtype} that config.json says; set its dtype to {' or '.join(wider)}"
        )
    return narrow


def unchecked_cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values in another type; those that are too large for it become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(getattr(ml_dtypes, dtype, dtype), copy=False)
