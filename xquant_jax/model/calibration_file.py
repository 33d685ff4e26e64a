"""The file beside a model that holds what calibration found: `calibration.safetensors`.

It names the model by a fingerprint of some of its weights, so that another model's is not taken for its own.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from converters.svd import FACTORIZED
from xquant_jax.cache.methods.learned import Directions, Need
from xquant_jax.errors import CheckpointError, ConfigError
from xquant_jax.parameters import Tree, leaves_of

FILE = "calibration.safetensors"
_FORMAT = "xquant-jax calibration 1"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Arrays by `need.name/leaf`, the fingerprint of the model, and where they come from."""

    fingerprint: str
    arrays: dict[str, Float[np.ndarray, "..."]]
    source: dict[str, str]  # need.name -> text and tokens

    def get(self, need: Need) -> dict[str, np.ndarray] | None:
        """What was found for a need, or None."""
        prefix = f"{need.name}/"
        found = {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}
        if isinstance(need, Directions) and found:
            if found["down"].shape[2] < need.rank:
                return None
            found = {"down": found["down"][:, :, : need.rank], "up": found["up"][:, : need.rank]}
        return found or None

    def add(self, need: Need, found: dict[str, np.ndarray], source: str) -> "Calibration":
        """With one more need, or another answer to it."""
        prefix = f"{need.name}/"
        arrays = {name: a for name, a in self.arrays.items() if not name.startswith(prefix)}
        arrays |= {prefix + leaf: np.ascontiguousarray(a, np.float32) for leaf, a in found.items()}
        return dataclasses.replace(self, arrays=arrays, source=self.source | {need.name: source})

    def write(self, path: Path) -> None:
        """Replaces the file as a whole."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint}
        metadata |= {f"source:{name}": text for name, text in self.source.items()}
        with partial.open("wb") as file:  # save_file would leave it readable by its owner only
            file.write(save(self.arrays, metadata))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> "Calibration":
        """Raises `CheckpointError` for a file that is damaged or of something else, `ConfigError` if it is of another
        model."""
        try:
            with safe_open(path, "numpy") as file:
                metadata: dict[str, str] = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; run xquant calibrate again") from error
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} was not written by this version of xquant calibrate; run it again")
        if metadata.get("fingerprint") != fingerprint:
            raise ConfigError(
                f"{path} was found with another model's weights, and its levels and directions do not fit this one; "
                f"run xquant calibrate for this model"
            )
        sources = {key.removeprefix("source:"): text for key, text in metadata.items() if key.startswith("source:")}
        return cls(fingerprint, arrays, sources)


def fingerprint(layer: Callable[[int], Tree], num_layers: int) -> str:
    """Of the attention inputs' norms and the key and value weights in the first and the last layer.

    layer: the parameters of a layer, by its number, as numpy arrays
    """
    digest = hashlib.sha256()
    for index in (0, num_layers - 1):
        leaves = leaves_of(layer(index))
        for array in (leaves[path] for path in FACTORIZED):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()
