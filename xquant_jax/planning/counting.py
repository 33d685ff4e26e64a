"""Operations of a step: the multiplications and additions of its matrix products.

They are counted in the traced program itself, so no formula of a method can differ from what it computes. What works
element by element (dequantization, RoPE, softmax) is not counted: it is bound by other units.
"""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels.xla import TILE_BLOCKS
from xquant_jax.cache.attend import attend_stored, running_sums_of
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush
from xquant_jax.cache.state import Cache, allocate
from xquant_jax.config import ModelConfig
from xquant_jax.model import layers
from xquant_jax.model.transformer import Transformer, forward
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.planning.shapes import method_params_of_one_layer, parameter_shapes


class StepOperations(NamedTuple):
    """Operations of a step of one sequence.

    once: those that do not depend on the context
    flush: of quantizing what the windows hold after the step, if it fills blocks
    attend: by layer, of attending to one block of the history, keys rebuilt and values absorbed or rebuilt
    accumulate: by layer, of adding one block to the running sum; 0 where there is none
    """

    once: int
    flush: int
    attend: tuple[int, ...]
    accumulate: tuple[int, ...]


@lru_cache(maxsize=256)
def step_operations(
    config: ModelConfig, cache_config: CacheConfig, tokens: int, all_logits: bool = False
) -> StepOperations:
    """Counts a step with so many new tokens. all_logits: with logits of all of them, as drafts are verified.

    A layer attends to what its sliding window reaches, and adds to the running sum all that is stored: so the two are
    counted apart, each traced by itself as the step calls it.
    """
    model, params = Transformer(config), parameter_shapes(config)
    one_layer, _ = method_params_of_one_layer(config, cache_config)
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    method_params = jax.tree.map(lambda a: jax.ShapeDtypeStruct((config.num_layers, *a.shape[1:]), a.dtype), one_layer)
    cache = jax.eval_shape(lambda: allocate(cache_config, config, batch=1, tokens=BLOCK, implementation="xla"))
    step = jax.make_jaxpr(partial(_verify if all_logits else forward, model), return_shape=True)
    jaxpr, (_, longer) = step(params, shape((1, tokens)), cache, method_params, shape((1,)))
    flushing = count(jax.make_jaxpr(flush)(longer, method_params))
    rounds = -(-((BLOCK - 1 + tokens) // BLOCK) // TILE_BLOCKS)  # of adding to a running sum
    q = jax.ShapeDtypeStruct((1, tokens, config.num_heads, config.head_dim), config.dtype)
    attend: list[int] = []
    accumulate: list[int] = []
    for number, segment in enumerate(cache.segments):
        own = one_layer[number]
        of_sum = 0
        if segment.method.has_running_sum:
            of_sum = count(jax.make_jaxpr(partial(_accumulate, number))(own, cache)).per_round
        both = count(jax.make_jaxpr(partial(_attend, config, number))(own, q, cache)).per_round
        attend += [both - of_sum] * segment.num_layers
        accumulate += [of_sum] * segment.num_layers
    flush_operations = flushing.once + rounds * flushing.per_round
    return StepOperations(count(jaxpr).once, flush_operations, tuple(attend), tuple(accumulate))


def _verify(
    model: Transformer, params: Any, tokens: Any, cache: Cache, method_params: Any, counts: Any
) -> tuple[Any, Cache]:
    """`forward` with logits of every new token."""
    extended: Any = model.apply({"params": params}, tokens, cache, method_params, counts, method="extend")
    h, longer = extended
    return layers.logits(params, h, model.config), longer


def _attend(config: ModelConfig, number: int, method_params: Any, q: Any, cache: Cache) -> Any:
    """Attention of a layer of segment `number` to what it has stored, the running sum brought up to it."""
    positions = cache.lengths[:, None] + jnp.arange(q.shape[1])[None]
    frequencies = jnp.asarray(config.rope.frequencies(config.head_dim))
    geometry = Geometry(positions, jnp.int32(1), frequencies, config.softmax_scale)
    sums = running_sums_of(cache)
    return attend_stored(_first_layer(method_params), q, cache, number, jnp.int32(0), sums, geometry, config)


def _accumulate(number: int, method_params: Any, cache: Cache) -> Any:
    """The running sum with a layer of segment `number` in it."""
    segment, running_sum = cache.segments[number], cache.running_sum
    assert running_sum is not None
    (stream,) = segment.history.values()
    accumulation = segment.method.accumulation(_first_layer(method_params))
    call = pallas_kernels.Accumulate(running_sum, stream, accumulation, cache.history_blocks, layer=0)
    return pallas_kernels.run(call, cache.implementation)


def _first_layer(method_params: Any) -> Any:
    """One layer's part of what a segment's method multiplies with."""
    return jax.tree.map(lambda a: a[0], method_params)


class Operations(NamedTuple):
    """Operations done once, and those of one round of a loop whose rounds are known at run time only."""

    once: int
    per_round: int

    def plus(self, other: "Operations", times: int = 1) -> "Operations":
        """With so many times the other's too."""
        return Operations(self.once + times * other.once, self.per_round + times * other.per_round)


def count(jaxpr: Any) -> Operations:
    """Counts a jaxpr, `jax.make_jaxpr(f)(*shapes)`. Loops of known length count as often as they run."""
    total = Operations(0, 0)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        parts = [count(inner) for inner in _inner(equation.params)]
        match equation.primitive.name:
            case "dot_general":
                total = total.plus(Operations(_matrix_product(equation), 0))
            case "scan":
                total = total.plus(parts[0], equation.params["length"])
            case "while":
                once = sum(part.once + part.per_round for part in parts)
                total = total.plus(Operations(0, once))
            case "cond":
                total = total.plus(max(parts, key=lambda part: part.once + part.per_round))
            case _:
                for part in parts:
                    total = total.plus(part)
    return total


def _matrix_product(equation: Any) -> int:
    """A multiplication and an addition for every element of the result and every contracted one."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns"):
                yield part
