"""How likely a model finds tokens when it sees those before them through a cache.

Protocol "paper" (Tomar et al. 2025, arXiv 2508.10395): every cached token is quantized, the newest too. Protocol
"streaming": through the real cache, chunk by chunk, with the window of newest tokens, as generation does; within a
chunk tokens see each other exactly. Both run the method's own code on packed streams. Without a cache, keys and
values are those that the model computes: the 16-bit baseline.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush_when_due
from xquant_jax.cache.methods.base import Method, NewTokens
from xquant_jax.cache.state import allocate
from xquant_jax.cache.store import store_and_read, without_sink
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.model import layers
from xquant_jax.model.transformer import Transformer
from xquant_jax.numerics import attention, rope
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, allocate_blocks

PROTOCOLS = ("paper", "streaming")

CHUNK = 64
"""Tokens fed at once in protocol "streaming": half a block, so that the window is read too."""


LOGITS_AT_ONCE = 2**25
"""Logits that are held at once (4 bytes each): those of all positions are many times as large as the model's layers."""


class Scores(NamedTuple):
    """What a model says of tokens 2 ... N of each sequence.

    loss: the negative log-likelihood, in nats
    greedy: whether the token is the likeliest one
    divergence: Kullback-Leibler divergence from the model that is compared with, in nats
    agrees: whether the likeliest token is the same as that model's
    hidden: the residual stream behind the last layer, to compare others with
    """

    loss: Float[Array, "B n"]
    greedy: Bool[Array, "B n"]
    divergence: Float[Array, "B n"] | None
    agrees: Bool[Array, "B n"] | None
    hidden: Float[Array, "B n D"]


Program = Callable[..., Scores]
"""Tokens [B, N] padded on the right, their lengths [B], and the `hidden` to compare with if the program compares ->
scores; those of padding mean nothing."""


@dataclasses.dataclass
class Scorer:
    """Scores tokens through `cache` (None: without one). Compiles once per shape.

    model: a `Model`, or whatever else has a transformer, params, a source of factors and an implementation
    chunk: tokens fed at once in protocol "streaming"

    Raises `ConfigError` for a protocol or a chunk that there is not.
    """

    model: Any
    cache: CacheConfig | None
    protocol: str = "paper"
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"protocol={self.protocol} is not known; choose {' or '.join(PROTOCOLS)}")
        if self.chunk < 1:
            raise ConfigError(f"chunk={self.chunk} is not possible; choose 1 or more")
        self._method_params = self.cache.method_params(self.model.source) if self.cache else ()
        self._programs: dict[tuple[int, int, bool], Program] = {}

    def program(self, batch: int, length: int, *, compares: bool = False) -> Program:
        """The compiled program for `batch` sequences of up to `length` tokens."""
        if (batch, length, compares) not in self._programs:
            model, implementation = self.model.transformer, self.model.implementation
            if self.cache is None:
                run: Any = partial(_exact, model)
            elif self.protocol == "paper":
                run = partial(hidden_stored, model, cache_config=self.cache, implementation=implementation)
            else:
                chunk = min(self.chunk, length)
                run = partial(_streaming, model, cache_config=self.cache, implementation=implementation, chunk=chunk)
            tokens, lengths = jnp.zeros((batch, length), jnp.int32), jnp.zeros(batch, jnp.int32)
            dtype = self.model.params["embed"]["embedding"].dtype
            hidden = jax.ShapeDtypeStruct((batch, length - 1, model.config.width), dtype)
            exact = (hidden,) if compares else ()

            def score(params: Any, method_params: Any, tokens: Array, lengths: Array, exact: Any = None) -> Scores:
                h = run(params=params, tokens=tokens, method_params=method_params, lengths=lengths)
                return _scores(params, model.config, h[:, :-1], tokens[:, 1:], exact)

            arguments = (self.model.params, self._method_params)
            compiled = jax.jit(score).lower(*arguments, tokens, lengths, *exact).compile()

            def program(tokens: Int[np.ndarray, "B N"], lengths: Int[np.ndarray, " B"], *exact: Any) -> Scores:
                integers = (jnp.asarray(a, jnp.int32) for a in (tokens, lengths))
                return compiled(*arguments, *integers, *map(jnp.asarray, exact))

            self._programs[batch, length, compares] = program
        return self._programs[batch, length, compares]


def _exact(model: Transformer, params: Any, tokens: Array, **others: Any) -> Any:
    return model.apply({"params": params}, tokens, method="hidden")


