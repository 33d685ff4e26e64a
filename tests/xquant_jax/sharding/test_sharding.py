"""A model and its cache on a mesh of eight (simulated) devices: the same answers, an eighth of the bytes each."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xquant_jax as xq
from converters import convert
from converters.shards import Tensor
from tests.checkpoints import write_checkpoint
from tests.conftest import counted_compilations, forget_programs, random_tokens
from xquant_jax import sharding
from xquant_jax.cache.append import append
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.flush import flush, flush_when_due
from xquant_jax.cache.partition import cache_specs, constrain_cache
from xquant_jax.cache.state import Cache, allocate, cache_bytes
from xquant_jax.generation import batch, buckets
from xquant_jax.generation.request import Options, Request
from xquant_jax.model.loading import Model
from xquant_jax.model.transformer import forward

SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
BY_HEAD = ["bf16", "int8,group=8", "fp8", "kivi:2,group=8,rope=post", "xquant:4,group=8,rotate=true"]
WHOLE = ["kivi:4", "fp8,scale=token", "xquant:4,basis=joint", "xquant:8,value_basis=joint", "kvquant:3"]
ACROSS_LAYERS = ["xquant-cl:2,first=1@4,predict=latent", "xquant-cl:4,first=2@4,predict=paper,accumulator=bf16"]
MULTI_HEAD = ["xquant:4", "xquant:3,rebuild_dtype=int8", "xquant-cl:4,first=1@4,input=residual"]
EVERY = [(spec, False) for spec in BY_HEAD + WHOLE + ACROSS_LAYERS] + [(spec, True) for spec in MULTI_HEAD]
BY_HEAD_ROTATED, LATENT = BY_HEAD[-1], ACROSS_LAYERS[0]
ANSWERED = [  # how it is quantized is nothing to a mesh, only how it lies: by head, whole, in latents, with sums
    (BY_HEAD_ROTATED, False, SHAPES[3]),
    ("kivi:4", False, SHAPES[2]),  # what cannot be split by head is split by block instead
    (LATENT, False, SHAPES[1]),
    ("xquant:3,rebuild_dtype=int8", True, SHAPES[3]),
]
TOKENS = 2**20
"""Enough that a tile's temporaries are nothing beside the cache, of which only shapes are made."""

LENGTHS = (300, 5, 131, 127, 128, 250, 17, 60)
PROMPTS, NEW = (260, 5, 120, 127, 128, 250, 117, 140), 12
"""Lengths of prompts, and new tokens: four cross a flush, at several moments, and one has no history."""


@pytest.fixture(scope="module", autouse=True)
def eight_devices() -> None:
    if jax.device_count() < 8:
        pytest.skip(f"{jax.device_count()} {jax.default_backend()} devices; these tests simulate eight on CPU")


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    yield
    forget_programs()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether every query head has a key/value head of its own."""
    names = {False: "grouped", True: "multi_head"}
    return {
        multi_head: write_checkpoint(tmp_path_factory.mktemp(name), multi_head=multi_head)
        for multi_head, name in names.items()
    }


@pytest.fixture(scope="module")
def models(directories: dict[bool, Path]) -> dict[bool, xq.Model]:
    return {multi_head: xq.load(directory) for multi_head, directory in directories.items()}


@pytest.fixture(scope="module")
def on_mesh(directories: dict[bool, Path]) -> xq.Model:
    return xq.load(directories[False], mesh=xq.make_mesh(2, 2, 2))


@pytest.fixture(autouse=True)
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for `xquant calibrate`: levels that are not evenly spaced."""

    def calibrated(self: Model, need: Any) -> dict[str, jax.Array]:
        rising = jnp.linspace(0, 1, 2**need.bits) ** 1.2
        return {name: jnp.tile(rising, (self.config.num_layers, 1)) for name in ("key", "value")}

    monkeypatch.setattr(Model, "calibrated", calibrated)


