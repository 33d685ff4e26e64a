"""What the tests share: small random models and the trained ones beside the project."""

import dataclasses
import os
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu is there to compile with; no test runs on another device
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # it asks a cloud's metadata server otherwise
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing touches a TPU: other programs may use libtpu meanwhile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.svd import layer_factors
from xquant_jax.config import ModelConfig
from xquant_jax.model import Transformer
from xquant_jax.rope import Rope

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers, width 32, four query heads on two key/value heads of dimension 8, float32."""
    config = ModelConfig(
        vocab_size=61,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        norm_eps=1e-5,
        rope=Rope(),
        sliding_windows=(None, None),
        dtype="float32",
    )
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A transformer with random parameters; what `CacheConfig.factors` asks a model for."""

    transformer: Transformer
    params: Any

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    def layer_params(self) -> dict[str, Any]:
        return self.params["layers"]

    def svd(self, kind: str, *, folded: bool = False) -> dict[str, Any]:
        layers = [
            jax.tree.map(lambda a, i=i: np.asarray(a[i]), self.layer_params()) for i in range(self.config.num_layers)
        ]
        if folded:
            for layer in layers:
                for side in ("key", "value"):
                    layer[side] = {"kernel": layer["attention_norm"]["scale"][:, None] * layer[side]["kernel"]}
        factors = [layer_factors([kind], layer, self.config)[kind] for layer in layers]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *factors)


def random_model(config: ModelConfig, seed: int = 0) -> RandomModel:
    """Weights, biases and norms all random, large enough that attention matters for the logits."""
    transformer = Transformer(config)
    shapes = jax.eval_shape(
        lambda: transformer.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method="score")["params"]
    )
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "scale":
            values = 1 + 0.2 * rng.standard_normal(leaf.shape)
        elif name == "kernel":
            values = 1.5 * rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-2])
        else:
            values = 0.5 * rng.standard_normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return RandomModel(transformer, jax.tree_util.tree_map_with_path(draw, shapes))


def random_tokens(config: ModelConfig, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained models and texts that may lie beside the project."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder with trained models beside the project")
    return SHARED
