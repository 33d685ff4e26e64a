"""The models that the tests of generation share: the one that ships with the package, and its first five layers."""

import dataclasses

import jax
import pytest

import xquant_jax as xq

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
