"""What can be timed and checked: attention to one layer of a cache, and adding one layer to a running sum.

A row is one layer of history read by one new token of each sequence. Layers alternate within a timed program, so that
no cache holds them; times are medians.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.decode import torch_bf16
from benchmarks.decode.variants import chosen, named
from benchmarks.models import decode_shape, sum_shape
from pallas_kernels import Accumulate, DecodeAttention, KeyRebuild, run, target
from pallas_kernels.eight_bits import name_of, quantize_matrix
from pallas_kernels.shapes import DecodeShape, SumShape
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, StreamSpec, dequantize, quantize
from xquant_jax.numerics.rope import Rope

LAYERS, MOST_LAYERS = 2, 16  # that alternate
UNCACHED = 256 * 2**20  # bytes of history of all layers: several times what a last-level cache holds
ALLOWED = 0.03  # error relative to the reference, both in bfloat16: see docs/performance.md
SHORT = 4096  # tokens of context that checks of long rows are cut to


@dataclasses.dataclass(frozen=True)
class Row:
    """Attention to one layer of a model's cache, which is named as users type it.

    implementation: of `decode_attention`; of `bf16`, where keys and values are as they are, whose attention it is
    variant: tiles other than the rule's, as `variants.named` reads them
    ragged: whether sequences have no block, one, an odd number, and so on
    """

    model: str
    cache: str
    batch: int
    context: int
    implementation: str
    ragged: bool = False
    variant: str = ""

    kernel: ClassVar[str] = "decode"

    @property
    def shape(self) -> DecodeShape:
        return decode_shape(self.model, self.cache)

    @property
    def bytes(self) -> float:
        """Of history that one call reads."""
        return self.batch * self.context * self.shape.bytes

    @property
    def flops(self) -> float:
        """Of one call, values absorbed."""
        return 2 * self.batch * self.context * self.shape.macs

    @property
    def layers(self) -> int:
        """That alternate; on an interpreter, no more than can."""
        if target.current().interpret:
            return LAYERS
        return min(MOST_LAYERS, max(LAYERS, math.ceil(UNCACHED / self.bytes)))

    def shortened(self) -> "Row":
        """So small that it can be checked in no time."""
        return dataclasses.replace(self, batch=2, context=min(self.context, SHORT))

    def program(self) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
        """A function of (queries, layer, *arrays) and its arrays."""
        return plain(self) if self.cache == "bf16" else quantized(self)

    def queries(self) -> jax.Array:
        shape = self.shape
        return jax.random.normal(jax.random.key(9), (self.batch, 1, shape.heads, shape.dim), jnp.bfloat16)

    def seconds(self, repeats: int = 5) -> float:
        """Median time of one layer."""
        if self.implementation == "torch":
            shape = self.shape
            sizes = shape.heads, shape.kv_heads, shape.dim
            return torch_bf16.seconds(self.batch, self.context, *sizes, self.layers, repeats)
        with chosen(self.kernel, named(self.variant)):
            return self._seconds(repeats)

    def _seconds(self, repeats: int) -> float:
        attend, arrays = self.program()
        interpret = target.current().interpret
        # so often that a launch does not count
        turns = 1 if interpret else max(1, min(50, int(2e10 / self.bytes / self.layers)))

        @jax.jit
        def layers(q: jax.Array, *arrays: Any) -> jax.Array:
            def one(layer: Any, q: jax.Array) -> jax.Array:
                return q + (1e-30 * attend(q, layer, *arrays).sum()).astype(
                    q.dtype
                )  # the next layer waits for this one

            if self.cache == "bf16":  # layers are arrays of their own
                return lax.fori_loop(
                    0, turns, lambda _, q: functools.reduce(lambda q, i: one(i, q), range(self.layers), q), q
                )
            return lax.fori_loop(0, turns * self.layers, lambda i, q: one(i % self.layers, q), q)

        q = self.queries()
        jax.block_until_ready(layers(q, *arrays))
        times = []
        for _ in range(1 if interpret else repeats):
            before = time.perf_counter()
            jax.block_until_ready(layers(q, *arrays))
            times.append((time.perf_counter() - before) / (turns * self.layers))
        return statistics.median(times)

    def error(self) -> float:
        """Of the output, relative to the reference's: both norms over everything."""
        attend, arrays = self.program()
        reference, _ = dataclasses.replace(self, implementation="xla").program()
        q = self.queries()
        with chosen(self.kernel, named(self.variant)):
            return distance(*(jax.jit(f)(q, jnp.int32(1), *arrays) for f in (attend, reference)))


