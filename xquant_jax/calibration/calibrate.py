"""Finds on a text what cache methods need: levels of keys and values, principal directions of latents, and how they are
predicted from those of the layer below.

The text goes through the model without a cache, window by window. Of keys and values a histogram is kept, weighted by
the squared gradient of the loss (KVQuant, arXiv 2401.18079, section 3.3, equation 2), of latents the second moments.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xquant_jax import sharding
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.cache.methods.keys_values import flat
from xquant_jax.cache.methods.latents import latent_basis, prediction
from xquant_jax.cache.methods.learned import Codebooks, Directions, Need, Prediction
from xquant_jax.cache.methods.xquant import unit_norm
from xquant_jax.calibration.levels import BINS, levels
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import StreamSpec, as_blocks, normalize

FIRST = 4
"""Tokens at the start of a window that predictions are not made for: they are kept exactly, and unlike all others."""

RIDGE = 1e-4
"""What is added to the second moments of a latent, relative to their mean, so that directions hardly seen in the text
are predicted as the weights have it."""


def needs_of(caches: Sequence[str | CacheConfig], source: FactorSource) -> tuple[Need, ...]:
    """What these caches need to be found. Raises `ConfigError` if one of them needs nothing."""
    needs: list[Need] = []
    for spec in caches:
        own = [n for method, _ in CacheConfig.parse(spec).segments(source.config) for n in method.needs(source.config)]
        if not own:
            raise ConfigError(f"cache {spec} needs no calibration; leave it out")
        needs += own
    return tuple(dict.fromkeys(needs))


def calibrate(
    model: Any, windows: Iterable[Int[np.ndarray, " N"]], needs: Sequence[Need]
) -> list[dict[str, np.ndarray]]:
    """What each need gets, from windows of tokens of one length.

    model: a `Model`, or whatever else has a transformer, params, a mesh and a source of factors

    Raises `ConfigError` for windows of less than 128 tokens, or losses that are not finite.
    """
    bases = [
        latent_basis(model.source, "joint" if isinstance(need, Prediction) else need.basis, folded=need.folded)
        for need in needs
        if not isinstance(need, Codebooks)
    ]
    program: Any = jax.jit(partial(_statistics, model.transformer, tuple(needs)))
    totals: list[Any] = []
    for window in windows:
        if len(window) < BLOCK:
            raise ConfigError(f"windows of {len(window)} tokens are shorter than a block; choose {BLOCK} or more")
        loss, found = program(model.params, tuple(bases), window[None])
        if not np.isfinite(loss):
            raise ConfigError(f"the loss of a window is {loss}: the model cannot be calibrated on this text")
        found = sharding.place(found, sharding.P(), model.mesh)  # every process has all of it
        found = jax.tree.map(lambda a: np.asarray(a, np.float64), found)
        totals = jax.tree.map(np.add, totals, found) if totals else found
    remaining = iter(bases)

    def result(need: Need, total: Any) -> dict[str, np.ndarray]:
        match need:
            case Codebooks():
                return _codebooks(need, total)
            case Directions():
                return _directions(need, total, next(remaining))
            case Prediction():
                return _prediction(total, next(remaining))

    return [result(need, total) for need, total in zip(needs, totals, strict=True)]


def drawn_tokens(model: Any) -> Int[np.ndarray, "W 512"]:
    """Windows of tokens drawn at random, which show what a model's layers add to X where no text is at hand: 16 tokens
    for every direction of a latent, and the likelier (Zipf's law) the earlier in the vocabulary, as tokenizers that
    merge pairs order theirs."""
    c = model.config
    windows = -(-16 * min(c.width, 2 * c.kv_width) // 512)
    likelihood = 1 / (np.arange(c.vocab_size) + 20)
    return (
        np.random.default_rng(0).choice(c.vocab_size, (windows, 512), p=likelihood / likelihood.sum()).astype(np.int32)
    )


def _statistics(
    transformer: Any, needs: tuple[Need, ...], params: Any, bases: tuple[Array, ...], tokens: Int[Array, "1 N"]
) -> tuple[Array, list[Any]]:
    """The loss of one window, and for each need what is summed over windows."""
    c = transformer.config
    shape = (c.num_layers, *tokens.shape, c.num_kv_heads, c.head_dim)

    def loss(shifts: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        logits, seen = transformer.apply({"params": params}, tokens, shifts, method="observe")
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -chosen.mean(), seen

    shifts = {side: jnp.zeros(shape, jnp.float32) for side in ("key", "value")}
    if any(isinstance(need, Codebooks) for need in needs):
        (value, seen), gradients = jax.value_and_grad(loss, has_aux=True)(shifts)
    else:
        (value, seen), gradients = loss(shifts), {}
    remaining = iter(bases)
    found: list[Any] = []
    for need in needs:
        if isinstance(need, Codebooks):
            specs = {"key": need.key, "value": need.value}
            count = partial(_histogram, sink=need.sink)
            found.append({s: jax.vmap(partial(count, spec=spec))(seen[s], gradients[s]) for s, spec in specs.items()})
        else:
            x = unit_norm(seen["h"], c.norm_eps) if need.folded else seen["x"]
            z = jnp.einsum("lbtd,ldc->lbtc", x.astype(jnp.float32), next(remaining).astype(jnp.float32))
            if isinstance(need, Prediction):
                z = z[:, :, FIRST:]
                below = jnp.concatenate([z[:1], z[:-1]])
                found.append({name: jnp.einsum("lbtc,lbte->lce", a, z) for name, a in (("own", z), ("below", below))})
            else:
                found.append(jnp.einsum("lbtc,lbte->lce", z, z))
    return value, found


def _histogram(
    values: Float[Array, "B N K d"], gradient: Float[Array, "B N K d"], *, spec: StreamSpec, sink: int
) -> Float[Array, " bins"]:
    """Sensitivity of the loss to errors at every height between a group's least and largest value."""
    whole = values.shape[1] // BLOCK * BLOCK
    values, gradient = flat(values)[:, :whole].astype(jnp.float32), flat(gradient)[:, :whole]
    values = values.at[:, :sink].set(values[:, sink : sink + 1])  # as `cache.store.without_sink`
    unit, scale, _, places, _ = normalize(as_blocks(values), spec)
    axis = -2 if spec.axis == "channel" else -1
    weight = (gradient.at[:, :sink].set(0).reshape(unit.shape) * scale.astype(jnp.float32)) ** 2
    if places is not None:
        weight = jnp.put_along_axis(weight, places, 0, axis=axis, inplace=False)
    bins = jnp.clip((unit * BINS).astype(jnp.int32), 0, BINS - 1)
    return jnp.zeros(BINS).at[bins.reshape(-1)].add(weight.reshape(-1))


def _codebooks(need: Codebooks, histograms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {side: np.stack([levels(layer, 2**need.bits) for layer in h]) for side, h in histograms.items()}


def _directions(need: Directions, total: np.ndarray, basis: Array) -> dict[str, np.ndarray]:
    directions = np.linalg.eigh(total)[1][:, :, ::-1][:, :, : need.rank]  # rising eigenvalues: the strongest last
    down = np.concatenate([np.zeros_like(directions[:1]), directions[:-1]])
    return {"down": down, "up": np.swapaxes(down, 1, 2) @ prediction(basis, need.basis == "joint")}


def _prediction(moments: dict[str, np.ndarray], basis: Array) -> dict[str, np.ndarray]:
    """Least squares, drawn towards the prediction that the weights make."""
    predict, residual = [], []
    own_below = np.concatenate([moments["own"][:1], moments["own"][:-1]])
    for below, own, crossed, weights in zip(
        own_below, moments["own"], moments["below"], prediction(basis, orthonormal=True), strict=True
    ):
        size = len(below)
        ridge = (RIDGE * np.trace(below) / size) * np.eye(size)
        matrix = weights + np.linalg.solve(below + ridge, crossed - below @ weights)
        predict.append(matrix)
        squares = np.diag(own) - 2 * (crossed * matrix).sum(0) + (matrix * (below @ matrix)).sum(0)
        residual.append(squares if len(residual) else np.diag(own))
    return {"predict": np.stack(predict), "residual": np.maximum(np.stack(residual), 0)}
