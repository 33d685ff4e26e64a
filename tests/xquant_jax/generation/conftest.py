"""What the tests of generation share: the model that ships with the package, its first five layers, and few shapes.

Every cache, number of slots, bucket and capacity has programs of its own, which take seconds to compile. So these tests
have one or two slots, the cache EXACT or the default one, prompts of up to 128 tokens and sequences of up to 255 (one
capacity), unless they are about another.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import random_model
from xquant_jax.config import ModelConfig
from xquant_jax.generation import buckets

EXACT = "bf16,dtype=float32"

STARTS = (
    "def main():",
    "class Stack:\n    def push(self, item):",
    "import os\nimport sys\n",
    "x = [",
    "# The number of items in a list",
)


@pytest.fixture(scope="session")
def demo() -> xq.Model:
    """The model that ships with the package: what it says means something."""
    return xq.load("demo")


@pytest.fixture(scope="session")
def model(demo: xq.Model) -> xq.Model:
    """Its first five layers alone: as many words, a fraction of the work."""
    config = dataclasses.replace(demo.config, num_layers=5, sliding_windows=(None,) * 5)
    layers = jax.tree.map(lambda a: a[:5], demo.params["layers"])
    return dataclasses.replace(demo, transformer=xq.Transformer(config), params={**demo.params, "layers": layers})


@pytest.fixture(autouse=True)
def _one_bucket(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Prompts of up to 128 tokens share a program, but for tests that ask for `own_buckets`."""
    if "own_buckets" not in request.fixturenames:
        monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 128)


@pytest.fixture
def own_buckets() -> None:
    """Prompts are padded as users' are."""


def tiny_model(demo: xq.Model, config: ModelConfig) -> xq.Model:
    """A model with random parameters; of the tokens of `demo` it says the first, which are a character each."""
    random = random_model(config)
    return dataclasses.replace(demo, transformer=random.transformer, params=random.params)


def score(model: xq.Model, tokens: list[int]) -> np.ndarray:
    """Log-probabilities [T, V] after every token, of a forward pass without any cache."""
    padded = np.zeros((1, -len(tokens) % 256 + len(tokens)), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_score(model.transformer, model.params, padded)[0, : len(tokens)])


@partial(jax.jit, static_argnames="transformer")
def _score(transformer: xq.Transformer, params: Any, tokens: Any) -> Any:
    return jax.nn.log_softmax(transformer.apply({"params": params}, tokens, method="score"))