@dataclasses.dataclass(frozen=True)
class SumRow:
    """Adding one layer of a model's cache, of the kind of `xquant-cl`, to its running sum."""

    model: str
    cache: str
    batch: int
    context: int
    implementation: str

    kernel: ClassVar[str] = "sum"

    @property
    def shape(self) -> SumShape:
        return sum_shape(self.model, self.cache)

    def shortened(self) -> "SumRow":
        """So small that it can be checked in no time."""
        return dataclasses.replace(self, batch=min(self.batch, 8), context=min(self.context, SHORT))

    def call(self) -> Accumulate:
        """Adding a layer of random codes to a random sum."""
        shape, blocks = self.shape, self.context // BLOCK
        running_sum = random_blocks(shape.running_sum, LAYERS, self.batch, blocks, seed=1)
        return Accumulate(
            jax.tree.map(lambda a: a[0], running_sum),
            random_blocks(shape.stream, LAYERS, self.batch, blocks, seed=2),
            jax.tree.map(random_matrix, shape.accumulation),
            jnp.full(self.batch, blocks, jnp.int32),
            jnp.int32(0),
        )

    def add(self, layers: int) -> Callable[[Blocks, Accumulate], Blocks]:
        """A program that adds so many layers of a call to a sum, in place."""

        def add(running_sum: Blocks, call: Accumulate) -> Blocks:
            def layer(number: jax.Array, total: Blocks) -> Blocks:
                return run(dataclasses.replace(call, running_sum=total, layer=number % LAYERS), self.implementation)

            return lax.fori_loop(0, layers, layer, running_sum)

        return jax.jit(add, donate_argnums=0)

    def seconds(self, repeats: int = 5) -> float:
        """Median time of one layer."""
        interpret = target.current().interpret
        layers = LAYERS if interpret else 10 * LAYERS
        call, add, times = self.call(), self.add(layers), []
        running_sum, call = call.running_sum, dataclasses.replace(call, running_sum=None)
        for _ in range(2 if interpret else repeats + 1):
            before = time.perf_counter()
            running_sum = jax.block_until_ready(add(running_sum, call))
            times.append((time.perf_counter() - before) / layers)
        return statistics.median(times[1:])

    def error(self) -> float:
        """Of the sum after two layers, relative to the reference's."""

        def total(implementation: str) -> jax.Array:
            row, call = dataclasses.replace(self, implementation=implementation), self.call()
            return dequantize(row.add(LAYERS)(call.running_sum, dataclasses.replace(call, running_sum=None)))

        return distance(total(self.implementation), total("xla"))


