"""The transformer: embedding, layers, final norm, logits; with a cache or without.

The cache is read inside the loop over layers and written after it: the stacked history enters as a constant plus the
layer's index, and only the new tokens' vectors travel out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from xquant_jax import sharding
from xquant_jax.cache.append import append, new_vectors_spec
from xquant_jax.cache.attend import RunningSums, attend_stored, running_sums_of, with_running_sums
from xquant_jax.cache.methods.base import NewTokens
from xquant_jax.cache.state import Cache
from xquant_jax.config import ModelConfig
from xquant_jax.model import layers
from xquant_jax.numerics import attention
from xquant_jax.numerics.attention import Part
from xquant_jax.parameters import build_tree, initialize, layer_name, layer_parameters, outer_parameters, stacked

NewVectors = tuple[dict[str, Float[Array, "L B T C"]], ...]
"""What is to be stored of new tokens: for each segment vectors by name, as `append` takes them."""


class Transformer(nn.Module):
    """Decoder-only transformer. It owns the parameters and nothing else: the rows of `xquant_jax.parameters`. What it
    does with them is in `model.layers`.

    scan_layers: the layers are one loop of a compiled program, their arrays stacked under `layers` with the leading
        axis L. False: they follow one another, and each has arrays of its own, under `layers_0`, `layers_1` and so on.
        That takes longer to compile, and XLA for GPUs does not copy a layer's arrays out of a stack before every use.
    """

    config: ModelConfig
    scan_layers: bool = True

    def setup(self) -> None:
        c = self.config
        outer = build_tree((row.path, row) for row in outer_parameters(c))
        if self.scan_layers:
            of_layers = self.param("layers", _initialize_layers, c)
        else:
            rows = build_tree((row.path, row) for row in layer_parameters(c))
            names = (layer_name(i) for i in range(c.num_layers))
            of_layers = stacked(tuple(self.param(name, initialize, rows, c.dtype) for name in names))
        self.weights = {part: self.param(part, initialize, rows, c.dtype) for part, rows in outer.items()} | {
            "layers": of_layers
        }

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
        h, cache = self.extend(tokens, cache, method_params, counts)
        last = jnp.take_along_axis(h, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        return layers.logits(self.weights, last, self.config), cache

    def extend(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        method_params: tuple[Any, ...],
        counts: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The same as a call, with the residual stream of every new token behind the last layer instead of logits,
        which are `layers.logits` of it; that of padding means nothing."""
        h, cache, new = self.read(tokens, cache, method_params)
        return h, append(cache, new, counts)

    def verify(
        self, tokens: Int[Array, "B T"], cache: Cache, method_params: tuple[Any, ...]
    ) -> tuple[Float[Array, "B T V"], Cache, NewVectors]:
        """Logits behind each of T tokens that may not stay, as they would be if the tokens came one by one; the cache
        without them; and the vectors to `append` of those that stay.

        As they would be until the window's first block is whole: it would then be quantized.
        """
        h, cache, new = self.read(tokens, cache, method_params, one_by_one=True)
        return layers.logits(self.weights, h, self.config), cache, new

    def read(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        method_params: tuple[Any, ...],
        *,
        one_by_one: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache, NewVectors]:
        """The residual stream of new tokens behind the last layer; the cache without them; and the vectors that it
        stores of them.

        one_by_one: they see each other as the window holds them, not exactly
        """
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])[None]
        h = sharding.constrain(layers.embed(self.weights, tokens), "batch", sharding.tokens_axis(tokens.shape[1]), None)
        start, emitted, running_sums = 0, [], running_sums_of(cache)
        for segment, segment_params in enumerate(map(stacked, method_params)):

            def layer(carry: Any, number: Array, segment=segment, method_params=segment_params, start=start) -> Any:
                h, running_sums = carry
                pick = partial(lax.dynamic_index_in_dim, index=start + number, keepdims=False)
                attend = self._cached(
                    pick, jax.tree.map(pick, method_params), cache, segment, number, running_sums, positions, one_by_one
                )
                h, (new, running_sums) = layers.layer(
                    jax.tree.map(pick, self.weights["layers"]), h, attend, self.config
                )
                return (h, running_sums), new

            count = cache.segments[segment].num_layers
            (h, running_sums), new = self._over_layers(layer, (h, running_sums), np.arange(count))
            start += count
            emitted.append(new)
        return h, with_running_sums(cache, running_sums), tuple(emitted)

    def _cached(
        self,
        pick: Any,
        method_params: Any,
        cache: Cache,
        segment: int,
        number: Array,
        running_sums: RunningSums,
        positions: Array,
        one_by_one: bool,
    ) -> layers.Attend:
        """The attention of a layer to what is stored and to new tokens; it emits what is to be stored of these."""
        c, method = self.config, cache.segments[segment].method
        geometry = layers.geometry(c, positions, pick(layers.sliding_windows(c)))

        def attend(h: Array, x: Array, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            new = method.encode(method_params, NewTokens(h, x, k, v, geometry, c.norm_eps))
            new = sharding.constrain_as(new, new_vectors_spec(cache.partition, q.shape[1]))
            seen, before = geometry, None
            if one_by_one and q.shape[1] > 1:
                types = {name: dtype for name, (_, dtype) in method.window(c).items()}
                seen = dataclasses.replace(geometry, sliding_window=1)
                before = {name: vectors.astype(types[name]) for name, vectors in new.items()}
            own = attention.attend(q, k, v, seen, origin=cache.lengths)
            old, sums = attend_stored(method_params, q, cache, segment, number, running_sums, geometry, c, before)
            return attention.merge(own, old).out, (new, sums)

        return attend

    def implementation_of(self, cache: Cache, method_params: tuple[Any, ...], dtype: str) -> str:
        """What decoding reads this cache's history with: a backend of `pallas_kernels`, or several where layers differ.

        Raises `ConfigError` where a step would: for kernels asked for by name that cannot take a layer's streams.
        """
        c, batch = self.config, len(cache.lengths)
        q = jax.ShapeDtypeStruct((batch, 1, c.num_heads, c.head_dim), dtype)

        def attend(segment: int, method_params: Any, cache: Cache, q: Array) -> Part:
            geometry = layers.geometry(c, cache.lengths[:, None], layers.sliding_windows(c)[0])
            own = jax.tree.map(lambda a: a[0], stacked(method_params))
            return attend_stored(own, q, cache, segment, jnp.int32(0), running_sums_of(cache), geometry, c)[0]

        names: set[str] = set()
        for segment, segment_params in enumerate(method_params):
            with pallas_kernels.recorded() as chosen:
                jax.eval_shape(partial(attend, segment), segment_params, cache, q)
            names |= chosen or {"xla"}
        return ", ".join(sorted(names))

    def score(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of every position, without a cache: for training and for comparison."""
        return layers.logits(self.weights, self.hidden(tokens), self.config)

    def hidden(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream of every position behind the last layer, without a cache."""
        return self._without_cache(tokens, None, lambda **seen: None)[0]

    def observe(
        self, tokens: Int[Array, "B T"], shifts: dict[str, Float[Array, "L B T K d"]]
    ) -> tuple[Float[Array, "B T V"], dict[str, Float[Array, "L B T ..."]]]:
        """`score`, and what the layers' attention is given: `h` before its norm, `x` after it, `key` before RoPE and
        `value`. `shifts` are added to keys and values: for gradients with respect to them."""
        h, seen = self._without_cache(tokens, shifts, dict)
        return layers.logits(self.weights, h, self.config), seen

    def _without_cache(self, tokens: Array, shifts: Any, keep: Callable[..., Any]) -> tuple[Array, Any]:
        c = self.config
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))

        def layer(h: Array, xs: tuple[Any, Array, Any]) -> tuple[Array, Any]:
            params, sliding_window, shift = xs
            geometry = layers.geometry(c, positions, sliding_window)

            def attend(h: Array, x: Array, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                if shift is not None:
                    k, v = k + shift["key"].astype(k.dtype), v + shift["value"].astype(v.dtype)
                part = attention.attend(q, k, v, geometry, origin=positions[:, 0])
                return part.out, keep(h=h, x=x, key=k, value=v)

            return layers.layer(params, h, attend, c)

        h, xs = layers.embed(self.weights, tokens), (self.weights["layers"], layers.sliding_windows(c), shifts)
        return self._over_layers(jax.checkpoint(layer), h, xs)

    def run_layers(
        self, tokens: Int[Array, "B T"], runs: Sequence[tuple[int, Any]], carry: Any
    ) -> Float[Array, "B T D"]:
        """The residual stream of every position behind the last layer, with attention of the caller's own and without
        a cache.

        runs: all layers in order, as runs of layers with the same attention: how many there are, and
            (the layer's number, geometry, carry, h, x, q, k, v) -> attention output [B, T, H, d] and the carry of the
            next layer; h ... v as in `layers.Attend`
        carry: what the first layer is given
        """
        c = self.config
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        h, start = layers.embed(self.weights, tokens), 0
        for count, attend in runs:

            def layer(state: Any, number: Array, attend=attend) -> Any:
                h, carry = state
                pick = partial(lax.dynamic_index_in_dim, index=number, keepdims=False)
                own = partial(attend, number, layers.geometry(c, positions, pick(layers.sliding_windows(c))), carry)
                return layers.layer(jax.tree.map(pick, self.weights["layers"]), h, own, c), None

            (h, carry), _ = self._over_layers(layer, (h, carry), start + np.arange(count))
            start += count
        return h

    def _over_layers(self, layer: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
        """`lax.scan` over the layers, or the same written out: XLA then knows which layer is picked from a stack."""
        if self.scan_layers:
            return lax.scan(layer, carry, xs)
        emitted = []
        for i in range(len(jax.tree.leaves(xs)[0])):
            carry, own = layer(carry, jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), xs))
            emitted.append(own)
        return carry, jax.tree.map(lambda *own: jnp.stack(own), *emitted)


def _initialize_layers(key: Array, config: ModelConfig) -> Any:
    rows = build_tree((row.path, row) for row in layer_parameters(config))
    return jax.vmap(lambda own: initialize(own, rows, config.dtype))(jax.random.split(key, config.num_layers))


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
