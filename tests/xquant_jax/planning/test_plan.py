"""`xquant plan`: bytes that are really allocated, operations that are really done, and what follows from them."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import dot_general_p

import pallas_kernels.xla
from tests.conftest import GOLDEN, random_model, tiny_config
from xquant_jax.cache.config import METHODS, CacheConfig
from xquant_jax.cache.state import allocate, cache_bytes
from xquant_jax.cli import main
from xquant_jax.config import ModelConfig
from xquant_jax.errors import ConfigError
from xquant_jax.model.transformer import forward
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.planning import plan as planning
from xquant_jax.planning.costs import Costs
from xquant_jax.planning.counting import Operations, count, step_operations
from xquant_jax.planning.devices import Device, find_device, read_devices
from xquant_jax.planning.plan import PAPER_RIDGE, default_specs, hidden_below, plan, read_config

NEEDS_MATPLOTLIB = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the plot extra")

CONFIGS = GOLDEN / "configs"
GROUPED, MULTI_HEAD = str(CONFIGS / "Llama-3.1-8B.json"), str(CONFIGS / "Llama-2-7b-hf.json")


@pytest.fixture(scope="module")
def grouped() -> ModelConfig:
    return read_config(GROUPED)


@pytest.fixture(scope="module")
def multi_head() -> ModelConfig:
    return read_config(MULTI_HEAD)


def costs(config: ModelConfig, spec: str) -> Costs:
    return Costs(config, CacheConfig.parse(spec))


def test_the_limits_of_the_paper_come_out(grouped: ModelConfig, multi_head: ModelConfig) -> None:
    """Section 3.4: ridge 378, 2 bits."""
    assert PAPER_RIDGE == 378
    assert int(hidden_below(multi_head, PAPER_RIDGE, 2) or 0) == 2281
    assert int(hidden_below(grouped, PAPER_RIDGE, 2) or 0) == 40627
    assert hidden_below(grouped, 20_000.0, 2) is None  # loading a token always takes longer than rebuilding it


@pytest.mark.parametrize(
    ("spec", "per_token"),
    [
        ("bf16", 16_384),  # scores and values, 2 H d each
        ("kivi:2", 16_384),
        ("xquant:4", 16_384 + 2 * 8 * 128 * 128),  # and one d x d matrix for the keys of each of 8 heads
        ("xquant:2,basis=joint", 2 * 1024 * 1024 + 8_192 + 2 * 32 * 1024),  # and values of R instead of d channels
        ("xquant:4,value_basis=joint", 2 * 8 * 128 * 128 + 8_192 + 2 * 32 * 1024),
    ],
)
def test_operations_of_a_cached_token_and_layer_in_decode(grouped: ModelConfig, spec: str, per_token: int) -> None:
    """Against formulas: two steps that differ by 128 cached tokens."""
    flops = [costs(grouped, spec).decode(1, context)[0] for context in (1024, 1024 + BLOCK)]
    assert flops[1] - flops[0] == 32 * BLOCK * per_token


def test_operations_of_rebuilding_from_x_and_of_differences(grouped: ModelConfig, multi_head: ModelConfig) -> None:
    """K = H: 2 D^2 for keys; values absorbed, D channels wide. CL, K < H: up to x (2 D 2R) in 30 layers, then keys."""

    def per_token(config: ModelConfig, spec: str) -> float:
        flops = [costs(config, spec).decode(1, context)[0] for context in (1024, 1024 + BLOCK)]
        return (flops[1] - flops[0]) / BLOCK

    D, R, attention = 4096, 1024, 2 * 32 * 128
    from_x = 2 * D * D + attention + 2 * 32 * D
    assert per_token(multi_head, "xquant:4") == 32 * from_x
    joint = 2 * R * R + attention + 2 * 32 * R
    summed = 2 * D * 2 * R + 2 * D * R + attention + 2 * 32 * D
    assert per_token(grouped, "xquant-cl:2,predict=paper") == 2 * joint + 30 * summed


def test_loops_of_known_length_count_and_others_are_kept_apart() -> None:
    matrix = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def function(a: jax.Array, rounds: jax.Array) -> jax.Array:
        a, _ = jax.lax.scan(lambda c, _: (c @ c, None), a, length=3)
        a = jax.lax.cond(rounds > 0, lambda x: x @ x, lambda x: x, a)
        return jax.lax.fori_loop(0, rounds, lambda _, x: jax.jit(jnp.dot)(x, x) @ x, a)

    jaxpr = jax.make_jaxpr(function)(matrix, jax.ShapeDtypeStruct((), jnp.int32))
    assert count(jaxpr) == Operations(once=(3 + 1) * 128, per_round=2 * 128)


@pytest.mark.parametrize("spec", ["xquant:2,basis=joint", "xquant-cl:2,predict=latent,rank=16"])
def test_bytes_are_those_that_a_compiled_step_is_given(spec: str) -> None:
    """Weights, factors and cache against the compiler's account of a decode step's arguments."""
    sizes = {"width": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "num_layers": 4}
    config = tiny_config(**sizes, sliding_windows=(None,) * 4, dtype="bfloat16")
    model, cache_config = random_model(config), CacheConfig.parse(spec)

    method_params = cache_config.method_params(model.source)
    stored = jax.eval_shape(lambda: allocate(cache_config, config, batch=2, tokens=1000))
    step = jax.jit(partial(forward, model.transformer), keep_unused=True)
    arguments = (model.params, jnp.zeros((2, 1), jnp.int32), stored, method_params, jnp.ones(2, jnp.int32))
    memory = step.lower(*arguments).compile().memory_analysis()
    known = {id(leaf) for leaf in jax.tree.leaves(model.params)}
    seen: set[int] = set()
    again = 0  # leaves that are passed a second time, but held once
    for leaf in jax.tree.leaves(method_params):
        again += leaf.nbytes if id(leaf) in known | seen else 0
        seen.add(id(leaf))
    cost = costs(config, spec)
    sequences = 2 * 2 * 4  # tokens and counts
    # not exactly: directions of layers below the base are held too, though no layer reads them
    given = memory.argument_size_in_bytes - again - sequences
    assert cost.total(2, 1000) == (pytest.approx(given, rel=0.01) if "rank" in spec else given)


@pytest.mark.parametrize("spec", ["bf16", "xquant:3", "xquant-cl:2"])
def test_the_largest_context_and_batch_fit_and_more_does_not(spec: str) -> None:
    config = read_config("demo")
    device = Device("small", flops=1e14, bandwidth=1e12, memory=2**30, source="")
    row = plan(config, device, context=20_000, batch=7, specs=[spec]).rows[0]
    cost, usable = costs(config, spec), int(0.9 * 2**30)

    def fits(batch: int, context: int) -> bool:
        shapes = jax.eval_shape(lambda: allocate(CacheConfig.parse(spec), config, batch=batch, tokens=context))
        return cost.weights + cost.method_params + cache_bytes(shapes).total <= usable

    assert fits(7, row.largest_context)
    assert not fits(7, row.largest_context + 1)
    assert fits(row.largest_batch, 20_000)
    assert not fits(row.largest_batch + 1, 20_000)


def test_times_are_those_of_the_roofline(grouped: ModelConfig) -> None:
    """bf16 KV by hand: all weights but the embedding's rows, and 131,072 bytes a token; prefill at full rate."""
    device = Device("round", flops=1e14, bandwidth=1e12, memory=100 * 2**30, source="")
    row = plan(grouped, device, context=16_384, batch=4, specs=["bf16"]).rows[0]
    window = 4 * 128 * 131_072
    read = 2 * (8_030_261_248 - 128_256 * 4096) + 4 * 16_384 * 131_072 + window
    assert row.decode.bytes == read
    assert row.decode.seconds == pytest.approx(read / 1e12)
    assert row.tokens_per_second == pytest.approx(4 / row.decode.seconds)
    assert row.decode.bound == "memory"
    matrices = 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096  # without embedding, head and norms
    products = 2 * 4 * 16_384 * matrices
    attention = 4 * 32 * 16_384 * (4 * 32 * 128) * (16_384 - 512) / 2  # to all chunks before
    assert row.prefill_s * 1e14 == pytest.approx(products + attention, rel=0.02)


