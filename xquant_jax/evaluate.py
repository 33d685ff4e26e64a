"""Accuracy of a cache method: perplexity of a text, seen through the cache.

Protocol "paper" (Tomar et al. 2025, section 4): the text is encoded once without special tokens and cut into windows
that do not overlap; tokens 2 ... N of each are predicted with every cached token quantized, the newest too.
Protocol "streaming": the same windows fed through the real cache, chunk by chunk, window of newest tokens included, as
generation does. Perplexity is exp of the mean negative log-likelihood.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xquant_jax.cache import allocate, flush
from xquant_jax.errors import ConfigError
from xquant_jax.loading import Model
from xquant_jax.methods import CacheConfig
from xquant_jax.model import Transformer

PROTOCOLS = ("paper", "streaming")
CHUNK = 128
"""Tokens fed at once in protocol "streaming"."""


def windows(model: Model, text: str, length: int) -> Int[np.ndarray, "W N"]:
    """The text as windows of `length` tokens; what does not fill one is dropped."""
    if model.tokenizer is None:
        raise ConfigError("evaluating a text needs a tokenizer, and this model has none")
    if length < 2:
        raise ConfigError(f"seq_len={length} predicts nothing; choose 2 or more")
    tokens = np.asarray(model.tokenizer.encode(text, special_tokens=False), np.int32)
    if len(tokens) < length:
        raise ConfigError(f"the text has {len(tokens)} tokens, less than one window of {length}; use a longer text")
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def negative_log_likelihoods(
    model: Model, cache: str | CacheConfig, tokens: Int[np.ndarray, "W N"], protocol: str = "paper", batch: int = 4
) -> Iterator[Float[np.ndarray, " B"]]:
    """Mean negative log-likelihood, in nats per predicted token, of each window; a batch of windows at a time."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol={protocol!r} is not known; choose {' or '.join(PROTOCOLS)}")
    cache_config = CacheConfig.parse(cache)
    factors = cache_config.factors(model)
    score = {"paper": _score_stored, "streaming": _score_streaming}[protocol]
    for start in range(0, len(tokens), batch):
        rows = tokens[start : start + batch]
        full = np.resize(rows, (batch, rows.shape[1]))  # the last batch is filled up, so that nothing compiles anew
        yield np.asarray(score(model.transformer, cache_config, model.params, factors, jnp.asarray(full)))[: len(rows)]


@partial(jax.jit, static_argnames=("transformer", "cache_config"))
def _score_stored(
    transformer: Transformer, cache_config: CacheConfig, params: Any, factors: Any, tokens: Int[Array, "B N"]
) -> Float[Array, " B"]:
    if cache_config.stores_exactly:
        logits: Any = transformer.apply({"params": params}, tokens, method="score")
    else:
        logits = transformer.apply({"params": params}, tokens, cache_config, factors, method="score_stored")
    return _mean_loss(logits[:, :-1], tokens[:, 1:])


def _mean_loss(logits: Float[Array, "B N V"], targets: Int[Array, "B N"]) -> Float[Array, " B"]:
    chosen = jnp.take_along_axis(logits.astype(jnp.float32), targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) - chosen).mean(axis=-1)
