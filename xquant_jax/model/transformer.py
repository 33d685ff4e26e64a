"""The transformer: embedding, layers under `lax.scan`, final norm, logits; with a cache or without.

The cache is read inside the layer scan and written after it: the stacked history enters as a constant plus the
layer's index, and only the new tokens' vectors travel out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from xquant_jax import sharding
from xquant_jax.cache.append import append, new_vectors_spec
from xquant_jax.cache.attend import LayerCache, attend_stored
from xquant_jax.cache.methods.base import NewTokens
from xquant_jax.cache.state import Cache, Segment
from xquant_jax.config import ModelConfig
from xquant_jax.model.layers import Block
from xquant_jax.numerics import attention
from xquant_jax.numerics.attention import Geometry, Part

UNLIMITED = 2**30
"""A sliding window that no sequence reaches."""


class Transformer(nn.Module):
    """Decoder-only transformer; owns parameters only. The parameters of all layers are stacked, leading axis L."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.width, param_dtype=c.dtype)
        self.layers = self.param("layers", self._init_layers)
        self.final_norm = nn.RMSNorm(epsilon=c.norm_eps, param_dtype=c.dtype)
        if not c.tied_embeddings:
            wide = partial(lax.dot_general, preferred_element_type=jnp.float32)
            self.head = nn.Dense(c.vocab_size, use_bias=False, param_dtype=c.dtype, dot_general=wide)

    def _init_layers(self, rng: Array) -> Any:
        c = self.config

        def init(key: Array) -> Any:
            h = jnp.zeros((1, 1, c.width), c.dtype)
            return Block(c, parent=None).init(key, h, lambda h, x, q, k, v: (q, None))["params"]

        return jax.vmap(init)(jax.random.split(rng, c.num_layers))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        method_params: tuple[Any, ...],
        counts: Int[Array, " B"],
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of each sequence's last new token, and the cache with the new tokens appended.

        The first `counts` of the T tokens of each sequence are new, the rest is padding: neither attended to nor
        stored. They see everything stored, and each other exactly. `method_params` is `CacheConfig.method_params(...)`.
        The caller makes sure that there is room (`check_room`) and flushes (`flush`, `flush_when_due`).
        """
        h, cache = self._extend(tokens, cache, method_params, counts)
        last = jnp.take_along_axis(h, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        return self._logits(last), cache

    def extend(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        method_params: tuple[Any, ...],
        counts: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """The same as a call, with the logits of every new token; those of padding mean nothing."""
        h, cache = self._extend(tokens, cache, method_params, counts)
        return self._logits(h), cache

    def _extend(
        self, tokens: Array, cache: Cache, method_params: tuple[Any, ...], counts: Array
    ) -> tuple[Array, Cache]:
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        h = sharding.constrain(self.embed(tokens), "batch", sharding.tokens_axis(tokens.shape[1]), None)
        start, emitted, running_sum = 0, [], cache.running_sum
        for segment, segment_params in zip(cache.segments, method_params, strict=True):

            def layer(carry: Any, number: Array, segment=segment, method_params=segment_params, start=start) -> Any:
                h, running_sum = carry
                pick = partial(lax.dynamic_index_in_dim, index=start + number, keepdims=False)
                layer_cache = LayerCache.of(cache, segment, number, running_sum)
                h, (new, running_sum) = self._cached_layer(
                    h, pick, jax.tree.map(pick, method_params), layer_cache, cache, positions
                )
                return (h, running_sum), new

            (h, running_sum), new = lax.scan(layer, (h, running_sum), jnp.arange(segment.num_layers))
            start += segment.num_layers
            emitted.append(new)
        return h, append(dataclasses.replace(cache, running_sum=running_sum), tuple(emitted), counts)

    def _cached_layer(
        self, h: Array, pick: Any, method_params: Any, layer_cache: LayerCache, cache: Cache, positions: Array
    ) -> tuple[Array, tuple[dict[str, Array], Any]]:
        c, method = self.config, layer_cache.segment.method
        geometry = self._geometry(positions, pick(self._sliding_windows()))

        def attend(h: Array, x: Array, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            own = attention.attend(q, k, v, geometry, origin=cache.lengths, count=q.shape[1])
            old, running_sum = attend_stored(method_params, q, layer_cache, geometry, c, cache)
            new = method.encode(method_params, NewTokens(h, x, k, v, geometry, c.norm_eps))
            new = sharding.constrain_as(new, new_vectors_spec(cache.partition, q.shape[1]))
            return attention.merge(own, old).out, (new, running_sum)

        return self._block(jax.tree.map(pick, self.layers), h, attend)

    def implementation_of(self, cache: Cache, method_params: tuple[Any, ...], dtype: str) -> str:
        """What decoding reads this cache's history with: a backend of `pallas_kernels`, or several where layers differ.

        Raises `ConfigError` where a step would: for kernels asked for by name that cannot take a layer's streams.
        """
        c, batch = self.config, len(cache.lengths)
        q = jax.ShapeDtypeStruct((batch, 1, c.num_heads, c.head_dim), dtype)

        def attend(segment: Segment, method_params: Any, cache: Cache, q: Array) -> Part:
            geometry = self._geometry(cache.lengths[:, None], self._sliding_windows()[0])
            layer_cache = LayerCache.of(cache, segment, jnp.int32(0), cache.running_sum)
            own = jax.tree.map(lambda a: a[0], method_params)
            return attend_stored(own, q, layer_cache, geometry, c, cache)[0]

        names: set[str] = set()
        for segment, segment_params in zip(cache.segments, method_params, strict=True):
            with pallas_kernels.recorded() as chosen:
                jax.eval_shape(attend, segment, segment_params, cache, q)
            names |= chosen or {"xla"}
        return ", ".join(sorted(names))

    def score(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of every position, without a cache: for training and for comparison."""
        return self._without_cache(tokens, None, lambda **seen: None)[0]

    def observe(
        self, tokens: Int[Array, "B T"], shifts: dict[str, Float[Array, "L B T K d"]]
    ) -> tuple[Float[Array, "B T V"], dict[str, Float[Array, "L B T ..."]]]:
        """`score`, and what the layers' attention is given: `h` before its norm, `x` after it, `key` before RoPE and
        `value`. `shifts` are added to keys and values: for gradients with respect to them."""
        return self._without_cache(tokens, shifts, dict)

    def _without_cache(self, tokens: Array, shifts: Any, keep: Callable[..., Any]) -> tuple[Array, Any]:
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))

        def layer(h: Array, xs: tuple[Any, Array, Any]) -> tuple[Array, Any]:
            params, sliding_window, shift = xs
            geometry = self._geometry(positions, sliding_window)

            def attend(h: Array, x: Array, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                if shift is not None:
                    k, v = k + shift["key"].astype(k.dtype), v + shift["value"].astype(v.dtype)
                part = attention.attend(q, k, v, geometry, origin=positions[:, 0], count=length)
                return part.out, keep(h=h, x=x, key=k, value=v)

            return self._block(params, h, attend)

        h, seen = lax.scan(jax.checkpoint(layer), self.embed(tokens), (self.layers, self._sliding_windows(), shifts))
        return self._logits(h), seen

    def run_layers(
        self, tokens: Int[Array, "B T"], runs: Sequence[tuple[int, Any]], carry: Any
    ) -> Float[Array, "B T V"]:
        """Logits of every position, with attention of the caller's own and without a cache.

        runs: all layers in order, as runs of layers with the same attention: how many there are, and
            (the layer's number, geometry, carry, h, x, q, k, v) -> attention output [B, T, H, d] and the carry of the
            next layer; h ... v as in `layers.Attend`
        carry: what the first layer is given
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        h, start = self.embed(tokens), 0
        for count, attend in runs:

            def layer(state: Any, number: Array, attend=attend) -> Any:
                h, carry = state
                pick = partial(lax.dynamic_index_in_dim, index=number, keepdims=False)
                geometry = self._geometry(positions, pick(self._sliding_windows()))
                return self._block(jax.tree.map(pick, self.layers), h, partial(attend, number, geometry, carry)), None

            (h, carry), _ = lax.scan(layer, (h, carry), start + jnp.arange(count))
            start += count
        return self._logits(h)

    def _block(self, params: Any, h: Array, attend: Any) -> tuple[Array, Any]:
        return Block(self.config, parent=None).apply({"params": params}, h, attend)

    def _geometry(self, positions: Array, sliding_window: Array) -> Geometry:
        c = self.config
        return Geometry(positions, sliding_window, jnp.asarray(c.rope.frequencies(c.head_dim)), c.softmax_scale)

    def _sliding_windows(self) -> Int[Array, " L"]:
        return jnp.asarray([window or UNLIMITED for window in self.config.sliding_windows], jnp.int32)

    def _logits(self, h: Float[Array, "*rest D"]) -> Float[Array, "*rest V"]:
        h = self.final_norm(h)
        if not self.config.tied_embeddings:
            logits = self.head(h)
        else:
            logits = jnp.einsum("...d,vd->...v", h, self.embed.embedding, preferred_element_type=jnp.float32)
        between = (None,) * (h.ndim - 2)
        logits = sharding.constrain(logits, "batch", *between, "vocabulary")  # else the weight would travel
        return sharding.constrain(logits, "batch", *between, None)


def forward(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    cache: Cache,
    method_params: tuple[Any, ...],
    counts: Int[Array, " B"],
) -> tuple[Float[Array, "B V"], Cache]:
    """`Transformer.__call__` as a pure function: logits of each sequence's last new token, and the cache with the new
    tokens appended but not flushed."""
    logits_and_cache: Any = model.apply({"params": params}, tokens, cache, method_params, counts)
    return logits_and_cache
