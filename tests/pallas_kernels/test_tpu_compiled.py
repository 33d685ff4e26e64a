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
from benchmarks.models import decode_shape, sum_shape
from pallas_kernels import Accumulate, Accumulation, DecodeAttention, KeyRebuild, Quantize, RematProject, target
from pallas_kernels.chips import TPUS
from pallas_kernels.pallas_tpu import decode_attention
from pallas_kernels.shapes import history
from tests.conftest import random_model, tiny_config
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.generation.decode import advance
from xquant_jax.generation.prefill import feed
from xquant_jax.generation.slots import Arrivals, Slots
from xquant_jax.numerics.attention import Geometry
from xquant_jax.numerics.quantization import Blocks, StreamSpec, allocate_blocks

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

BLOCKS = 32_768 // 128
LAYERS = 2


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Any:
    """Of a kind of TPU. Each case has one or two of them: a v5p and a v7x have half of the memory for kernels, and what
    lowers for them lowers for a v5e and a v6e, whose vector units are the same; those two each have what is theirs.
    `test_static_tpu` compiles the commonest cache for them."""
    return topologies.get_topology_desc(TPUS[request.param].topology, "tpu").devices[0]


def shapes(tree: Any, device: Any) -> Any:
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "model", "cache", "new"),
    [
        ("v5p", "Llama-3.1-8B", "xquant:3", 16),
        ("v7x", "Llama-3.1-8B", "xquant:2,basis=joint", 1),
        ("v5p", "Llama-3.1-8B", "int8", 1),
        ("v5p", "Llama-2-7B", "xquant:8", 1),
        ("v5p", "Llama-2-7B", "xquant:3,rebuild_dtype=int8", 8),
        ("v7x", "Llama-2-7B", "xquant:3,rebuild_dtype=fp8", 1),
        ("v6e", "Llama-3.1-8B", "xquant-cl:2,rebuild_dtype=int8", 1),
        ("v6e", "Qwen3-8B", "xquant:4", 1),
        ("v5p", "Gemma-3-1B", "xquant:4", 4),
    ],
    indirect=["device"],
)
def test_decode_attention_compiles_and_copies_no_history(device: Any, model: str, cache: str, new: int) -> None:
    call = decode_shape(model, cache).call(layers=LAYERS, batch=1, blocks=BLOCKS, new=new)
    memory = compiled(run, device, call).memory_analysis()
    matrix = call.key_rebuild.matrix
    permuted = matrix.size * matrix.dtype.itemsize if call.value_stream is None else 0
    if device.device_kind == "TPU7x":
        permuted *= 2  # it goes through the sparse core
    assert memory.temp_size_in_bytes < permuted + 3 * 2**20  # queries and results, not a layer of the history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "width", "columns", "bits", "axis"),
    [("v5p", 4096, 8192, 4, "token"), ("v7x", 1024, 1024, 3, "channel")],
    indirect=["device"],
)
def test_remat_project_compiles(device: Any, width: int, columns: int, bits: int, axis: Any) -> None:
    call = RematProject(history(StreamSpec(width, bits, axis), 1, BLOCKS), shape(width, columns))
    assert compiled(run, device, call).as_text().count("tpu_custom_call") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "width", "stored", "dtype"),
    [
        ("v5p", 4096, {"bits": 4}, "bfloat16"),
        ("v7x", 1024, {"bits": 3, "axis": "channel"}, "bfloat16"),
        ("v5e", 2048, {"bits": 2, "group": 256}, "float32"),
        ("v6e", 4096, {"bits": 2, "clip": True}, "bfloat16"),
    ],
    indirect=["device"],
)
def test_quantize_compiles(device: Any, width: int, stored: Any, dtype: Any) -> None:
    call = Quantize(shape(2, 4, 128, width, dtype=dtype), StreamSpec(width, **stored))
    program = compiled(run, device, call)
    assert program.as_text().count("tpu_custom_call") == 1
    assert program.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "model", "cache", "base"),
    [
        ("v6e", "Llama-3.1-8B", "xquant-cl:2", False),
        ("v5e", "Llama-3.1-8B", "xquant-cl:2,rank=256", False),
        ("v7x", "Llama-3.1-8B", "xquant-cl:2,predict=paper", False),
        ("v5p", "Llama-2-7B", "xquant-cl:2", False),
        ("v7x", "Llama-2-7B", "xquant-cl:2", False),
        ("v5p", "Llama-2-7B", "xquant-cl:2", True),  # the layer that a sum begins with
    ],
    indirect=["device"],
)
def test_accumulate_compiles_and_adds_in_place(device: Any, model: str, cache: str, base: bool) -> None:
    call = sum_shape(model, cache).call(layers=LAYERS, batch=1, blocks=BLOCKS)
    if base:
        call = dataclasses.replace(call, accumulation=Accumulation(None))

    def add(running_sum: Blocks, call: Accumulate) -> Blocks:
        return run(dataclasses.replace(call, running_sum=running_sum))

    running_sum = call.running_sum
    memory = compiled(add, device, running_sum, call, donate=0).memory_analysis()
    assert memory.alias_size_in_bytes >= sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(running_sum))
    assert memory.temp_size_in_bytes < 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "kernels"),
    [("xquant:4", ("decode_attention", "quantize")), ("xquant-cl:2", ("decode_attention", "accumulate", "quantize"))],
)
def test_programs_for_a_tpu_copy_no_cache_and_decoding_runs_the_kernels(cache: str, kernels: tuple[str, ...]) -> None:
    """With a donated cache of 128 k tokens, compiled for a v5e."""
    device = topologies.get_topology_desc(TPUS["v5e"].topology, "tpu").devices[0]
    layers = 6
    sizes = {"width": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "num_layers": layers}
    config = tiny_config(**sizes, sliding_windows=(None,) * layers, dtype="bfloat16")
    model = random_model(config)
    cache_config = CacheConfig.parse(cache)
    cache = jax.eval_shape(lambda: allocate(cache_config, config, batch=2, tokens=131_072))
    method_params = cache_config.method_params(model.source)
    slots, live = Slots.free(2, config.vocab_size, 8), np.ones(2, bool)
    parts = shapes((model.params, method_params, None, slots, cache), device)
    arriving = shapes((Arrivals.of([[None]] * 2, 128, 8), live), device)
    with target.compiling_for("tpu", device.device_kind):
        fed = feed.trace(model.transformer, *parts, *arriving, chunk=128)
        decoded = advance.trace(model.transformer, *parts, *shapes((live, np.int32(64), np.bool_(False)), device))
        programs = [traced.lower(lowering_platforms=("tpu",)).compile() for traced in (fed, decoded)]
    text = programs[1].as_text()
    assert all(f"%{kernel}." in text for kernel in kernels)
    size = cache_bytes(cache).total
    for program in programs:
        memory = program.memory_analysis()
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
        call = DecodeAttention(q, key, KeyRebuild(dense), value, jnp.zeros(1), geometry, 0, heads, heads, jnp.zeros(1))
        return decode_attention.refuse(call)

    assert refusal() is None
    assert "head dimension 32 is neither 64 nor a multiple of 128" in (refusal(dim=32) or "")
    assert "up to 16 new tokens, and these are 17" in (refusal(new=17) or "")
    assert "groups of 32 tokens" in (refusal(group=32) or "")
    assert "groups of 64 channels; it takes multiples of 128: choose group=128" in (
        refusal(axis="token", group=64) or ""
    )
    assert "is not quantized" in (refusal(bits=16) or "")
    assert "3 key/value heads of dimension 64 are 192 channels, no multiple of 128" in (refusal(width=192) or "")
    with target.compiling_for("tpu", "TPU v5p"):
        dense = shape(8192, 2560)
        assert refusal(width=8192, dense=dense) is None
        assert "and the results of 16 new tokens take" in (refusal(width=8192, new=16, dense=dense) or "")
