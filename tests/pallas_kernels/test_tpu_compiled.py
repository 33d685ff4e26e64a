"""The TPU kernels through the real compiler, libtpu, at the sizes of real models and 32 k context; no TPU is needed."""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import pallas_kernels
from pallas_kernels import Accumulate, Accumulation, DecodeAttention, KeyRebuild, Quantize, RematProject, target
from pallas_kernels.eight_bits import quantize_matrix
from pallas_kernels.pallas_tpu import decode_attention
from tests.conftest import random_model, tiny_config
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.generation.programs import Arrivals, Slots, advance
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import Blocks, StreamSpec, allocate_blocks

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
BLOCKS = 32_768 // 128
LAYERS = 2


@pytest.fixture(params=TOPOLOGIES)
def device(request: pytest.FixtureRequest) -> Any:
    return topologies.get_topology_desc(TOPOLOGIES[request.param], "tpu").devices[0]


def shapes(tree: Any, device: Any) -> Any:
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def history(width: int, bits: int, axis: Any) -> Blocks:
    return jax.eval_shape(lambda: allocate_blocks(StreamSpec(width, bits, axis), (LAYERS, 1, BLOCKS)))


def compiled(function: Any, device: Any, *args: Any, donate: Any = ()) -> Any:
    with target.compiling_for("tpu", device.device_kind):
        return (
            jax.jit(function, donate_argnums=donate)
            .trace(*shapes(args, device))
            .lower(lowering_platforms=("tpu",))
            .compile()
        )


def run(call: Any) -> Any:
    return pallas_kernels.run(call, "pallas_tpu")


def shape(*size: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(size, dtype)


LARGEST = [  # of each form of the rebuild: these are compiled for a v5p and a v7x too, with half of the memory for them
    ("llama-3.1-8b", 3, "per_head", 16),
    ("llama-3.1-8b", 2, "joint", 1),
    ("llama-3.1-8b", 8, "stored", 1),
    ("llama-2-7b", 8, "x", 1),
    ("llama-2-7b", 3, "x int8", 8),
    ("llama-2-7b", 3, "x fp8", 8),
    ("llama-3.1-8b", 8, "cl int8", 1),
    ("qwen3-8b", 4, "per_head", 1),
]
OTHERS = [
    ("llama-3.1-8b", 4, "per_head", 1),
    ("llama-2-7b", 4, "x", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "model", "bits", "form", "new"),
    [
        (chip, *case)
        for chip in TOPOLOGIES
        for case in (LARGEST if chip in ("v5p", "v7x") else LARGEST + OTHERS)
        if ("int8" if chip == "v7x" else "fp8") not in case[2]
    ],
    indirect=["device"],
)
def test_decode_attention_compiles_and_copies_no_history(
    device: Any, model: str, bits: int, form: str, new: int
) -> None:
    width, heads, dim = 4096, 32, 128
    kv_heads = 32 if model == "llama-2-7b" else 8
    form, _, small = form.partition(" ")  # of the key rebuild matrix
    one = form in ("x", "cl")
    stored = {"x": width, "cl": 2 * kv_heads * dim}.get(form, kv_heads * dim)
    key = history(stored, bits, "token" if one or form == "stored" else "channel")
    value = None if one else history(stored, bits, "token")
    matrix = {"per_head": (kv_heads, dim, dim), "stored": None}.get(form, (stored, kv_heads * dim))
    rebuild = KeyRebuild(matrix and shape(*matrix), None, shape(dim) if model == "qwen3-8b" else None, 1e-6)
    if small:
        fields = jax.eval_shape(lambda w: quantize_matrix(w[None], small, 128), rebuild.matrix)
        rebuild = dataclasses.replace(
            rebuild, **{name: shape(*a.shape[1:], dtype=a.dtype) for name, a in fields.items()}
        )

    integers = {"dtype": jnp.int32}
    geometry = Geometry(shape(1, new, **integers), shape(**integers), shape(dim // 2, dtype=jnp.float32), dim**-0.5)
    call = DecodeAttention(
        shape(1, new, heads, dim),
        key,
        rebuild,
        value,
        shape(1, **integers),
        geometry,
        shape(**integers),
        num_kv_heads=kv_heads,
        value_heads=1 if one or form == "joint" else kv_heads,
    )
    memory = compiled(run, device, call).memory_analysis()
    permuted = rebuild.matrix.size * rebuild.matrix.dtype.itemsize if one else 0
    if device.device_kind == "TPU7x":
        permuted *= 2  # it goes through the sparse core
    assert memory.temp_size_in_bytes < permuted + 3 * 2**20  # queries and results, not a layer of the history


@pytest.mark.slow
@pytest.mark.parametrize(("width", "columns", "bits", "axis"), [(4096, 8192, 4, "token"), (1024, 1024, 3, "channel")])
def test_remat_project_compiles(device: Any, width: int, columns: int, bits: int, axis: str) -> None:
    blocks = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), history(width, bits, axis))
    call = RematProject(blocks, shape(width, columns))
    assert compiled(run, device, call).as_text().count("tpu_custom_call") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "stored", "dtype"),
    [
        (4096, (4, "token"), "bfloat16"),
        (1024, (3, "channel"), "bfloat16"),
        (2048, (2, "token", 256), "float32"),
    ],
)
def test_quantize_compiles(device: Any, width: int, stored: Any, dtype: Any) -> None:
    call = Quantize(shape(2, 4, 128, width, dtype=dtype), StreamSpec(width, *stored))
    program = compiled(run, device, call)
    assert program.as_text().count("tpu_custom_call") == 1
    assert program.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "stored", "predict", "lift"),
    [
        (2048, 2048, ((2048, 2048),), None),  # xquant-cl of llama-3.1-8b
        (2048, 2048, ((2048, 256), (256, 2048)), None),  # with rank=256
        (4096, 2048, (), (2048, 4096)),  # with predict=paper
        (4096, 4096, (), None),  # of llama-2-7b
        (4096, 4096, None, None),  # its base
    ],
)
def test_accumulate_compiles_and_adds_in_place(device: Any, width: int, stored: int, predict: Any, lift: Any) -> None:
    running_sum = jax.eval_shape(lambda: allocate_blocks(StreamSpec(width, 8), (1, BLOCKS)))
    accumulation = Accumulation(
        None if predict is None else tuple(shape(*size) for size in predict), None if lift is None else shape(*lift)
    )

    def add(running_sum: Blocks, call: Accumulate) -> Blocks:
        return run(call.replace(running_sum=running_sum))

    integers = {"dtype": jnp.int32}
    stream = history(stored, 2, "token")
    call = Accumulate(running_sum, stream, accumulation, shape(1, **integers), shape(**integers))
    memory = compiled(add, device, running_sum, call, donate=0).memory_analysis()
    assert memory.alias_size_in_bytes >= sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(running_sum))
    assert memory.temp_size_in_bytes < 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "kernels"),
    [("xquant:4", ("decode_attention", "quantize")), ("xquant-cl:2", ("decode_attention", "accumulate", "quantize"))],
)
def test_a_decode_loop_for_a_tpu_runs_the_kernels_and_copies_no_cache(cache: str, kernels: tuple[str, ...]) -> None:
    """The whole of `generate`, prefill and decode with a donated cache of 128 k tokens, compiled for a v5e."""
    device = topologies.get_topology_desc(TOPOLOGIES["v5e"], "tpu").devices[0]
    layers = 6
    sizes = {"width": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "num_layers": layers}
    config = tiny_config(**sizes, sliding_windows=(None,) * layers, dtype="bfloat16")
    model = random_model(config)
    cache_config = CacheConfig.parse(cache)
    cache = jax.eval_shape(lambda: allocate(cache_config, config, batch=2, tokens=131_072))
    method_params = cache_config.method_params(model.source)
    slots, arrivals = Slots.free(2, config.vocab_size, 8), Arrivals.of([None] * 2, 128, 8)
    rest = (np.ones(2, bool), np.int32(64), np.bool_(False), arrivals)
    args = shapes((model.params, method_params, slots, cache, *rest), device)
    with target.compiling_for("tpu", device.device_kind):
        lowered = advance.trace(model.transformer, *args, chunk=128).lower(lowering_platforms=("tpu",))
        done = lowered.compile()
    text = done.as_text()
    assert all(f"%{kernel}." in text for kernel in kernels)
    memory = done.memory_analysis()
    size = cache_bytes(cache).total
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.1 * size