def prompts_of(model: xq.Model) -> list[list[int]]:
    return [random_tokens(model.config, length, seed=length).tolist() for length in PROMPTS]


def answers(model: xq.Model, spec: str, mesh: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens and log-probabilities [8, NEW] of ragged prompts, across flushes."""
    options: dict[str, Any] = {"stop_ids": [], "prefill_chunk": 64, "max_new_tokens": NEW}
    results = xq.generate(model, prompts_of(model), cache=spec, mesh=mesh, **options).results
    return np.asarray([r.tokens for r in results]), np.asarray([r.logprobs for r in results])


@pytest.fixture(scope="module")
def alone(models: dict[bool, xq.Model]) -> Callable[[str, bool], tuple[np.ndarray, np.ndarray, float]]:
    """By cache and model: what one device answers, and how far the logits of its answers reach."""

    @functools.cache
    def answer(spec: str, multi_head: bool) -> tuple[np.ndarray, np.ndarray, float]:
        model = models[multi_head]
        tokens, logprobs = answers(model, spec)
        score = jax.jit(functools.partial(model.transformer.apply, method="score"))
        return tokens, logprobs, float(np.ptp(jax.nn.log_softmax(score({"params": model.params}, tokens))))

    return answer


@pytest.mark.parametrize(("spec", "multi_head", "shape"), ANSWERED)
def test_same_answers(
    models: dict[bool, xq.Model], alone: Callable, spec: str, multi_head: bool, shape: tuple[int, int, int]
) -> None:
    tokens, logprobs, extent = alone(spec, multi_head)
    on_mesh, their_logprobs = answers(models[multi_head], spec, xq.make_mesh(*shape))
    np.testing.assert_array_equal(tokens, on_mesh)
    np.testing.assert_allclose(their_logprobs, logprobs, rtol=0, atol=1e-5 * extent)


def flushed(model: xq.Model, spec: str) -> Cache:
    """A chunk of 300 vectors and then one at a time, rows advancing apart."""
    counts = [LENGTHS, *np.random.default_rng(0).integers(0, 2, (6, 8))]  # some rows are at 127 and 128 tokens
    cache_config, random = CacheConfig.parse(spec), np.random.default_rng(1)
    method_params = model.method_params(cache_config)
    chunk = jax.jit(lambda cache, new, counts: flush(append(cache, new, counts), method_params))
    one = jax.jit(lambda cache, new, counts: flush_when_due(append(cache, new, counts), method_params))
    cache = allocate(cache_config, model.config, batch=8, tokens=1024)
    for count in counts:
        length = max(count)
        new = tuple(
            {
                name: random.normal(size=(*window.shape[:2], length, window.shape[3])).astype(np.float32)
                for name, window in segment.window.items()
            }
            for segment in cache.segments
        )
        cache = (one if length == 1 else chunk)(cache, new, np.asarray(count, np.int32))
    return cache


@pytest.fixture(scope="module")
def flushed_alone(models: dict[bool, xq.Model]) -> Callable[[str], Cache]:
    return functools.cache(lambda spec: flushed(models[False], spec))


@pytest.mark.parametrize(("spec", "shape"), [("kivi:4", SHAPES[3]), ("kvquant:3", SHAPES[2]), (LATENT, SHAPES[1])])
def test_flushes_write_the_same_bits(
    models: dict[bool, xq.Model], flushed_alone: Callable[[str], Cache], spec: str, shape: tuple[int, int, int]
) -> None:
    """Of the same vectors, windows and histories agree."""
    expected, mesh = flushed_alone(spec), xq.make_mesh(*shape)
    with jax.set_mesh(mesh):
        found = flushed(models[False].on(mesh), spec)
    np.testing.assert_array_equal(found.history_blocks, expected.history_blocks)
    for mine, theirs in zip(found.segments, expected.segments, strict=True):
        jax.tree.map(np.testing.assert_array_equal, (mine.history, mine.sink), (theirs.history, theirs.sink))
        for name, window in mine.window.items():
            for row, count in enumerate(expected.window_lengths):
                np.testing.assert_array_equal(window[:, row, :count], theirs.window[name][:, row, :count])


@pytest.mark.parametrize(
    ("spec", "multi_head", "shape"), [(*case, SHAPES[i % len(SHAPES)]) for i, case in enumerate(EVERY)]
)
def test_every_device_holds_its_share(
    models: dict[bool, xq.Model], spec: str, multi_head: bool, shape: tuple[int, int, int]
) -> None:
    config = models[multi_head].config
    sizes: dict[str, Any] = {"batch": 8, "tokens": 1024}
    whole = cache_bytes(jax.eval_shape(lambda: allocate(CacheConfig.parse(spec), config, **sizes)))
    mesh = xq.make_mesh(*shape)
    with jax.set_mesh(mesh):
        cache = allocate(CacheConfig.parse(spec), config, **sizes)
    held = dict.fromkeys(mesh.devices.flat, 0)
    for array in jax.tree.leaves(cache):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    first_tokens = sum(a.nbytes for segment in cache.segments for a in segment.sink.values())  # of kvquant: not split
    assert cache_bytes(cache) == whole
    assert len(set(held.values())) == 1
    assert held[mesh.devices.flat[0]] <= whole.total / 8 + first_tokens + 128  # 128: four numbers for every sequence


@pytest.mark.optimized
@pytest.mark.parametrize("spec", [BY_HEAD_ROTATED, "kvquant:3"])
def test_history_never_travels(models: dict[bool, xq.Model], spec: str) -> None:
    """The compiled step copies nothing that is as large as a layer's history, and exchanges nothing of the kind."""
    mesh, cache_config = xq.make_mesh(2, 2, 2), CacheConfig.parse(spec)
    model = models[False].on(mesh)
    with jax.set_mesh(mesh):
        method_params = model.method_params(cache_config)
        cache = jax.eval_shape(lambda: allocate(cache_config, model.config, batch=8, tokens=TOKENS))
        shardings = sharding.named(cache_specs(cache), mesh)
        cache = jax.tree.map(lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), cache, shardings)

        def step(params: Any, method_params: Any, tokens: Any, cache: Cache) -> Any:
            logits, cache = forward(model.transformer, params, tokens, cache, method_params, jnp.ones(8, jnp.int32))
            return logits, constrain_cache(flush_when_due(cache, method_params))

        tokens = jax.ShapeDtypeStruct((8, 1), jnp.int32)
        compiled = jax.jit(step, donate_argnames="cache").lower(model.params, method_params, tokens, cache).compile()
    memory, own = compiled.memory_analysis(), cache_bytes(cache).total / 8
    assert memory.alias_size_in_bytes >= own
    assert memory.temp_size_in_bytes < 0.1 * own
    results = re.findall(
        r" = \(?(\w+)\[([\d,]+)\].* (?:all-gather|all-to-all|collective-permute)\(", compiled.as_text()
    )
    assert results
    values_of_a_layer = 8 * TOKENS * 64 / 8
    assert all(math.prod(map(int, dims.split(","))) < 0.01 * values_of_a_layer for _, dims in results)


