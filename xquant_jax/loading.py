"""From a checkpoint on disk to a model in memory."""

import dataclasses
import functools
import json
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters import layer_factors, open_checkpoint
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
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

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    def layer_params(self) -> dict[str, Any]:
        return self.params["layers"]

    def svd(self, kind: str, *, folded: bool = False) -> dict[str, Any]:
        """SVD factors of all layers, leading axis L: read from a converted checkpoint, computed otherwise.

        `folded`: of the weights with the attention norm's scale multiplied into them; these are always computed.
        """
        return self._svd(kind, folded)

    @functools.cached_property
    def _svd(self) -> Callable[[str, bool], dict[str, Any]]:
        def read(kind: str, folded: bool, i: int) -> Any:
            if not folded:
                return self.checkpoint.factors(kind, i)
            layer = self.checkpoint.layer(i)
            norm = np.asarray(layer["attention_norm"]["scale"], np.float32)[:, None]
            sides = {side: {"kernel": norm * np.asarray(layer[side]["kernel"], np.float32)} for side in ("key", "value")}
            return layer_factors([kind], sides, self.config)[kind]

        return functools.cache(
            lambda kind, folded: _stack_layers(self.config.num_layers, partial(read, kind, folded), self.dtype)
        )


def load(path: str | Path, *, dtype: str | None = None, implementation: str | None = None) -> Model:
    """Loads a converted directory, a Hugging Face directory, or `"demo"`, the model that ships with the package.

    dtype: of parameters and activations, by default the checkpoint's own
    implementation: of the kernels, by default the best for the device

    Raises `CheckpointError` for files that are missing or inconsistent, `ConfigError` for a model that is not
    supported.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not supported; choose {', '.join(DTYPES)}")
    directory = Path(str(files("xquant_jax") / "demo")) if str(path) == "demo" else Path(path)
    checkpoint = open_checkpoint(directory)
    config = checkpoint.model_config
    dtype = dtype or config.dtype
    outer = jax.tree.map(lambda a: jnp.asarray(np.asarray(a).astype(jnp.dtype(dtype))), checkpoint.outer())
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

    @partial(jax.jit, donate_argnums=0)
    def place(stack: Any, layer: Any, i: Any) -> Any:
        return jax.tree.map(lambda s, a: s.at[i].set(a.astype(s.dtype)), stack, layer)

    stack = None
    for i in range(num_layers):
        layer = read(i)
        if stack is None:
            stack = jax.tree.map(lambda a: jnp.zeros((num_layers, *a.shape), dtype), layer)
        stack = place(stack, layer, i)
    return stack


def _stop_ids(directory: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: of generation_config.json where there is one, else of config.json."""
    generation = directory / "generation_config.json"
    settings = json.loads(generation.read_text()) if generation.exists() else {}
    ids = settings.get("eos_token_id", config.get("eos_token_id"))
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