def test_what_the_kernel_cannot_take_is_said() -> None:
    def refusal(
        width: int = 256,
        dim: int = 64,
        new: int = 1,
        axis: Any = "channel",
        group: int = 0,
        bits: int = 4,
        dense: Any = None,
    ):
        key = jax.eval_shape(lambda: allocate_blocks(StreamSpec(width, bits, axis, group), (1, 1, 1)))
        value = jax.eval_shape(lambda: allocate_blocks(StreamSpec(width, 4, "token"), (1, 1, 1)))
        q = jnp.zeros((1, new, 4, dim))
        geometry = Geometry(jnp.zeros((1, new), jnp.int32), 8, jnp.zeros(dim // 2), 1.0)
        heads = width // dim
        call = DecodeAttention(q, key, KeyRebuild(dense), value, jnp.zeros(1), geometry, 0, heads, heads)
        return decode_attention.refuse(call)

    assert refusal() is None
    assert "head dimension 32 is neither 64 nor a multiple of 128" in (refusal(dim=32) or "")
    assert "up to 16 new tokens, and these are 17" in (refusal(new=17) or "")
    assert "groups of 32 tokens" in (refusal(group=32) or "")
    assert "groups of 64 channels" in (refusal(axis="token", group=64) or "")
    assert "is not quantized" in (refusal(bits=16) or "")
    assert "narrower than 128" in (refusal(width=64) or "")
    with target.compiling_for("tpu", "TPU v5p"):
        dense = shape(8192, 2560)
        assert refusal(width=8192, dense=dense) is None
        assert "and the results of 16 new tokens take" in (refusal(width=8192, new=16, dense=dense) or "")