def test_weights_are_read_shard_by_shard(
    directories: dict[bool, Path], models: dict[bool, xq.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From both kinds of directories; of a Hugging Face directory no process reads more than its devices hold."""
    mesh = xq.make_mesh(2, 2, 2)
    converted = convert(directories[False], tmp_path / "converted", progress=False)
    expected = models[False].on(mesh)
    read = []
    read_part = Tensor.read_part

    def counted(self: Tensor, index: Any) -> np.ndarray:
        read.append(read_part(self, index))
        return read[-1]

    def refused(self: Tensor) -> np.ndarray:
        raise AssertionError(f"{self} was read whole")

    monkeypatch.setattr(Tensor, "read_part", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "read", refused)
        from_source = xq.load(directories[False], mesh=mesh)
    assert max(part.size for part in read) == 64 * 128 // 2  # half of a query matrix: tensor=2
    assert sum(part.nbytes for part in read) == sum(a.nbytes for a in jax.tree.leaves(expected.params))

    for model in (from_source, xq.load(converted, mesh=mesh)):
        for mine, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected.params), strict=True):
            assert mine.sharding.is_equivalent_to(theirs.sharding, mine.ndim)
            np.testing.assert_array_equal(mine, theirs)
        for spec in (BY_HEAD_ROTATED, LATENT):
            method_params = model.method_params(CacheConfig.parse(spec))
            alone = models[False].method_params(CacheConfig.parse(spec))
            jax.tree.map(np.testing.assert_array_equal, method_params, alone)


def test_a_second_call_on_a_mesh_compiles_nothing(on_mesh: xq.Model) -> None:
    first, _ = answers(on_mesh, BY_HEAD_ROTATED)
    with counted_compilations() as compiled:
        answers(on_mesh, BY_HEAD_ROTATED)
        options: dict[str, Any] = {"cache": BY_HEAD_ROTATED, "stop_ids": [], "prefill_chunk": 64, "max_new_tokens": 2}
        streamed = list(xq.stream(on_mesh, prompts_of(on_mesh), **options))
    assert compiled == []
    assert {token.index: token.token for token in streamed} == dict(enumerate(first[:, 1]))


def test_a_batch_of_slots_on_a_mesh(on_mesh: xq.Model, alone: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 64)  # one program for all prompts
    requests = [Request(prompt, 5 + i, stop_ids=[]) for i, prompt in enumerate(prompts_of(on_mesh))]
    options = Options(BY_HEAD_ROTATED, prefill_chunk=64, slots=4)
    found = {a.index: a for a in batch.prepare(on_mesh, options).answers(requests)}
    for index, tokens in enumerate(alone(BY_HEAD_ROTATED, False)[0]):
        assert found[index].completion.tokens == tokens[: 5 + index].tolist()


@pytest.mark.parametrize(
    ("shape", "prompts", "message"),
    [
        ((1, 1, 3), 8, "takes 3 devices, and there are 8"),
        (
            (8, 1, 1),
            3,
            "3 prompts cannot be split over data=8; give a multiple of 8 prompts, or a mesh with data=1 or 3",
        ),
    ],
)
def test_what_does_not_divide_is_an_error(
    models: dict[bool, xq.Model], shape: tuple[int, int, int], prompts: int, message: str
) -> None:
    with pytest.raises(xq.ConfigError, match=message):
        xq.generate(models[False], [[1, 2]] * prompts, mesh=xq.make_mesh(*shape))


def test_weights_that_do_not_divide_are_an_error() -> None:
    message = "num_attention_heads=4 cannot be split over tensor=8; for this model tensor can be 1 or 2"
    with pytest.raises(xq.ConfigError, match=message):
        xq.load("demo", mesh=xq.make_mesh(tensor=8))


def test_meshes_are_named_in_words() -> None:
    assert sharding.parse_mesh("data=2,tensor=4") == {"data": 2, "tensor": 4}
    for wrong in ("data", "model=2", "data=0", "data=2,data=2", "data=x", ""):
        with pytest.raises(xq.ConfigError, match="mesh"):
            sharding.parse_mesh(wrong)
    with pytest.raises(xq.ConfigError, match="make_mesh"):
        sharding.checked(jax.make_mesh((8,), ("model",)))


def test_a_model_on_one_mesh_is_not_moved_to_another(on_mesh: xq.Model) -> None:
    with pytest.raises(xq.ConfigError, match="load it with mesh"):
        xq.generate(on_mesh, [[1, 2]] * 8, mesh=xq.make_mesh(8))
