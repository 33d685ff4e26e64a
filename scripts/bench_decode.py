"""Decode attention and whole decode steps on the device at hand: checks the outputs, then times.

    python scripts/bench_decode.py --json OUT.json --plot OUT.png     under 8 minutes: what does not fit is named
    python scripts/bench_decode.py --tune                             measures tile sizes and writes their table
    python scripts/bench_decode.py --smoke                            tiny shapes on the interpreter, on any machine

Every row is one layer of history read by one new token of each sequence. Layers alternate within a timed program, so
that no cache holds them; times are medians. `of_copy` and `of_matrix` are the shares of this device's own bandwidth and
matrix rate, which are measured first, that the bytes and operations of a row take up.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # half of the memory is to be filled

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import xquant_jax as xq
from pallas_kernels import Accumulation, KeyRebuild, accumulate, decode_attention, target
from pallas_kernels.eight_bits import quantize_matrix
from pallas_kernels.triton import tiling
from pallas_kernels.triton.ahead import SUMS
from pallas_kernels.triton.tiling import Tiles
from xquant_jax.cache.methods.base import FactorSource
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.model.transformer import forward
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.numerics.quantization import Blocks, StreamSpec, dequantize, quantize
from xquant_jax.numerics.rope import Rope

LAYERS, MOST_LAYERS = 2, 16  # that alternate
UNCACHED = 256 * 2**20  # bytes of history of all layers: several times what a last-level cache holds
ALLOWED = 0.03  # error relative to the reference, both in bfloat16: see docs/performance.md
VERSIONS = ("jax", "jaxlib", "jax-triton", "triton", "tokamax", "xquant-jax")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Attention of a model."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    width: int  # of the model

    @property
    def keys(self) -> int:
        return self.kv_heads * self.dim


LLAMA_3 = Shape("Llama-3.1-8B", 32, 8, 128, 4096)
LLAMA_2 = Shape("Llama-2-7B", 32, 32, 128, 4096)
TINY = Shape("tiny", 4, 2, 64, 256)
TINY_2 = Shape("tiny, K = H", 4, 4, 64, 256)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is timed. form: of the keys' rebuild, or `bf16` for keys and values as they are. rebuild_dtype: of the
    matrix that keys are rebuilt with. layers: that alternate."""

    shape: Shape
    form: str
    bits: int
    batch: int
    context: int
    implementation: str
    rebuild_dtype: str = "bf16"
    ragged: bool = False  # sequences of no block, of one, of an odd number, and so on

    @property
    def layers(self) -> int:
        return min(MOST_LAYERS, max(LAYERS, math.ceil(UNCACHED / self.bytes())))

    @property
    def method(self) -> str:
        if self.form == "identity":
            return "int8" if self.bits == 8 else f"kivi:{self.bits}"
        if self.form in ("bf16", "fp8"):
            return self.form
        basis = f",basis={'joint' if self.form == 'dense' else 'per_head'}"
        multi_head = self.shape.heads == self.shape.kv_heads
        small = "" if self.rebuild_dtype == "bf16" else f",rebuild_dtype={self.rebuild_dtype}"
        return f"xquant:{self.bits}{'' if multi_head else basis}{small}"

    def streams(self) -> tuple[StreamSpec, StreamSpec | None]:
        """Of keys and of values; one for both where X itself is stored."""
        if self.form == "dense" and self.shape.heads == self.shape.kv_heads:
            return StreamSpec(self.shape.width, self.bits), None
        if self.form == "fp8":
            spec = StreamSpec(self.shape.keys, 8, format="e4m3")
            return spec, spec
        axis = "token" if self.method == "int8" else "channel"
        return StreamSpec(self.shape.keys, self.bits, axis), StreamSpec(self.shape.keys, self.bits)

    def bytes(self) -> float:
        """Of history that one call reads."""
        tokens = self.batch * self.context
        if self.form == "bf16":
            return tokens * 4 * self.shape.keys
        scales = 16 if self.form == "fp8" else 32  # bits a group: a scale, and a zero where there is one
        return tokens * sum(s.width * (s.bits + scales / s.group) / 8 for s in self.streams() if s)

    def flops(self) -> float:
        """Of one call, values absorbed."""
        s = self.shape
        key, value = (
            (s.keys, s.keys)
            if self.form == "bf16"
            else (x.width for x in (self.streams()[0], self.streams()[1] or self.streams()[0]))
        )
        rebuild = {"dense": 2 * key * s.keys, "per_head": 2 * s.dim * s.keys}.get(self.form, 0)
        values = 2 * s.heads * (value if self.form == "dense" else s.dim)
        return self.batch * self.context * (rebuild + 2 * s.heads * s.dim + values)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
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


