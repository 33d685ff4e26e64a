"""From a checkpoint on disk to a model in memory."""

import dataclasses
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters import layer_factors, open_checkpoint
from converters.finite import all_finite
from converters.shards import read_json
from pallas_kernels import api
from xquant_jax.config import ModelConfig
from xquant_jax.errors import CheckpointError, ConfigError
from xquant_jax.model import Transformer
from xquant_jax.tokenizer import Tokenizer

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: parameters on the device, and the checkpoint that further factors are read from."""

    transformer: Transformer
    params: Any
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    dtype: str
    checkpoint: Any
    _factors: dict[tuple[str, bool], Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    def layer_params(self) -> dict[str, Any]:
        return self.params["layers"]

    def svd(self, kind: str, *, folded: bool = False) -> dict[str, Any]:
        """SVD factors of all layers, leading axis L: read from a converted checkpoint, computed otherwise.

        `folded`: of the weights with the attention norm's scale multiplied into them; these are always computed.
        """

        def folded_factors(i: int) -> Any:
            layer = self.checkpoint.layer(i)
            norm = np.asarray(layer["attention_norm"]["scale"], np.float32)[:, None]
            folded = {side: {"kernel": norm * layer[side]["kernel"].astype(np.float32)} for side in ("key", "value")}
            kinds: Any = [kind]
            return next(iter(layer_factors(kinds, folded, self.config).values()))

        if (kind, folded) not in self._factors:
            read = folded_factors if folded else partial(self.checkpoint.factors, kind)
            self._factors[kind, folded] = _stack_layers(self.config.num_layers, read, self.dtype)
        return self._factors[kind, folded]


def load(path: str | Path, *, dtype: str | None = None, implementation: str | None = None) -> Model:
    """Loads a converted directory, a Hugging Face directory, or `"demo"`, the model that ships with the package.

    dtype: of parameters and activations; by default the checkpoint's own, but float32 on CPU, where narrower types
        are emulated and several times slower
    implementation: of the kernels, by default the best for the device

    Raises `CheckpointError` for files that are missing or inconsistent, `ConfigError` for a model that is not
    supported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not supported; choose {', '.join(DTYPES)}")
    api.check(implementation)  # raises here, not at the first step that would use it
    directory = Path(str(files("xquant_jax") / "demo")) if str(path) == "demo" else Path(path)
    checkpoint = open_checkpoint(directory)
    config = checkpoint.model_config
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else config.dtype)
    outer = jax.tree.map(jnp.asarray, _cast(checkpoint.outer(), dtype))
    layers = _stack_layers(config.num_layers, checkpoint.layer, dtype)
    tokenizer = directory / "tokenizer.json"
    return Model(
        transformer=Transformer(config, implementation),
        params={**outer, "layers": layers},
        tokenizer=Tokenizer.from_file(tokenizer) if tokenizer.exists() else None,
        stop_ids=_stop_ids(directory, checkpoint.config),
        dtype=dtype,
        checkpoint=checkpoint,
    )


def _stack_layers(num_layers: int, read: Callable[[int], Any], dtype: str) -> Any:
    """Reads layer after layer into stacked device arrays; the host holds one layer at a time."""

    stack = None
    for i in range(num_layers):
        layer = _cast(read(i), dtype)
        if stack is None:
            stack = jax.tree.map(lambda a: jnp.zeros((num_layers, *a.shape), dtype), layer)
        stack = _place(stack, layer, i)
    return stack


@partial(jax.jit, donate_argnames="stack")
def _place(stack: Any, layer: Any, i: Any) -> Any:
    return jax.tree.map(lambda s, a: s.at[i].set(a), stack, layer)


def _cast(tree: Any, dtype: str) -> Any:
    """Numpy arrays in another type; CheckpointError if a number is too large for it."""

    def cast(path: tuple, a: np.ndarray) -> np.ndarray:
        if a.dtype == dtype:
            return a
        with np.errstate(over="ignore"):
            narrow = a.astype(jnp.dtype(dtype))
        if not all_finite(narrow):
            raise CheckpointError(
                f"{jax.tree_util.keystr(path)} has values too large for {dtype}; choose another dtype"
            )
        return narrow

    return jax.tree_util.tree_map_with_path(cast, tree)


def _stop_ids(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: of generation_config.json where there is one, else of config.json."""
    path = directory / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    ids = settings.get("eos_token_id", config.get("eos_token_id"))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"{path}: eos_token_id={ids} is neither a token id nor a list of them")
    return tuple(ids)
