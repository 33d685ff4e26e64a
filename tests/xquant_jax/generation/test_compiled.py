"""What the compiled programs allocate: the cache is updated in place and never copied."""

import jax
import numpy as np
import pytest

from tests.conftest import random_model, tiny_config
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.generation.decode import advance
from xquant_jax.generation.prefill import feed
from xquant_jax.generation.slots import Arrivals, Slots

pytestmark = pytest.mark.optimized

BATCH, CHUNK = 2, 16


@pytest.mark.parametrize("spec", ["bf16", "kivi:2,group=32,rope=post", "xquant-cl:2"])
def test_temporaries_stay_below_a_tenth_of_the_cache(spec: str) -> None:
    """Prefill and decode with a donated cache of 64 k tokens; nothing is allocated but shapes."""
    # XLA inlines the loop over one base layer and copies its history
    layers = 32 if spec.startswith("xquant-cl") else 6
    sizes = {"width": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "num_layers": layers}
    config = tiny_config(**sizes, sliding_windows=(None,) * layers)
    model = random_model(config)
    cache_config = CacheConfig.parse(spec)

    cache = jax.eval_shape(lambda: allocate(cache_config, config, batch=BATCH, tokens=65_536))
    slots, live = Slots.free(BATCH, config.vocab_size, 8), np.ones(BATCH, bool)
    parts = (model.transformer, model.params, cache_config.method_params(model.source), None, slots, cache)
    size = cache_bytes(cache).total
    for lowered in (
        feed.lower(*parts, Arrivals.of([[None]] * BATCH, CHUNK, 8), live, chunk=CHUNK),
        advance.lower(*parts, live, np.int32(64), np.bool_(False)),
    ):
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= size  # the donated cache is the returned one
        assert memory.temp_size_in_bytes < 0.1 * size
