"""Bits for every layer: what a layer costs, which bits are found, and what cannot be honoured."""

import dataclasses
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xquant_jax as xq
from tests.conftest import RandomModel, random_model, random_tokens, tiny_config
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.methods.learned import Codebooks
from xquant_jax.cli import main
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.budget import Budget, Choices, Found, find, with_bits
from xquant_jax.evaluation.divergence import LayerwiseScorer
from xquant_jax.evaluation.evaluate import paper_ratio
from xquant_jax.evaluation.scoring import Scorer
from xquant_jax.model import layers

LENGTH = 150  # a whole block and part of one
FOUR = {"num_layers": 4, "sliding_windows": (None, None, 16, None)}
BITS = (3, 2, 4, 2)
MULTI_HEAD = FOUR | {"num_kv_heads": 4}


def divergence(model: RandomModel, spec: str, tokens: np.ndarray) -> float:
    """Another way: the cache's own program of protocol "paper", and float64."""

    def log_probabilities(cache: CacheConfig | None) -> np.ndarray:
        h = Scorer(model, cache).program(1, len(tokens))(tokens[None], np.asarray([len(tokens)])).hidden[0]
        return np.asarray(jax.nn.log_softmax(layers.logits(model.params, h, model.config)), np.float64)

    p, q = log_probabilities(None), log_probabilities(CacheConfig.parse(spec))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        (FOUR, "kvquant"),
        (FOUR, "xquant-cl:2,first=2@4"),
        (MULTI_HEAD, "xquant-cl:2,first=1@8"),
    ],
    ids=["codebooks", "differences", "differences-multi-head"],
)
def test_divergences_are_those_of_the_specs_own_programs(
    changes: dict, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = RandomModel.calibrated

    def levels(self: RandomModel, need: Any) -> dict[str, jax.Array]:
        """Stands in for `xquant calibrate`: levels that are not evenly spaced, others in every layer."""
        if not isinstance(need, Codebooks):
            return calibrated(self, need)
        even = jnp.linspace(0, 1, 2**need.bits)
        return dict.fromkeys(("key", "value"), jnp.stack([even**power for power in (0.9, 1.1, 1.2, 1.3)]))

    monkeypatch.setattr(RandomModel, "calibrated", levels)
    model = random_model(tiny_config(**changes))
    tokens = random_tokens(model.config, LENGTH)
    choices = Choices.of(CacheConfig.parse(spec), model.config)
    scorer = LayerwiseScorer(model, choices.ways)
    cache = with_bits(CacheConfig.parse(spec), BITS, model.config)
    chosen = np.asarray([choices.bits.index(bits) for bits in BITS])
    found = scorer.divergence(scorer.observe(tokens), chosen)
    np.testing.assert_allclose(found, divergence(model, str(cache), tokens), rtol=2e-3)  # float32, codes on edges


def test_layers_that_are_not_chosen_are_as_without_a_cache() -> None:
    model = random_model(tiny_config(**FOUR))
    choices = Choices.of(CacheConfig.parse("kivi"), model.config)
    scorer = LayerwiseScorer(model, choices.ways)
    reference = scorer.observe(random_tokens(model.config, LENGTH))
    none = np.full(4, scorer.others)
    assert scorer.divergence(reference, none) == pytest.approx(0, abs=1e-6)
    last = np.asarray([*none[:3], 0])
    two = np.asarray([none[0], 0, *none[2:]])
    assert scorer.divergence(reference, last) > 1e-4
    assert scorer.divergence(reference, two) != scorer.divergence(reference, last)


@pytest.mark.parametrize("spec", ["xquant", "xquant:8,input=unit_norm", "kivi:2,group=8,rope=post", "xquant-cl:3"])
def test_sizes_of_layers_add_up_to_that_of_the_spec(spec: str) -> None:
    config = tiny_config(**FOUR)
    cache = CacheConfig.parse(spec)
    choices = Choices.of(cache, config)
    assert choices.bits == (2, 3, 4, 8)
    for chosen in ((0, 0, 0, 0), (3, 3, 3, 3), (2, 0, 1, 0), (1, 3, 3, 2)):
        own = with_bits(cache, [choices.bits[c] for c in chosen], config)
        size = choices.sizes[np.arange(4), np.asarray(chosen)].sum() / (128 * 4 * 4 * config.kv_width)
        assert paper_ratio(own, config) == pytest.approx(size, rel=1e-12)
        layers = [method for method, count in own.segments(config) for _ in range(count)]
        assert [method.bits for method in layers] == [choices.bits[c] for c in chosen]
        assert CacheConfig.parse(str(own)) == own
        method: Any = own.method
        given: Any = cache.method
        others = {field.name for field in dataclasses.fields(given)} - {"bits", "first"}
        assert all(getattr(method, name) == getattr(given, name) for name in others)
        assert getattr(method, "plain", None) == getattr(given, "plain", None)  # every other option is carried through


def test_a_budget_of_a_specs_own_size_is_met_by_it() -> None:
    """Whatever floats round: of all sizes, that which is asked for is allowed, and not a byte more."""
    config = tiny_config(**FOUR)
    cache = CacheConfig.parse("xquant")
    choices, whole = Choices.of(cache, config), 128 * 4 * 4 * config.kv_width
    least, most = choices.sizes[:, 0].sum(), choices.sizes[:, -1].sum()
    for size in range(least, most):
        assert choices.capacity(Budget(cache, size / whole), config) == size


def test_only_bits_that_the_method_takes_are_chosen_from() -> None:
    config = tiny_config(**FOUR)
    assert Choices.of(CacheConfig.parse("kvquant:2"), config).bits == (2, 3, 4)
    multi_head = tiny_config(**MULTI_HEAD)
    assert Choices.of(CacheConfig.parse("xquant:2,rebuild_dtype=fp8"), multi_head).bits == (2, 3, 4)


@pytest.fixture(scope="module")
def found() -> tuple[RandomModel, np.ndarray, Found]:
    model = random_model(tiny_config(**FOUR))
    windows = random_tokens(model.config, 2, LENGTH)
    return model, windows, find(model, Budget(CacheConfig.parse("kivi,group=16"), 0.27), windows)


def test_what_is_found_meets_the_budget_and_costs_least(found: tuple[RandomModel, np.ndarray, Found]) -> None:
    model, windows, result = found
    assert paper_ratio(result.cache, model.config) <= 0.27
    assert result.cache.method.group == 16  # pyright: ignore[reportAttributeAccessIssue]
    mean = np.mean([divergence(model, str(result.cache), window) for window in windows])
    np.testing.assert_allclose(result.measured[result.cache], mean, rtol=2e-3)
    same = CacheConfig.parse("kivi:2,group=16")
    assert result.measured[result.cache] < result.measured[same]
    chosen, sizes = Choices.of(same, model.config).bits, Choices.of(same, model.config).sizes
    layers = np.arange(4)
    best = min(
        (result.divergences[layers, c].sum(), c)
        for c in map(tuple, itertools.product(range(4), repeat=4))
        if sizes[layers, np.asarray(c)].sum() <= 0.27 * 128 * 4 * 4 * model.config.kv_width
    )
    assert with_bits(same, [chosen[c] for c in best[1]], model.config) == result.cache


@pytest.mark.parametrize(
    ("cache", "budget", "message"),
    [
        ("xquant", "0", "budget=0.0 is not a share of keys and values in 16 bits"),
        ("xquant", "1", "budget=1.0 is not a share of keys and values in 16 bits"),
        ("xquant", "nan", "budget=nan is not a share of keys and values in 16 bits"),
        (
            "xquant",
            "0.12",
            "budget=0.12 cannot be met: xquant:2 is the smallest and takes 0.1406; choose 0.141",
        ),
        ("xquant", "0.6", "budget=0.6 leaves nothing to find: xquant:8 has the most bits and takes 0.5156"),
        ("int8", "0.2", "int8 has a fixed width; choose a method with bits"),
        ("bf16", "0.2", "bf16 has a fixed width; choose a method with bits"),
        ("xquant:4;0-2=8", "0.2", "leave 0-2=8 out"),
        ("nothing", "0.2", "cache method 'nothing' is not known"),
    ],
)
def test_budgets_that_cannot_be_honoured_are_errors(
    cache: str, budget: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(xq.__file__).read_text() + Path(__file__).read_text())
    command = ["calibrate", "demo", "--text", str(text), "--seq-len", "128"]
    assert main([*command, "--cache", cache, "--budget", budget]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0.2", "--cache", "xquant", "kivi"], "finds bits for one cache, and --cache names 2"),
        (["--budget", "0.2", "--out", "x.safetensors"], "choose --json for what --budget finds"),
        (["--json", "x.json"], "--json is for --budget"),
        (["--calibration", "x.safetensors"], "--calibration is for --budget"),
        (["--budget", "0.2", "--json", "nowhere/x.json"], "there is no directory nowhere"),
        (["--budget", "0.2", "--limit-windows", "0"], "--limit-windows 0 leaves nothing"),
        (["--budget", "0.2", "--seq-len", "100000"], "less than one window of seq_len=100000"),
    ],
)
def test_options_that_do_not_go_together_are_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["calibrate", "demo", "--text", __file__, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_text_without_finite_divergences_is_an_error() -> None:
    model = random_model(tiny_config())
    broken = dataclasses.replace(model, params=jax.tree.map(lambda a: a * jnp.nan, model.params))
    with pytest.raises(ConfigError, match="a divergence on this text is nan"):
        find(broken, Budget(CacheConfig.parse("kivi"), 0.3), random_tokens(model.config, 1, 128))


def test_calibrate_with_a_budget_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "budget.json"
    text.write_text(Path(xq.__file__).read_text() + Path(__file__).read_text())
    command = ["calibrate", "demo", "--text", str(text), "--seq-len", "128", "--limit-windows", "1"]
    assert main([*command, "--budget", "0.17", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "0/1 measurements: compiling"
    written = json.loads(out.read_text())
    assert written["paper_ratio"] <= written["budget"] == 0.17
    last = printed.out.splitlines()[-1]
    assert shlex.split(last)[:-1] == ["xquant", "eval", "demo", "--text", "OTHER_FILE", "--cache"]
    spec = shlex.split(last)[-1]
    assert spec == written["cache"]
    rows = {row["cache"]: row["divergence"] for row in written["rows"]}
    assert rows[spec] < rows["xquant:2"]
    assert len(written["divergence_of_layers"]) == 12
    evaluation = ["eval", "demo", "--text", __file__, "--seq-len", "128", "--limit-windows", "1"]
    assert main([*evaluation, "--cache", "xquant:2", spec]) == 0
