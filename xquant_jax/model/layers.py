"""One transformer layer, and what is before and behind the layers, as pure functions over their parameters.

The arrays of a layer are rows of `xquant_jax.parameters`. How queries meet keys and values, and what is cached, is
passed in as `attend`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from xquant_jax.config import ModelConfig
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.broadcast import along_last
from xquant_jax.sharding import constrain, tokens_axis

Params = Mapping[str, Any]
"""Nested mappings of arrays, as `xquant_jax.parameters` has them; of one layer unless a function says otherwise."""

Attend = Callable[..., tuple[Array, Any]]
"""(h [B, T, D], x [B, T, D], q [B, T, H, d], k [B, T, K, d], v [B, T, K, d]) -> attention output [B, T, H, d] and what
to emit.

h is the layer's attention input before its norm and x after it; q and k are after any QK-norm and before RoPE.
"""

UNLIMITED = 2**30
"""A sliding window that no sequence reaches."""


def layer(
    params: Params, h: Float[Array, "B T D"], attend: Attend, config: ModelConfig
) -> tuple[Float[Array, "B T D"], Any]:
    """RMSNorm, attention, RMSNorm, SwiGLU: what goes to the next layer, and what `attend` emits."""
    attended, emitted = attend(h, *attention_inputs(params, h, config))
    tokens = tokens_axis(h.shape[1])
    output = dense(params["output"], attended.astype(h.dtype).reshape(*h.shape[:2], -1))
    h = constrain(h + output, "batch", tokens, None)
    return constrain(h + mlp(params, h, config), "batch", tokens, None), emitted


def attention_inputs(
    params: Params, h: Float[Array, "B T D"], config: ModelConfig
) -> tuple[Float[Array, "B T D"], Float[Array, "B T H d"], Float[Array, "B T K d"], Float[Array, "B T K d"]]:
    """x, q, k and v, as `Attend` takes them."""
    tokens = tokens_axis(h.shape[1])

    def heads(name: str) -> Float[Array, "B T heads d"]:
        projected = dense(params[name], x).reshape(*x.shape[:2], -1, config.head_dim)
        return constrain(projected, "batch", tokens, "heads", None)

    x = rms_norm(params["attention_norm"], h, config.norm_eps)
    q, k, v = heads("query"), heads("key"), heads("value")
    k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))  # all new queries meet all new keys
    if config.qk_norm:
        q, k = (rms_norm(params[f"{name}_norm"], a, config.norm_eps) for name, a in (("query", q), ("key", k)))
    return x, q, k, v


def mlp(params: Params, h: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T D"]:
    """RMSNorm and SwiGLU."""
    y = rms_norm(params["mlp_norm"], h, config.norm_eps)
    inner = jax.nn.silu(dense(params["gate"], y)) * dense(params["up"], y)
    return dense(params["down"], constrain(inner, "batch", tokens_axis(h.shape[1]), "mlp"))


def dense(params: Params, x: Float[Array, "*rest N"]) -> Float[Array, "*rest M"]:
    """x W, plus b where there is one."""
    out = x @ params["kernel"]
    return out + along_last(params["bias"], out) if "bias" in params else out


def rms_norm(params: Params, x: Float[Array, "*rest N"], eps: float) -> Float[Array, "*rest N"]:
    """x over its root mean square along the last axis, times the scale; computed in float32."""
    wide, scale = x.astype(jnp.float32), along_last(params["scale"], x)
    mean_square = jnp.mean(lax.square(wide), axis=-1, keepdims=True)
    scaled = wide * (lax.rsqrt(mean_square + eps) * scale.astype(jnp.float32))
    return scaled.astype(jnp.promote_types(x.dtype, scale.dtype))


def embed(params: Params, tokens: Int[Array, "*rest"]) -> Float[Array, "*rest D"]:
    """The embeddings of tokens; `params` of the whole model."""
    return jnp.take(params["embed"]["embedding"], tokens, axis=0)


def logits(params: Params, h: Float[Array, "*rest D"], config: ModelConfig) -> Float[Array, "*rest V"]:
    """Final norm and output head, in float32; `params` of the whole model."""
    h = rms_norm(params["final_norm"], h, config.norm_eps)
    if config.tied_embeddings:
        out = jnp.einsum("...d,vd->...v", h, params["embed"]["embedding"], preferred_element_type=jnp.float32)
    else:
        out = jnp.matmul(h, params["head"]["kernel"], preferred_element_type=jnp.float32)
    between = (None,) * (h.ndim - 2)
    out = constrain(out, "batch", *between, "vocabulary")  # else the weight would travel
    return constrain(out, "batch", *between, None)


def sliding_windows(config: ModelConfig) -> Int[Array, " L"]:
    """How many tokens each layer looks back, itself included."""
    return jnp.asarray([window or UNLIMITED for window in config.sliding_windows], jnp.int32)


def geometry(config: ModelConfig, positions: Int[Array, "B T"], sliding_window: Int[Array, ""]) -> Geometry:
    """Where a layer's new tokens stand and how far they look."""
    frequencies = jnp.asarray(config.rope.frequencies(config.head_dim))
    return Geometry(positions, sliding_window, frequencies, config.softmax_scale)
