"""What this device does at most: bytes that a copy moves, operations of a product of matrices."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

ROUNDS = 8


def ceilings(size: int) -> dict[str, float]:
    """Bytes a copy moves and operations a product of matrices of this size does in a second, on random data."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (size * size * 8,), jnp.bfloat16)
    moved = 2 * x.nbytes
    # without copies between the passes: the array is updated in place, and products are not in a loop
    multiply = jax.jit(lambda b: functools.reduce(lambda b, _: (a @ b) * jnp.bfloat16(1e-2), range(ROUNDS), b))
    add = jax.jit(lambda x: lax.fori_loop(0, ROUNDS, lambda i, y: y + i.astype(y.dtype), x), donate_argnums=0)
    return {"copy_bytes": moved / _typical(add, x), "matrix_flops": 2 * size**3 / _typical(multiply, a)}


def _typical(f: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    """Seconds of one round."""
    argument, times = jax.block_until_ready(f(argument)), []
    for _ in range(7):
        before = time.perf_counter()
        argument = jax.block_until_ready(f(argument))
        times.append(time.perf_counter() - before)
    return statistics.median(times) / ROUNDS