def quantized(row: Row) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """Attention to layer 0, 1, ... of random codes."""
    shape, blocks = row.shape, row.context // BLOCK
    call = shape.call(layers=row.layers, batch=row.batch, blocks=blocks)
    history_blocks = np.full(row.batch, blocks)
    if row.ragged:
        history_blocks = np.asarray([blocks * i // (row.batch - 1) | 1 for i in range(row.batch)])
        history_blocks[0], history_blocks[-1] = 0, blocks
    call = dataclasses.replace(
        call,
        q=row.queries(),
        key_stream=random_blocks(shape.key, row.layers, row.batch, blocks, seed=1),
        key_rebuild=random_rebuild(shape),
        value_stream=shape.value and random_blocks(shape.value, row.layers, row.batch, blocks, seed=2),
        history_blocks=jnp.asarray(history_blocks, jnp.int32),
        geometry=dataclasses.replace(
            call.geometry,
            positions=jnp.asarray(history_blocks[:, None] * BLOCK + 5, jnp.int32),
            sliding_window=jnp.int32(2**30),
            frequencies=jnp.asarray(Rope().frequencies(shape.dim)),
        ),
        layer=jnp.int32(0),
        skip=jnp.zeros(row.batch, jnp.int32),
    )

    def attend(q: jax.Array, layer: jax.Array, call: DecodeAttention) -> jax.Array:
        return run(dataclasses.replace(call, q=q, layer=layer), row.implementation).out

    return attend, (call,)


def plain(row: Row) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """Attention to keys and values as they are. Layers are separate arrays: a slice of one would be copied."""
    kv_heads, dim = row.shape.kv_heads, row.shape.dim
    size = (row.batch, row.context, kv_heads, dim)
    if row.implementation == "pallas":  # as it reads them: otherwise it would transpose all of them in each call
        size = (row.batch * kv_heads, row.context, dim)
    pairs = [
        tuple(jax.random.normal(jax.random.key(2 * i + j), size, jnp.bfloat16) for j in range(2))
        for i in range(row.layers)
    ]

    def attend(q: jax.Array, layer: int, pairs: list) -> jax.Array:
        k, v = pairs[layer]
        if row.implementation == "tokamax":
            import tokamax  # pyright: ignore[reportMissingImports]

            return tokamax.dot_product_attention(q, k, v)
        if row.implementation == "pallas":
            from jax.experimental.pallas.ops.gpu import decode_attention as pallas_decode

            return pallas_decode.mqa(q.reshape(row.batch * kv_heads, -1, dim), k, v).reshape(q.shape)
        return jax.nn.dot_product_attention(q, k, v, implementation=cast(Literal["xla", "cudnn"], row.implementation))

    return attend, (pairs,)


@functools.partial(jax.jit, static_argnames=("spec", "layers", "batch", "blocks", "seed"))
def random_blocks(spec: StreamSpec, layers: int, batch: int, blocks: int, seed: int) -> Blocks:
    """Random codes of values of standard deviation about one."""
    abstract = jax.eval_shape(lambda: quantize(jnp.zeros((layers, batch, blocks, BLOCK, spec.width)), spec))
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    words = tuple(jax.random.bits(next(keys), w.shape, w.dtype) for w in abstract.planes)
    if spec.format == "e4m3":
        words = tuple(w & 0xBF for w in words)  # without the exponent's highest bit: below 2, and no NaN
    span = 3.5 / (2**spec.bits - 1)  # codes are uniform over it
    scale = (span * jax.random.uniform(next(keys), abstract.scale.shape, minval=0.8, maxval=1.2)).astype(jnp.bfloat16)
    zero = None if abstract.zero is None else (scale * (-(2**spec.bits - 1) / 2)).astype(jnp.bfloat16)
    return Blocks(words, scale, zero, spec)


def random_matrix(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """In bfloat16, of columns of length about one."""
    values = jax.random.normal(jax.random.key(3), shape.shape)
    return (values / math.sqrt(shape.shape[-2])).astype(jnp.bfloat16)


def random_rebuild(shape: DecodeShape) -> KeyRebuild:
    """A random matrix to rebuild keys with, in 8 bits where the cache has it so."""
    rebuild = shape.rebuild
    if rebuild.matrix is None:
        return KeyRebuild()
    matrix = random_matrix(rebuild.matrix)
    if rebuild.scale is None:
        return KeyRebuild(matrix)
    small = quantize_matrix(matrix[None], name_of(rebuild.matrix.dtype), shape.key.group)
    return KeyRebuild(**{name: a[0] for name, a in small.items()})


def distance(got: Any, expected: Any) -> float:
    """Of two arrays, relative to the second: both norms over everything."""
    got, expected = (np.asarray(a, np.float64) for a in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