def _streaming(
    model: Transformer,
    params: Any,
    tokens: Array,
    cache_config: CacheConfig,
    method_params: Any,
    lengths: Array,
    implementation: str | None,
    chunk: int,
) -> Array:
    batch, length = tokens.shape
    steps = -(-length // chunk)
    padded = jnp.pad(tokens, ((0, 0), (0, steps * chunk - length)))

    def step(cache: Any, fed: Array) -> tuple[Any, Array]:
        piece = lax.dynamic_slice_in_dim(padded, fed, chunk, axis=1)
        counts = jnp.clip(lengths - fed, 0, chunk)
        extended: Any = model.apply({"params": params}, piece, cache, method_params, counts, method="extend")
        h, cache = extended
        return flush_when_due(cache, method_params), h

    empty = allocate(
        cache_config, model.config, batch=batch, tokens=length, max_step=chunk, implementation=implementation
    )
    _, h = lax.scan(step, empty, chunk * jnp.arange(steps))
    return jnp.moveaxis(h, 0, 1).reshape(batch, -1, h.shape[-1])[:, :length]


def hidden_stored(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    cache_config: CacheConfig,
    method_params: tuple[Any, ...],
    lengths: Int[Array, " B"],
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """The residual stream behind the last layer with every token, the newest too, seen as the cache stores it:
    protocol "paper".

    Streams are really packed and read back, quantized from vectors that no window has rounded. Behind its `lengths`
    tokens a sequence is filled up to whole blocks with copies of its last token's vectors, so that padding changes no
    group. `method_params` is `CacheConfig.method_params(...)`, `implementation` that of the kernels.
    """
    config, blocks = model.config, -(-tokens.shape[1] // BLOCK)
    filled = jnp.minimum(jnp.arange(blocks * BLOCK)[None], jnp.maximum(lengths, 1)[:, None] - 1)[..., None]
    segments = cache_config.segments(config)
    of_sum = next((spec for method, _ in segments if (spec := method.running_sum(config)) is not None), None)
    running_sum = None if of_sum is None else allocate_blocks(of_sum, (len(tokens), blocks))
    runs = [
        (layers, partial(_attend_to_stored, method, own, filled, config, implementation))
        for (method, layers), own in zip(segments, method_params, strict=True)
    ]
    h: Any = model.apply({"params": params}, tokens, runs, running_sum, method="run_layers")
    return h


def _attend_to_stored(
    method: Method,
    segment_params: Any,
    filled: Int[Array, "B S 1"],
    config: ModelConfig,
    implementation: str | None,
    number: Int[Array, ""],
    geometry: Geometry,
    running_sum: Blocks | None,
    h: Float[Array, "B T D"],
    x: Float[Array, "B T D"],
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
) -> tuple[Float[Array, "B T H d"], Blocks | None]:
    """One layer's attention of tokens to themselves as they are stored, and the running sum with the layer in it.

    filled: which token's vectors stand at each of the S places of whole blocks
    """
    own = jax.tree.map(partial(lax.dynamic_index_in_dim, index=number, keepdims=False), segment_params)
    batch, length = q.shape[:2]
    new = method.encode(own, NewTokens(h, x, k, v, geometry, config.norm_eps))
    whole_blocks = {name: jnp.take_along_axis(a, filled, axis=1) for name, a in new.items()}
    window, specs = without_sink(method, whole_blocks, jnp.ones(batch, bool)), method.streams(config)
    _, vectors, running_sum = store_and_read(method, own, window, running_sum, specs, implementation)
    n = method.sink
    vectors = {
        name: jnp.concatenate([v.astype(q.dtype) for v in (new[name][:, :n], read[:, n:length])], axis=1)
        for name, read in vectors.items()
    }
    k, v = method.rebuild(own, vectors, config)
    if method.keys_rotated:
        q = rope.rotate_heads(q, geometry.positions, geometry.frequencies)
        geometry = dataclasses.replace(geometry, rotated=True)
    return attention.attend(q, k, v, geometry, origin=geometry.positions[:, 0]).out, running_sum


def _scores(
    params: Any,
    config: ModelConfig,
    h: Float[Array, "B n D"],
    targets: Int[Array, "B n"],
    exact: Float[Array, "B n D"] | None,
) -> Scores:
    """Scores of the targets from the residual streams behind the last layer, of as many positions at once as
    `LOGITS_AT_ONCE` allows."""
    batch, count = targets.shape
    some = max(1, min(count, LOGITS_AT_ONCE // (batch * config.vocab_size)))
    pieces = -(-count // some)

    def cut(a: Array) -> Array:
        padded = jnp.pad(a, ((0, 0), (0, pieces * some - count), *((0, 0) for _ in a.shape[2:])))
        return jnp.moveaxis(padded.reshape(batch, pieces, some, *a.shape[2:]), 1, 0)

    def score(piece: Any) -> Any:
        h, targets, exact = piece
        log_q = jax.nn.log_softmax(layers.logits(params, h, config).astype(jnp.float32))
        likeliest = log_q.argmax(axis=-1)
        loss = -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
        if exact is None:
            return loss, likeliest == targets, None, None
        log_p = jax.nn.log_softmax(layers.logits(params, exact, config).astype(jnp.float32))
        divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return loss, likeliest == targets, divergence, likeliest == log_p.argmax(axis=-1)

    scores = lax.map(score, jax.tree.map(cut, (h, targets, exact)))
    loss, greedy, divergence, agrees = jax.tree.map(
        lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, -1)[:, :count], scores
    )
    return Scores(loss, greedy, divergence, agrees, h)
