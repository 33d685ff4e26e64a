"""Bases that what is stored is turned into: exact where nothing is rounded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import random_model, random_tokens, tiny_config
from xquant_jax.cache.config import CacheConfig, Method
from xquant_jax.cache.methods.base import NewTokens
from xquant_jax.model import layers
from xquant_jax.numerics import attention


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        *(({}, spec) for spec in ("xquant:4,rotate=true", "xquant:4,basis=joint", "xquant:4,rotate=false")),
        *(({}, spec) for spec in ("xquant-cl:2", "xquant-cl:2,predict=latent", "xquant-cl:2,rotate=false")),
        ({"width": 12, "head_dim": 16}, "xquant:4,rotate=true"),  # fewer directions than a head's dimension
        ({"num_kv_heads": 4}, "xquant:4"),
        ({"num_kv_heads": 4, "width": 24}, "xquant-cl:2,input=unit_norm"),  # groups of 24: no power of two
    ],
)
def test_bases_change_nothing_where_nothing_is_rounded(changes: dict, spec: str) -> None:
    """Logits of keys and values that are rebuilt from what is stored, in float32, are those of the model."""
    model = random_model(tiny_config(qkv_bias=True, **changes))
    config, tokens = model.config, jnp.asarray(random_tokens(model.config, 2, 40))
    cache = CacheConfig.parse(f"{spec},first=1@4" if "cl" in spec else spec)

    def run(method: Method, params: Any) -> Any:
        def attend(number, geometry, carry, h, x, q, k, v) -> Any:
            own = jax.tree.map(lambda a: a[number], params)
            stored = method.encode(own, NewTokens(h, x, k, v, geometry, config.norm_eps))
            k, v = method.rebuild(own, stored, config)
            return attention.attend(q, k, v, geometry, origin=geometry.positions[:, 0]).out, carry

        return attend

    segments, params = cache.segments(config), cache.method_params(model.source)
    runs = [(count, run(method, own)) for (method, count), own in zip(segments, params, strict=True)]
    h = model.transformer.apply({"params": model.params}, tokens, runs, None, method="run_layers")
    expected = model.transformer.apply({"params": model.params}, tokens, method="hidden")
    logits, exact = (np.asarray(layers.logits(model.params, a, config)) for a in (h, expected))
    np.testing.assert_allclose(logits, exact, atol=1e-5 * np.ptp(exact))