def test_memory_bound_and_compute_bound_meet_at_the_ridge() -> None:
    device = find_device("A100")
    assert device.ridge == pytest.approx(153, abs=0.1)
    moved = np.asarray([1.0, 1.0, 1.0])
    flops = device.ridge * np.asarray([0.5, 1.0, 2.0])
    np.testing.assert_allclose(device.seconds(flops, moved) * device.bandwidth, [1, 1, 2])


def test_layers_with_a_sliding_window_read_no_more_than_it() -> None:
    config = read_config(CONFIGS / "Mistral-7B-v0.1.json")
    mistral, window = costs(config, "xquant:4"), 4096
    assert mistral.decode(3, 100_000) == mistral.decode(3, window)
    half = dataclasses.replace(config, sliding_windows=(window, None) * 16)
    whole = dataclasses.replace(config, sliding_windows=(None,) * 32)
    bytes_read = [costs(c, "xquant:4").decode(3, 100_000)[1] for c in (config, half, whole)]
    assert bytes_read[1] == pytest.approx((bytes_read[0] + bytes_read[2]) / 2)


@contextmanager
def products_counted() -> Iterator[list[int]]:
    """Operations of every matrix product that is computed inside, loops turn by turn."""
    done: list[int] = []
    bind = dot_general_p.bind

    def counted(left: Any, right: Any, **params: Any) -> Any:
        out = bind(left, right, **params)
        if not isinstance(out, jax.core.Tracer):  # else its shape alone is asked for
            ((contracted, _), _) = params["dimension_numbers"]
            done.append(2 * out.size * math.prod(left.shape[axis] for axis in contracted))
        return out

    def loop(lower: Any, upper: Any, body: Any, state: Any) -> Any:  # JAX's own gives numbers that are no arrays
        for turn in range(int(lower), int(upper)):
            state = body(jnp.int32(turn), state)
        return state

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(dot_general_p, "bind", counted)
        patch.setattr(jax.lax, "fori_loop", loop)
        yield done