def quantized(row: Row) -> tuple[Callable[..., jax.Array], tuple]:
    """A function of (queries, *arrays) and its arrays: attention to layer 0, 1, ... in turn."""
    s = row.shape
    key_spec, value_spec = row.streams()
    blocks = row.context // BLOCK
    key = random_blocks(key_spec, row.layers, row.batch, blocks, 1)
    value = random_blocks(value_spec, row.layers, row.batch, blocks, 2) if value_spec else None
    history_blocks = np.full(row.batch, blocks)
    if row.ragged:
        history_blocks = np.asarray([blocks * i // (row.batch - 1) | 1 for i in range(row.batch)])
        history_blocks[0], history_blocks[-1] = 0, blocks
    form = {"dense": (key_spec.width, s.keys), "per_head": (s.kv_heads, s.dim, s.dim)}.get(row.form)
    rebuild = KeyRebuild()
    if form:
        matrix = (jax.random.normal(jax.random.key(3), form) / math.sqrt(form[-2])).astype(jnp.bfloat16)
        rebuild = KeyRebuild(matrix)
        if row.rebuild_dtype != "bf16":
            small = quantize_matrix(matrix[None], row.rebuild_dtype, key_spec.group)
            rebuild = dataclasses.replace(rebuild, **{name: a[0] for name, a in small.items()})

    def attend(q: jax.Array, layer: jax.Array, key: Blocks, value: Blocks | None, rebuild: KeyRebuild) -> jax.Array:
        positions = jnp.asarray(history_blocks[:, None] * BLOCK + 5)
        geometry = Geometry(positions, 2**30, jnp.asarray(Rope().frequencies(s.dim)), s.dim**-0.5)
        return decode_attention(
            q,
            key,
            rebuild,
            value or key,
            jnp.asarray(history_blocks),
            geometry,
            layer=layer,
            num_kv_heads=s.kv_heads,
            value_heads=1 if row.form == "dense" else s.kv_heads,
            implementation=row.implementation,
        ).out

    return attend, (key, value, rebuild)


def plain(row: Row) -> tuple[Callable[..., jax.Array], tuple]:
    """Attention to keys and values as they are. Layers are separate arrays: a slice of one would be copied."""
    s = row.shape
    shape = (row.batch, row.context, s.kv_heads, s.dim)
    pairs = [
        tuple(jax.random.normal(jax.random.key(2 * i + j), shape, jnp.bfloat16) for j in range(2))
        for i in range(row.layers)
    ]

    def attend(q: jax.Array, layer: int, pairs: list) -> jax.Array:
        k, v = pairs[layer]
        if row.implementation == "tokamax":
            import tokamax  # pyright: ignore[reportMissingImports]

            return tokamax.dot_product_attention(q, k, v)
        if row.implementation == "pallas":
            from jax.experimental.pallas.ops.gpu import decode_attention as pallas_decode

            return pallas_decode.gqa(q[:, 0], k, v)[:, None]
        return jax.nn.dot_product_attention(q, k, v, implementation=cast(Literal["xla", "cudnn"], row.implementation))

    return attend, (pairs,)


def queries(row: Row) -> jax.Array:
    return jax.random.normal(jax.random.key(9), (row.batch, 1, row.shape.heads, row.shape.dim), jnp.bfloat16)


def seconds(row: Row, interpret: bool, repeats: int = 5) -> float:
    """Median time of one layer."""
    attend, arrays = plain(row) if row.form == "bf16" else quantized(row)
    turns = 1 if interpret else max(1, min(50, int(2e10 / row.bytes() / row.layers)))  # so that a launch does not count

    @jax.jit
    def run(q: jax.Array, *arrays: Any) -> jax.Array:
        def one(layer: Any, q: jax.Array) -> jax.Array:
            return q + (1e-30 * attend(q, layer, *arrays).sum()).astype(q.dtype)  # the next layer waits for this one

        if row.form == "bf16":  # layers are arrays of their own
            return lax.fori_loop(
                0, turns, lambda _, q: functools.reduce(lambda q, i: one(i, q), range(row.layers), q), q
            )
        return lax.fori_loop(0, turns * row.layers, lambda i, q: one(i % row.layers, q), q)

    q = queries(row)
    jax.block_until_ready(run(q, *arrays))
    times = []
    for _ in range(1 if interpret else repeats):
        before = time.perf_counter()
        jax.block_until_ready(run(q, *arrays))
        times.append((time.perf_counter() - before) / (turns * row.layers))
    return statistics.median(times)


def error(row: Row) -> float:
    """Of the output, relative to the reference's: both norms over everything."""
    attend, arrays = quantized(row)
    reference, _ = quantized(dataclasses.replace(row, implementation="xla"))
    q = queries(row)
    got, expected = (np.asarray(jax.jit(f)(q, jnp.int32(1), *arrays), np.float64) for f in (attend, reference))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@dataclasses.dataclass(frozen=True)
class SumRow:
    """`accumulate` of a layer of xquant-cl at 2 bits: one of `SUMS`."""

    sum: str
    batch: int
    context: int
    implementation: str

    def arguments(self) -> tuple[Blocks, Blocks, Accumulation]:
        """The sum, the stream of all layers and how they are added."""
        width, stored, predict, lift = (256, 256, (256,), False) if self.sum == "tiny" else SUMS[self.sum]
        blocks = self.context // BLOCK
        running_sum = jax.tree.map(lambda a: a[0], random_blocks(StreamSpec(width, 8), LAYERS, self.batch, blocks, 1))

        def draw(rows: int, columns: int) -> jax.Array:
            return (jax.random.normal(jax.random.key(3), (rows, columns)) / math.sqrt(rows)).astype(jnp.bfloat16)

        matrices = tuple(itertools.starmap(draw, itertools.pairwise((width, *predict))))
        accumulation = Accumulation(matrices, draw(stored, width) if lift else None)
        return running_sum, random_blocks(StreamSpec(stored, 2), LAYERS, self.batch, blocks, 2), accumulation

    def add(self, layers: int) -> Callable[[Blocks, Blocks, Accumulation], Blocks]:
        """A program that adds so many layers, in place."""
        history_blocks = jnp.full(self.batch, self.context // BLOCK)

        def run(running_sum: Blocks, stream: Blocks, accumulation: Accumulation) -> Blocks:
            def layer(number: jax.Array, total: Blocks) -> Blocks:
                return accumulate(
                    total,
                    stream,
                    accumulation,
                    history_blocks,
                    layer=number % LAYERS,
                    implementation=self.implementation,
                )

            return lax.fori_loop(0, layers, layer, running_sum)

        return jax.jit(run, donate_argnums=0)

    def seconds(self, interpret: bool) -> float:
        """Median time of one layer."""
        layers = LAYERS if interpret else 10 * LAYERS
        running_sum, stream, accumulation = self.arguments()
        add, times = self.add(layers), []
        for _ in range(2 if interpret else 6):
            before = time.perf_counter()
            running_sum = jax.block_until_ready(add(running_sum, stream, accumulation))
            times.append((time.perf_counter() - before) / layers)
        return statistics.median(times[1:])

    def error(self) -> float:
        """Of the sum after two layers, relative to the reference's."""
        rows = self, dataclasses.replace(self, implementation="xla")
        got, expected = (np.asarray(dequantize(row.add(LAYERS)(*row.arguments())), np.float64) for row in rows)
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def sums(smoke: bool) -> Iterator[SumRow]:
    for name in ("tiny",) if smoke else SUMS:
        for implementation in ("triton", "xla"):
            yield SumRow(name, *((2, 256) if smoke else (8, 65536)), implementation)


def ceilings(size: int) -> dict[str, float]:
    """Bytes a copy moves and operations a product of matrices of this size does in a second, on random data."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (size * size * 8,), jnp.bfloat16)

    def typical(f: Callable[[jax.Array], jax.Array], arg: jax.Array) -> float:
        arg, times = jax.block_until_ready(f(arg)), []
        for _ in range(7):
            before = time.perf_counter()
            arg = jax.block_until_ready(f(arg))
            times.append(time.perf_counter() - before)
        return statistics.median(times) / 8

    # without copies between the passes: the array is updated in place, and products are not in a loop
    multiply = jax.jit(lambda b: functools.reduce(lambda b, _: (a @ b) * jnp.bfloat16(1e-2), range(8), b))
    add = jax.jit(lambda x: lax.fori_loop(0, 8, lambda i, y: y + i.astype(y.dtype), x), donate_argnums=0)
    size_of_x = x.nbytes
    return {"copy_bytes": 2 * size_of_x / typical(add, x), "matrix_flops": 2 * size**3 / typical(multiply, a)}


def of_layers(smoke: bool) -> Iterator[Row]:
    """Rows in the order of what matters most, should time run out."""
    kernel = "triton"
    if smoke:
        for form, bits in (("bf16", 16), ("per_head", 4), ("dense", 2), ("identity", 8)):
            for implementation in ("xla",) if form == "bf16" else ("xla", kernel):
                yield Row(TINY, form, bits, 2, 256, implementation)
        yield Row(TINY_2, "dense", 4, 2, 256, kernel, "fp8")
        return
    sizes = [(8, 65536), (1, 131072), (32, 16384), (8, 16384), (32, 4096), (1, 16384), (8, 131072), (32, 65536)]
    sizes += [(8, 4096), (1, 65536), (1, 4096), (32, 131072)]
    for batch, context in sizes:
        thorough = (batch, context) == sizes[0]
        for implementation in ("cudnn", "xla", "tokamax", "pallas") if thorough else ("cudnn",):
            yield Row(LLAMA_3, "bf16", 16, batch, context, implementation)
        forms = [("per_head", 4), ("identity", 8), ("dense", 4), ("per_head", 2), ("per_head", 3), ("identity", 4)]
        for form, bits in forms if thorough else forms[:5]:
            yield Row(LLAMA_3, form, bits, batch, context, kernel)
        if thorough:
            yield Row(LLAMA_3, "per_head", 4, batch, context, "xla")
            yield Row(LLAMA_3, "fp8", 8, batch, context, "xla")
        if batch * context <= 2**19:  # 8.6 GB of bf16 keys and values in a layer
            yield Row(LLAMA_2, "bf16", 16, batch, context, "cudnn")
            for bits in (4, 2, 3) if thorough else (4,):
                yield Row(LLAMA_2, "dense", bits, batch, context, kernel)
            for rebuild_dtype in ("fp8", "int8") if thorough else ():
                yield Row(LLAMA_2, "dense", 4, batch, context, kernel, rebuild_dtype)


def checks(smoke: bool) -> Iterator[Row]:
    shapes = [TINY] if smoke else [LLAMA_3, LLAMA_2]
    for shape, bits in itertools.product(shapes, (4,) if smoke else (2, 3, 4, 8)):
        for form in ("dense",) if shape is LLAMA_2 else ("per_head", "dense", "identity"):
            yield Row(shape, form, bits, 2, 256 if smoke else 4096, "triton")
    for form in ("per_head", "dense", "identity"):
        yield Row(shapes[0], form, 4, 4, 640 if smoke else 65536, "triton", ragged=True)
    for bits, rebuild_dtype in ((4, "fp8"),) if smoke else ((4, "fp8"), (4, "int8"), (8, "int8")):
        yield Row(TINY_2 if smoke else LLAMA_2, "dense", bits, 2, 256 if smoke else 4096, "triton", rebuild_dtype)


@dataclasses.dataclass(frozen=True)
class StepModel:
    """A model of random weights, as `CacheConfig.method_params` wants it."""

    config: ModelConfig
    params: Any

    @property
    def source(self) -> FactorSource:
        return FactorSource(self.config, self.params["layers"], self.svd, self.calibrated)

    def calibrated(self, need: Any) -> Any:
        """Nothing: no method that is timed here needs any."""
        raise xq.ConfigError(f"{need.cache} needs calibration, and random weights have none")

    def svd(self, kind: str, *, folded: bool = False, number: int | None = None) -> Any:
        """Random factors: only their shapes matter here."""
        c, dtype = self.config, self.params["layers"]["key"]["kernel"].dtype
        per_head = kind == "per_head"
        rebuild = (c.num_kv_heads, c.head_dim, c.head_dim) if per_head else (c.kv_width, c.kv_width)
        project = (c.width, c.num_kv_heads, c.head_dim) if per_head else (c.width, c.kv_width)

        def draw(shape: tuple[int, ...], seed: int) -> jax.Array:
            values = jax.random.normal(jax.random.key(seed), (c.num_layers, *shape), dtype)
            return values / jnp.sqrt(jnp.asarray(shape[-2], dtype))

        return {side: {"project": draw(project, 1), "rebuild": draw(rebuild, 2)} for side in ("key", "value")}


def step_model(config: ModelConfig) -> tuple[xq.Transformer, StepModel]:
    transformer = xq.Transformer(config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), tokens, method="score")["params"])
    leaves, tree = jax.tree.flatten(shapes)
    dtype = jnp.dtype(config.dtype)
    drawn = [0.02 * jax.random.normal(jax.random.key(i), a.shape, dtype) for i, a in enumerate(leaves)]
    return transformer, StepModel(config, jax.tree.unflatten(tree, drawn))


def step_seconds(config: ModelConfig, spec: str, batch: int, context: int, implementation: str | None) -> float:
    """Median time of a decode step with `context` tokens of random history."""
    transformer, model = step_model(config)
    cache_config = xq.CacheConfig.parse(spec)
    method_params = cache_config.method_params(model.source)
    cache = xq.allocate(cache_config, config, batch=batch, tokens=context + BLOCK, implementation=implementation)
    filled = jnp.full(batch, context // BLOCK, jnp.int32)
    cache = dataclasses.replace(cache, lengths=filled * BLOCK, history_blocks=filled)

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params: Any, method_params: Any, token: jax.Array, cache: xq.Cache) -> tuple[jax.Array, xq.Cache]:
        logits, cache = forward(transformer, params, token, cache, method_params, jnp.ones(batch, jnp.int32))
        return logits.argmax(-1)[:, None].astype(jnp.int32), cache

    token, times = jnp.ones((batch, 1), jnp.int32), []
    for _ in range(12):  # fewer than fill a window
        before = time.perf_counter()
        token, cache = jax.block_until_ready(step(model.params, method_params, token, cache))
        times.append(time.perf_counter() - before)
    return statistics.median(times[2:])


def step_rows(smoke: bool) -> tuple[ModelConfig, Sequence[tuple[str, int, int, str | None]]]:
    """The model, and (cache, batch, context, implementation) where bf16 keys and values fill half of the memory."""
    shape, layers, vocabulary, mlp = (TINY, 2, 64, 128) if smoke else (LLAMA_3, 32, 128256, 14336)
    config = ModelConfig(
        vocab_size=vocabulary,
        width=shape.width,
        num_layers=layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        mlp_width=mlp,
        norm_eps=1e-5,
        rope=Rope(theta=500_000.0),
        sliding_windows=(None,) * layers,
        dtype="float32" if smoke else "bfloat16",
    )
    if smoke:
        return config, [("bf16", 2, 256, None), ("xquant:4", 2, 256, "triton")]
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 16e9)
    context = int(limit / 2 / (8 * layers * 4 * shape.keys)) // BLOCK * BLOCK
    return config, [(spec, 8, context, None) for spec in ("xquant:4", "int8", "xquant:2", "bf16")] + [
        ("bf16", 8, BLOCK, None)
    ]


def measure(smoke: bool, deadline: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Checks, then times what matters most first; `deadline` is of `time.monotonic`. Calls `save` after every row."""
    device = jax.local_devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "versions": {name: version for name in VERSIONS if (version := installed(name))},
        "interpreted": smoke,
        "ceilings": ceilings(256 if smoke else 8192),
        "checks": [],
        "wrong": [],
        "sums": [],
        "layers": [],
        "steps": [],
        "skipped": [],
    }

    def attempt(part: str, name: dict[str, Any], f: Callable[[], float], unit: str = "seconds") -> None:
        """What `f` finds of a row, or why it found nothing."""
        if time.monotonic() > deadline:
            result["skipped"].append({**name, "reason": "out of time"})
            return
        try:
            entry = {**name, unit: f()}
        except Exception as problem:  # noqa: BLE001  whatever it is, the other rows are worth having
            entry = {**name, "reason": f"{type(problem).__name__}: {str(problem)[:200]}"}
            refused = unit == "seconds" or isinstance(
                problem, ConfigError
            )  # a check that fails otherwise proves nothing
            result["skipped" if refused else "wrong"].append(entry)
            save(result)
            return
        result[part].append(entry)
        if unit == "error" and not entry[unit] < ALLOWED:
            result["wrong"].append(entry)
        print(json.dumps(entry), file=sys.stderr, flush=True)
        save(result)

    for row in checks(smoke):
        attempt("checks", named(row), functools.partial(error, row), "error")
    for row in sums(smoke):
        if row.implementation != "xla":
            short = dataclasses.replace(row, context=min(row.context, 4096))
            attempt("checks", dataclasses.asdict(short), short.error, "error")
    config, steps = step_rows(smoke)
    rows = list(of_layers(smoke))
    first = [row for row in rows if (row.batch, row.context) == (rows[0].batch, rows[0].context)]
    rest = [row for row in rows if row not in first]
    if not smoke:
        first.append(Row(LLAMA_3, "bf16", 16, *steps[0][1:3], "cudnn"))
    for row in first:
        attempt("layers", named(row), functools.partial(seconds, row, smoke))
    for spec, batch, context, implementation in steps:
        run = functools.partial(step_seconds, config, spec, batch, context, implementation)
        attempt("steps", {"cache": spec, "batch": batch, "context": context}, run)
    for row in sums(smoke):
        attempt("sums", dataclasses.asdict(row), functools.partial(row.seconds, smoke))
    for row in rest:
        attempt("layers", named(row), functools.partial(seconds, row, smoke))
    by_name = {json.dumps(named(row)): row for row in first + rest}
    for entry in result["layers"]:
        taken = entry["seconds"]
        row = by_name[json.dumps({k: v for k, v in entry.items() if k != "seconds"})]
        entry["bytes"], entry["flops"] = row.bytes(), row.flops()
        entry["ns_per_token"] = 1e9 * taken / (row.batch * row.context)
        entry["of_copy"] = row.bytes() / taken / result["ceilings"]["copy_bytes"]
        entry["of_matrix"] = row.flops() / taken / result["ceilings"]["matrix_flops"]
        best = best_bf16(result, entry["model"], row.batch, row.context)
        entry["times_as_fast_as_bf16"] = best and best / taken
    if not smoke:
        _, batch, context, _ = steps[0]
        empty = [e["seconds"] for e in result["steps"] if e["cache"] == "bf16" and e["context"] == BLOCK]
        if empty and (layer := best_bf16(result, LLAMA_3.name, batch, context)):
            name = "bf16, with the best attention: sum of a step without history and of its layers"
            total = empty[0] + config.num_layers * layer
            result["steps"].append({"cache": name, "batch": batch, "context": context, "seconds": total})
    return result


def best_bf16(result: dict[str, Any], model: str, batch: int, context: int) -> float | None:
    """Seconds of the fastest attention to bf16 keys and values of this size."""
    same = {"model": model, "method": "bf16", "batch": batch, "context": context}
    return min((e["seconds"] for e in result["layers"] if same.items() <= e.items()), default=None)


def named(row: Row) -> dict[str, Any]:
    return {
        "model": row.shape.name,
        "method": row.method,
        "implementation": row.implementation,
        "batch": row.batch,
        "context": row.context,
        **({"ragged": True} if row.ragged else {}),
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def candidates(row: Row | SumRow) -> list[Tiles]:
    """Tiles that are worth a try."""
    if isinstance(row, SumRow) and row.sum == "Llama-2-7B":  # without products
        return [Tiles(blocks, warps=warps) for blocks, warps in itertools.product((1, 2), (4, 8))]
    if isinstance(row, SumRow) or row.form == "dense":
        chunks = (32, 64, 128) if isinstance(row, SumRow) or row.rebuild_dtype == "bf16" else (64, 128)
        cuts = itertools.product(chunks, ((2, 8, 1), (2, 8, 2), (2, 8, 3), (1, 4, 2), (1, 8, 2)))
        return [Tiles(blocks, chunk, warps, stages) for chunk, (blocks, warps, stages) in cuts]
    cuts = itertools.product(
        (True, False), (0,) if row.form == "identity" else (0, 16, 64), ((1, 4, 2), (1, 4, 3), (1, 8, 2), (2, 8, 2))
    )
    return [Tiles(blocks, chunk, warps, stages, fused) for fused, chunk, (blocks, warps, stages) in cuts]


def tune(smoke: bool, deadline: float, table: Path) -> None:
    """Times tiles of the kernels that read keys or add to sums, and writes the fastest of each shape into the table of
    this device."""
    known = json.loads(table.read_text()) if table.exists() else {}
    mine = known.setdefault(jax.local_devices()[0].device_kind, {})
    if smoke:
        rows: list[Row | SumRow] = [Row(TINY, "per_head", 4, 2, 256, "triton"), SumRow("tiny", 2, 256, "triton")]
    else:
        forms = [("per_head", 4), ("dense", 4), ("per_head", 2), ("per_head", 3), ("identity", 8), ("identity", 4)]
        rows = [Row(LLAMA_3, form, bits, 8, 65536, "triton") for form, bits in forms]
        rows += [Row(LLAMA_2, "dense", 4, 8, 32768, "triton", dtype) for dtype in ("bf16", "fp8", "int8")]
        rows += [SumRow(name, 8, 65536, "triton") for name in ("Llama-3.1-8B", "Llama-2-7B")]
    for number, row in enumerate(rows):
        now = time.monotonic()
        until = now + (deadline - now) / (len(rows) - number)
        best: tuple[float, Tiles | None] | None = None
        shapes: set[str] = set()
        kernel, label = ("sum", row.sum) if isinstance(row, SumRow) else ("decode", row.method)
        for tiles in candidates(row)[:2] if smoke else [None, *candidates(row)]:  # the rule's, then others
            if time.monotonic() > until:
                print(f"{label}: {tiles} and what follows was not tried, out of time", file=sys.stderr)
                break
            with chosen(kernel, tiles, shapes):
                try:
                    taken = row.seconds(smoke) if isinstance(row, SumRow) else seconds(row, smoke, repeats=3)
                except Exception as problem:  # noqa: BLE001  tiles that do not compile or fit are no candidates
                    print(f"{label}: {tiles} {type(problem).__name__}", file=sys.stderr)
                    continue
                if best is not None and taken >= best[0]:
                    continue
                short = dataclasses.replace(row, batch=2, context=min(row.context, 4096))
                if not (found := short.error() if isinstance(short, SumRow) else error(short)) < ALLOWED:
                    print(f"{label}: {tiles} is wrong by {found:.3g}", file=sys.stderr)
                    continue
            best = taken, tiles
        if best:
            (shape,) = shapes
            mine.pop(shape, None)
            if best[1]:
                mine[shape] = dataclasses.asdict(best[1])
            print(f"{shape}: {best[1] or 'by the rule'}, {1e3 * best[0]:.3f} ms a layer")
            table.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def chosen(kernel: str, tiles: Tiles | None, shapes: set[str]) -> Iterator[None]:
    """A kernel's tiles; None: by the rule, as those of other kernels are. Notes the kernel's `shapes`."""

    def choose(shape: tiling.Shape) -> Tiles:
        if shape.kernel == kernel:
            shapes.add(str(shape))
            if tiles:
                return tiles
        return tiling.by_rule(shape, tiling.capability() or 9.0)

    with mock.patch.object(tiling, "choose", choose):
        yield


def draw(result: dict[str, Any], path: Path) -> None:
    """Nanoseconds a token and layer takes against the tokens in the batch, a line for each method."""
    from matplotlib.figure import Figure

    models = sorted({e["model"] for e in result["layers"]})
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for axes, model in zip(np.atleast_1d(figure.subplots(1, len(models))), models, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for e in result["layers"]:
            if e["model"] == model:
                lines.setdefault(f"{e['method']} ({e['implementation']})", []).append(
                    (e["batch"] * e["context"], e["ns_per_token"])
                )
        for label, points in lines.items():
            axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set(
            title=f"{model}, {result['device']}", xlabel="cached tokens in the batch", ylabel="ns per token and layer"
        )
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no further row after this long")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, kernels on the interpreter")
    parser.add_argument("--tune", action="store_true", help="measure tile sizes and write their table instead")
    parser.add_argument("--table", type=Path, default=tiling.TABLE, help="the table of tile sizes")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes

    def save(result: dict[str, Any]) -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    with target.interpreted() if args.smoke else contextlib.nullcontext():
        if args.tune:
            tune(args.smoke, deadline, args.table)
            return 0
        result = measure(args.smoke, deadline, save)
    save(result)
    if args.plot:
        draw(result, args.plot)
    for e in result["layers"]:
        name = f"{e['model']:13} {e['method']:24} {e['implementation']:8} {e['batch']:3} x {e['context']:6}"
        shares = f"copy {e['of_copy']:.0%}, matrix {e['of_matrix']:.0%}"
        print(f"{name} {1e3 * e['seconds']:9.3f} ms {e['ns_per_token']:7.3f} ns/token, {shares}")
    for e in result["sums"]:
        name = f"sum of {e['sum']:27} {e['implementation']:8} {e['batch']:3} x {e['context']:6}"
        print(f"{name} {1e3 * e['seconds']:9.3f} ms a layer")
    for e in result["steps"]:
        print(f"step {e['cache']:24} {e['batch']:3} x {e['context']:6} {1e3 * e['seconds']:9.2f} ms")
    for e in result["skipped"]:
        what = " ".join(str(value) for name, value in e.items() if name != "reason")
        print(f"skipped: {what}: {e['reason']}")
    for e in result["wrong"]:
        print(f"wrong (more than {ALLOWED} off, or it failed): {e}")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