def test_operations_are_those_of_a_step_that_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain layer, the base and one above: with a sliding window they attend to three blocks of nine, and those of
    the running sum add nine to it."""
    monkeypatch.setattr(pallas_kernels.xla, "TILE_BLOCKS", 1)  # as plan counts them: block by block
    config, spec = tiny_config(num_layers=3, sliding_windows=(3 * BLOCK, None, 3 * BLOCK)), "xquant-cl:2,first=2@4"
    model, cache_config = random_model(config), CacheConfig.parse(spec)
    stored = allocate(cache_config, config, batch=1, tokens=9 * BLOCK)
    stored = dataclasses.replace(stored, lengths=jnp.array([9 * BLOCK]), history_blocks=jnp.array([9]))
    method_params = cache_config.method_params(model.source)
    with products_counted() as done:
        forward(model.transformer, model.params, jnp.zeros((1, 1), jnp.int32), stored, method_params, jnp.ones(1, int))
    planned = costs(config, spec).decode(1, 9 * BLOCK)[0]
    assert sum(done) == planned - step_operations(config, cache_config, 1).flush / BLOCK


def test_a_running_sum_is_moved_whole_and_streams_as_far_as_windows_reach() -> None:
    """xquant-cl on windows of 2 blocks, 5 blocks stored: the base and a layer above it, below them a plain layer."""
    windows = (2 * BLOCK,) * 3
    config = tiny_config(num_layers=3, num_kv_heads=4, sliding_windows=windows, dtype="bfloat16")
    moved = [costs(config, "xquant-cl:2,first=2@4").decode(1, blocks * BLOCK)[1] for blocks in (1, 5)]
    scales = 4 * BLOCK  # one group of 32 channels a token
    plain, base, above = (BLOCK * 32 * bits // 8 + scales for bits in (4, 4, 2))
    running_sum = BLOCK * 32 + scales
    assert moved[1] - moved[0] == (2 - 1) * plain + (5 - 1) * (base + above + 2 * 2 * running_sum)


def test_every_method_and_width_is_planned(grouped: ModelConfig, multi_head: ModelConfig) -> None:
    for config in (grouped, multi_head):
        specs = default_specs(config)
        assert {CacheConfig.parse(spec).method.name for spec in specs} == set(METHODS)
        assert {f"xquant:{bits}" for bits in (2, 3, 4, 8)} <= set(specs)
        resolved = [next(iter(CacheConfig.parse(s).segments(config)[-1])) for s in specs]
        assert len(set(resolved)) == len(specs)
    assert "xquant:4,basis=joint" in default_specs(grouped)
    assert not any("basis" in spec for spec in default_specs(multi_head))


def test_rebuilding_buys_capacity_for_multi_head_models_and_speed_for_grouped_queries(
    grouped: ModelConfig, multi_head: ModelConfig
) -> None:
    device = find_device("H200")
    for config, faster in ((grouped, True), (multi_head, False)):
        planned = plan(config, device, context=16_384, batch=8, specs=["xquant:4"])
        (row,) = planned.rows
        assert (planned.speed(row) > 1) is faster
        assert row.largest_context > 3 * planned.baseline.largest_context


def test_the_command_says_what_is_slower_and_writes_everything(tmp_path: Path, capsys) -> None:
    out = tmp_path / "plan.json"
    sizes = ["--device", "rtx4090", "--context", "65536", "--batch", "2"]
    caches = ["--cache", "bf16", "xquant:4", "xquant:4,basis=joint", "xquant-cl:2,predict=paper"]
    assert main(["plan", GROUPED, *sizes, *caches, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "! does not fit" in printed
    assert "xquant,basis=joint at 4 bits: 0." in printed
    assert "rebuilding takes longer than reading" in printed
    assert "40,627 tokens" in printed
    written = json.loads(out.read_text())
    assert written["device"]["name"] == "RTX 4090"
    assert written["slower_than_bf16"] == ["xquant:4,basis=joint", "xquant-cl:2,predict=paper"]
    assert [row["fits"] for row in written["rows"]] == [False, True, True, True]
    for row in written["rows"]:
        parts = dict(row["memory"])
        assert parts.pop("total") == sum(parts.values())


@NEEDS_MATPLOTLIB
def test_the_command_draws(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    command = ["plan", "demo", "--device", "L4", "--cache", "bf16", "xquant:4", "--plot", str(picture)]
    assert main(command) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_demo_model_and_directories_are_planned_too(capsys) -> None:
    assert main(["plan", "demo", "--device", "L4", "--cache", "bf16", "int8"]) == 0
    assert "No cache is slower than bf16" in capsys.readouterr().out
    assert main(["plan", str(GOLDEN / "llama-mha"), "--device", "L4", "--cache", "xquant:4"]) == 0


def test_devices_of_the_package_name_their_source() -> None:
    names = [device.name for device in read_devices()]
    assert names == ["v5e", "v5p", "v6e", "v7x", "A100", "H100", "H200", "B200", "L4", "RTX 4090"]
    assert all(len(device.source) > 20 for device in read_devices())


def test_a_device_of_ones_own(tmp_path: Path, capsys) -> None:
    path = tmp_path / "devices.json"
    path.write_text('{"My Chip": {"tflops": 100, "gb_per_s": 1000, "memory_gib": 64}}')
    device = find_device("my-chip", path)
    assert (device.flops, device.bandwidth, device.memory) == (1e14, 1e12, 64 * 2**30)
    assert main(["plan", GROUPED, "--device", "my chip", "--devices", str(path), "--cache", "bf16"]) == 0
    assert "My Chip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ("{}", "must hold an object"),
        ('{"x": 5}', "'x' must have tflops, gb_per_s, memory_gib"),
        ('{"x": {"tflops": 1, "gb_per_s": 1}}', "'x' must have"),
        ('{"x": {"tflops": 1, "gb_per_s": 1, "memory_gib": 1, "watts": 5}}', "'x' must have"),
        ('{"x": {"tflops": 0, "gb_per_s": 1, "memory_gib": 1}}', "tflops=0; it must be a number above 0"),
        ('{"x": {"tflops": 1, "gb_per_s": "1", "memory_gib": 1}}', "gb_per_s='1'"),
        ('{"x": {"tflops": 1, "gb_per_s": Infinity, "memory_gib": 1}}', "gb_per_s=inf"),
    ],
)
def test_a_malformed_devices_file_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "devices.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_device("x", path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{GROUPED} --device v7", "device 'v7' is not known; known: v5e, v5p, v6e"),
        (
            f"{GROUPED} --device v5e",
            "the weights take 15.0 GiB, and of the 16.0 GiB of a v5e 14.4 GiB",
        ),
        (f"{GROUPED} --device H100 --batch 0", "batch=0 is not possible"),
        (f"{GROUPED} --device H100 --context -1", "context=-1 is not possible"),
        (f"{GROUPED} --device H100 --prefill-chunk 0", "chunk=0 is not possible"),
        (f"{GROUPED} --device H100 --speculate lookup", "write KIND:TOKENS"),
        (f"{GROUPED} --device H100 --speculate lookup:4 --acceptance 1.5", "acceptance=1.5 is not a probability"),
        (f"{GROUPED} --device H100 --speculate lookup:4 --acceptance nan", "acceptance=nan is not a probability"),
        (f"{GROUPED} --device H100 --acceptance 0.5", "give speculate too"),
        (f"{GROUPED} --device H100 --reserve 1", "reserve=1.0 is not a share"),
        (f"{GROUPED} --device H100 --cache xquant:5", "bits=5"),
        (f"{GROUPED} --device H100 --devices nowhere.json", "nowhere.json"),
        pytest.param(f"{GROUPED} --device H100 --plot a.txt", ".txt is not a picture", marks=NEEDS_MATPLOTLIB),
        (f"{GROUPED} --device H100 --json nowhere/a.json", "there is no directory nowhere"),
        ("nowhere --device H100", "nowhere cannot be read"),
        (f"{MULTI_HEAD} --device H100 --cache xquant:4,basis=joint", "leave basis out"),
    ],
)
def test_bad_input_is_one_line(options: str, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *options.split()]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_nothing_fits_beyond_the_weights_but_the_table_still_says_so(capsys) -> None:
    """A batch so large that not even one block of each sequence fits."""
    assert main(["plan", GROUPED, "--device", "RTX 4090", "--batch", "5000", "--cache", "bf16"]) == 0
    planned = planning.plan(read_config(GROUPED), find_device("RTX 4090"), context=8192, batch=5000, specs=["bf16"])
    assert planned.rows[0].largest_context == 0
    assert planned.rows[0].largest_batch == 6
    assert "! does not fit" in capsys.readouterr().out
