"""`xquant eval`: what the protocols compute, what is reported, and what cannot be honoured."""

import functools
import json
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import xquant_jax as xq
import xquant_jax.config
from tests.conftest import GOLDEN, RandomModel, random_model, random_tokens, tiny_config
from tests.xquant_jax.reference import fake_quantize_block, rms, rope
from xquant_jax import figures
from xquant_jax.cache.config import CacheConfig
from xquant_jax.cli import evaluate as command
from xquant_jax.cli import main, progress
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation import evaluate, scoring
from xquant_jax.evaluation.results import WINDOWS, Evaluation
from xquant_jax.evaluation.scoring import Scorer
from xquant_jax.evaluation.windows import cut, read_text
from xquant_jax.model import layers

TOLERANCE = 5e-4  # nats; float32 against float64, and a code rounded otherwise here and there
PUBLISHED = "rotate=false,clip=false,sink=0"
LENGTH = 150  # a whole block and part of one

NEEDS_MATPLOTLIB = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the plot extra")


def losses(model: RandomModel, spec: str | None, tokens: np.ndarray, protocol: str = "paper", chunk: int = 64):
    cache = None if spec is None else CacheConfig.parse(spec)
    program = Scorer(model, cache, protocol, chunk).program(*tokens.shape)
    return np.asarray(program(tokens, np.full(len(tokens), tokens.shape[1], np.int32)).loss)


def stored(vectors: np.ndarray, bits: int, axis: str) -> np.ndarray:
    """All vectors of a stream quantized and read back; the last block is filled up with copies of the last one."""
    whole = -(-len(vectors) // 128) * 128
    padded = np.concatenate([vectors, np.repeat(vectors[-1:], whole - len(vectors), axis=0)])
    group = max(g for g in range(1, 129) if vectors.shape[1] % g == 0)
    blocks = [fake_quantize_block(block, bits, axis, group) for block in padded.reshape(-1, 128, vectors.shape[1])]
    return np.concatenate(blocks)[: len(vectors)].astype(np.float64)


def reference_losses(model: RandomModel, tokens: np.ndarray, bits: int) -> np.ndarray:
    """Protocol "paper" in numpy: layer after layer, every key and value rebuilt from what is read back."""
    c, params = model.config, jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
    h = params["embed"]["embedding"][tokens]
    for i in range(c.num_layers):
        w = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        x = rms(h, w["attention_norm"]["scale"], c.norm_eps)
        if c.is_multi_head:
            read = stored(x, bits, "token")
            k, v = read @ w["key"]["kernel"], read @ w["value"]["kernel"]
        else:
            sides = []
            for side, axis in (("key", "channel"), ("value", "token")):
                heads = np.split(w[side]["kernel"], c.num_kv_heads, axis=1)
                parts = [np.linalg.svd(head, full_matrices=False) for head in heads]
                signs = factor_signs(model, i, side, parts)
                z = x @ np.concatenate([u * sign for (u, _, _), sign in zip(parts, signs, strict=True)], axis=1)
                read = np.split(stored(z, bits, axis), c.num_kv_heads, axis=1)
                up = [(sign * s)[:, None] * b for (_, s, b), sign in zip(parts, signs, strict=True)]
                sides.append(np.concatenate([z_h @ m for z_h, m in zip(read, up, strict=True)], axis=1))
            k, v = sides
        q, k, v = (a.reshape(len(tokens), -1, c.head_dim) for a in (x @ w["query"]["kernel"], k, v))
        q, k = (np.stack([rope(row, at, c.rope.theta) for at, row in enumerate(a)]) for a in (q, k))
        out = np.empty_like(q)
        for head in range(c.num_heads):
            kv = head // (c.num_heads // c.num_kv_heads)
            score = q[:, head] @ k[:, kv].T / math.sqrt(c.head_dim)
            p = np.where(np.tri(len(tokens)), np.exp(score - score.max(1, keepdims=True)), 0)
            out[:, head] = p @ v[:, kv] / p.sum(1, keepdims=True)
        h = h + out.reshape(len(tokens), -1) @ w["output"]["kernel"]
        y = rms(h, w["mlp_norm"]["scale"], c.norm_eps)
        gate = y @ w["gate"]["kernel"]
        h = h + (gate / (1 + np.exp(-gate)) * (y @ w["up"]["kernel"])) @ w["down"]["kernel"]
    logits = rms(h, params["final_norm"]["scale"], c.norm_eps) @ params["head"]["kernel"]
    chosen = logits[np.arange(len(tokens) - 1), tokens[1:]]
    top = logits.max(1)[:-1]
    return np.log(np.exp(logits[:-1] - top[:, None]).sum(1)) + top - chosen


def factor_signs(model: RandomModel, layer: int, side: str, parts: list) -> list[np.ndarray]:
    """Signs of singular vectors are arbitrary; these are the library's."""
    down = np.asarray(model.source.svd("per_head")[side]["project"][layer], np.float64)  # [D, K, e]
    return [np.sign((down[:, n] * u).sum(0)) for n, (u, _, _) in enumerate(parts)]


@pytest.mark.parametrize(("kv_heads", "bits"), [(4, 2), (2, 4)])
def test_paper_protocol_is_attention_over_the_packed_stream(kv_heads: int, bits: int) -> None:
    model = random_model(tiny_config(num_kv_heads=kv_heads))
    tokens = random_tokens(model.config, LENGTH)
    ours = losses(model, f"xquant:{bits},{PUBLISHED}", tokens[None])[0]
    expected = reference_losses(model, tokens, bits)
    assert abs(ours.mean() - expected.mean()) < TOLERANCE
    assert np.median(np.abs(ours - expected)) < TOLERANCE
    other = reference_losses(model, tokens, bits + 4 if bits == 4 else 3)
    assert np.median(np.abs(other - ours)) > 10 * TOLERANCE  # one bit more is told apart


def test_streaming_protocol_is_the_cache_fed_step_by_step() -> None:
    """Logits of `extend` equal those of calls that return the last one only, whatever a sequence's length."""
    model = random_model(tiny_config())
    tokens, lengths = random_tokens(model.config, 2, 200), np.asarray([200, 131], np.int32)
    config, chunk = CacheConfig.parse("xquant:2,basis=joint,first=1@4"), 48
    method_params = config.method_params(model.source)
    ours = Scorer(model, config, "streaming", chunk).program(2, 200)(tokens, lengths).loss
    cache = xq.allocate(config, model.config, batch=2, tokens=200, max_step=chunk)

    @jax.jit
    def feed(tokens, cache, counts):
        logits, after = model.transformer.apply({"params": model.params}, tokens, cache, method_params, counts)
        return jax.nn.log_softmax(logits), xq.flush_when_due(after, method_params)

    for start in range(0, 200, chunk):
        piece = np.pad(tokens[:, start : start + chunk], ((0, 0), (0, max(0, start + chunk - 200))))
        counts = np.clip(lengths - start, 0, chunk)
        for back in (0, 5):  # the last position of the chunk and one further in
            shorter = np.maximum(counts - back, 0)
            logprobs, after = feed(piece, cache, shorter)
            for row in np.flatnonzero(shorter):
                at = start + shorter[row] - 1
                if at + 1 < lengths[row]:
                    assert abs(logprobs[row, tokens[row, at + 1]] + ours[row, at]) < 1e-3
            if back == 0:
                following = after
        cache = following


@pytest.mark.parametrize("protocol", ["paper", "streaming"])
def test_exact_storage_gives_the_baseline(protocol: str) -> None:
    model = random_model(tiny_config())
    tokens = random_tokens(model.config, 2, LENGTH)
    stored, exact = (losses(model, spec, tokens, protocol) for spec in ("bf16,dtype=float32", None))
    assert np.abs(stored - exact).max() < 1e-4


def test_padding_changes_nothing() -> None:
    model = random_model(tiny_config())
    tokens = random_tokens(model.config, 2, 160)
    scorer = Scorer(model, CacheConfig.parse("xquant:2"))
    padded = scorer.program(2, 160)(tokens, np.asarray([160, 70], np.int32)).loss
    alone = scorer.program(1, 70)(tokens[1:, :70], np.asarray([70], np.int32)).loss
    np.testing.assert_allclose(padded[1, :69], alone[0], atol=1e-4)


@pytest.mark.parametrize("protocol", ["paper", "streaming"])
def test_divergence_and_agreement_are_those_of_the_distributions(protocol: str, monkeypatch) -> None:
    """Against float64, from logits of few positions at a time, the last of them padded."""
    model = random_model(tiny_config())
    tokens, lengths = random_tokens(model.config, 2, LENGTH), np.full(2, LENGTH, np.int32)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 2 * 7 * model.config.vocab_size)
    exact = Scorer(model, None).program(2, LENGTH)(tokens, lengths)
    scorer = Scorer(model, CacheConfig.parse("xquant:2"), protocol)
    scores = scorer.program(2, LENGTH, compares=True)(tokens, lengths, exact.hidden)

    def log_probabilities(scores: scoring.Scores) -> np.ndarray:
        logits = np.asarray(layers.logits(model.params, scores.hidden, model.config), np.float64)
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    p, q = log_probabilities(exact), log_probabilities(scores)
    np.testing.assert_allclose(scores.divergence, (np.exp(p) * (p - q)).sum(-1), atol=1e-5)
    assert np.mean(scores.divergence) > 1e-3
    np.testing.assert_array_equal(scores.agrees, p.argmax(-1) == q.argmax(-1))
    assert 0 < np.mean(scores.agrees) < 1
    chosen = np.take_along_axis(q, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.loss, -chosen, atol=1e-5)
    np.testing.assert_array_equal(scores.greedy, q.argmax(-1) == tokens[:, 1:])


TEXT = read_text(Path(xq.__file__))[:1500] + "# \N{SNOWMAN}\n" + read_text(Path(xquant_jax.config.__file__))[:1000]
"""Python, which the demo model was trained on: some 900 tokens, one character of three bytes among them."""

SIZES = ["--seq-len", "128", "--limit-windows", "3", "--batch", "2"]


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """Commands get the same model whenever they name it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load", functools.cache(xq.load))
        yield


@pytest.fixture(scope="module")
def model() -> xq.Model:
    return command.load("demo", dtype="float32", calibration=None)


@pytest.fixture(scope="module")
def evaluation(model: xq.Model) -> Evaluation:
    return evaluate.evaluate(model, TEXT, ["bf16", "xquant:2"], seq_len=128, limit_windows=3, batch=2)


class TestReport:
    def test_figures_follow_from_the_losses_of_the_windows(self, evaluation: Evaluation) -> None:
        row, exact = evaluation.row(evaluation.measurements[1]), evaluation.baseline.losses
        own = evaluation.measurements[1].losses
        assert len(own) == 3
        assert row["perplexity"] == pytest.approx(math.exp(sum(own) / 3))
        differences = [a - b for a, b in zip(own, exact, strict=True)]
        assert row["delta_nll"] == pytest.approx(sum(differences) / 3)
        assert row["stderr"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(3))
        assert row["stderr"] < np.std(own, ddof=1) / math.sqrt(3)  # pairing is what makes it small
        nats = sum(own) * 127
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(evaluation.predicted_bytes))

    def test_divergence_and_agreement_are_means_over_the_windows(self, evaluation: Evaluation) -> None:
        exact, sixteen, two = map(evaluation.row, [evaluation.baseline, *evaluation.measurements])
        assert (exact["kl_divergence"], exact["top1_agreement"]) == (0, 1)
        assert 0 < sixteen["kl_divergence"] < 1e-4 < two["kl_divergence"] < 1
        assert 0.5 < two["top1_agreement"] < 0.99 < sixteen["top1_agreement"] <= 1
        m = evaluation.measurements[1]
        assert two["kl_divergence"] == pytest.approx(sum(m.divergences) / 3)
        assert two["top1_agreement"] == pytest.approx(sum(m.agreements) / 3)

    def test_bytes_are_those_of_the_predicted_tokens_text(self, evaluation: Evaluation, model: xq.Model) -> None:
        """Whole text: what the first tokens of the windows stand for is missing, nothing else."""
        assert model.tokenizer is not None
        ids = model.tokenizer.encode(TEXT, special_tokens=False)
        for window, size in enumerate(evaluation.predicted_bytes):
            predicted = ids[window * 128 + 1 : (window + 1) * 128]
            assert len(model.tokenizer.decode(predicted).encode()) == size

    def test_sizes_are_the_papers_formula_and_what_is_allocated(self, evaluation: Evaluation, model: xq.Model) -> None:
        bits = (2 + 32 / 128) + (2 + 32 / 128)  # of a key and a value; a scale and a zero of 2 bytes for 128 of them
        kept = 4 / 128  # of the tokens, in 16 bits
        assert [m.paper_ratio for m in evaluation.measurements] == [1.0, bits / 32 + kept]
        cache = xq.allocate(CacheConfig.parse("xquant:2"), model.config, batch=1, tokens=128)
        total = evaluation.row(evaluation.measurements[1])["allocated_bytes"]
        assert total == sum(a.nbytes for a in jax.tree.leaves(cache))

    def test_json_holds_everything_to_go_on(self, evaluation: Evaluation) -> None:
        document = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
        assert Evaluation.from_json(document) == evaluation
        assert {"model", "text", "seq_len", "protocol", "rows"} <= document.keys()
        asked = {"cache", "perplexity", "nll", "delta_nll", "stderr", "paper_ratio", "allocated_bytes"}
        for row in document["rows"]:
            assert asked | {"tokens_per_second"} <= row.keys()

    def test_a_loss_that_is_not_finite_is_reported_as_none(self, evaluation: Evaluation) -> None:
        broken = Evaluation.from_json(evaluation.to_json())
        broken.measurements[0].losses[1] = math.nan
        row = json.loads(json.dumps(broken.to_json(), allow_nan=False))["rows"][0]
        assert (row["perplexity"], row["stderr"]) == (None, None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


@pytest.fixture
def typed(text: Path, out: Path) -> list[str]:
    return ["eval", "demo", "--text", str(text), *SIZES, "--json", str(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of two caches writes."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    files = ["--text", str(folder / "text.txt"), "--json", str(folder / "out.json")]
    assert main(["eval", "demo", *files, *SIZES, "--cache", "bf16", "xquant:2"]) == 0
    return json.loads((folder / "out.json").read_text())


class TestCommand:
    def test_writes_table_json_and_plot(
        self, finished: dict[str, Any], typed: list[str], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        pytest.importorskip("matplotlib")
        picture = tmp_path / "out.png"
        out.write_text(json.dumps(finished | {"text": typed[3]}))
        assert main([*typed, "--cache", "bf16", "xquant:2", "--plot", str(picture), "--resume"]) == 0
        rows = json.loads(out.read_text())["rows"]
        assert [row["cache"] for row in rows] == ["bf16", "xquant:2"]
        printed = capsys.readouterr().out
        for row in rows:
            assert f"{row['perplexity']:.4f}" in printed
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_an_interrupted_run_goes_on_where_it_stopped(
        self, finished: dict[str, Any], typed: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        typed = [*typed, "--cache", "bf16", "xquant:2"]

        class Interrupted(Scorer):
            def program(self, batch: int, length: int, *, compares: bool = False) -> Any:
                if self.cache is not None and self.cache.method.name == "xquant":
                    raise KeyboardInterrupt
                return super().program(batch, length, compares=compares)

        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "Scorer", Interrupted)
            assert main(typed) == 130
        part = json.loads(out.read_text())
        assert part["rows"][0]["window_nlls"] == finished["rows"][0]["window_nlls"]
        assert part["rows"][1]["window_nlls"] == []
        for name in WINDOWS:
            del part["rows"][0][name][2:]  # as if it had stopped earlier
        out.write_text(json.dumps(part))
        assert main([*typed, "--resume"]) == 0
        for one, other in zip(finished["rows"], json.loads(out.read_text())["rows"], strict=True):
            for name in WINDOWS:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-6)

    def test_without_a_terminal_lines_tell_how_far_it_is(
        self, typed: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One where each method begins, before it is compiled; one of every batch, as no time is allowed to pass."""
        monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
        assert main([*typed, "--cache", "bf16"]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["0/6 none", "2/6 none", "3/6 none", "3/6 bf16", "5/6 bf16", "6/6 bf16"]

    @pytest.mark.parametrize(
        "change", ["--seq-len 64", "--protocol streaming", "--limit-windows 2", "--dtype bfloat16"]
    )
    def test_resuming_another_run_is_an_error(
        self, finished: dict[str, Any], typed: list[str], change: str, out: Path, capsys: pytest.CaptureFixture
    ) -> None:
        out.write_text(json.dumps(finished | {"text": typed[3]}))
        before = out.read_text()
        assert main([*typed, "--cache", "bf16", "--resume", *change.split()]) == 2
        assert "the earlier run has" in capsys.readouterr().err
        assert out.read_text() == before

    def test_resuming_with_other_weights_or_levels_is_an_error(
        self, finished: dict[str, Any], typed: list[str], out: Path, capsys: pytest.CaptureFixture
    ) -> None:
        finished = finished | {"text": typed[3]}
        for changed, message in (
            (finished | {"weights": "others"}, "the earlier run has weights=others"),
            (finished | {"rows": [finished["rows"][0] | {"calibration": "other"}]}, "bf16 with another calibration"),
        ):
            out.write_text(json.dumps(changed))
            assert main([*typed, "--cache", "bf16", "--resume"]) == 2
            assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--cache bf16 --seq-len 5000", "less than one window of seq_len=5000"),
            ("--cache bf16 --seq-len 1", "seq_len=1 leaves no token"),
            ("--cache bf16 --limit-windows 0", "limit_windows=0"),
            ("--cache bf16 --batch 0", "--batch 0"),
            ("--cache bf16 --chunk 0", "chunk=0"),
            ("--cache bf16 --generate 0", "--generate 0"),
            ("--cache bf16 kvquant:2,sink=3", "cache kvquant:2,outliers=0.01,sink=3 needs calibration on text"),
            ("--cache nonsense", "cache method 'nonsense' is not known"),
            ("--cache xquant:4,first=13@4", "the model has 12 layers"),
            pytest.param("--cache bf16 --plot out.xyz", ".xyz is not a picture", marks=NEEDS_MATPLOTLIB),
            ("--cache bf16 --plot nowhere/out.png", "there is no directory nowhere"),
        ],
    )
    def test_what_cannot_be_honoured_is_one_line(
        self, typed: list[str], options: str, message: str, out: Path, capsys: pytest.CaptureFixture
    ) -> None:
        assert main([*typed, *options.split()]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()

    def test_text_that_is_not_utf8_is_an_error(
        self, typed: list[str], text: Path, capsys: pytest.CaptureFixture
    ) -> None:
        text.write_bytes(b"Once upon a \xff time")
        assert main([*typed, "--cache", "bf16"]) == 2
        assert "not UTF-8 text: byte 0xff at 12" in capsys.readouterr().err

    def test_json_that_is_none_of_ours_is_not_resumed(
        self, typed: list[str], out: Path, capsys: pytest.CaptureFixture
    ) -> None:
        for content in ("nothing", "[]", '{"model": "a"}'):
            out.write_text(content)
            assert main([*typed, "--cache", "bf16", "--resume"]) == 2
            assert "choose another file" in capsys.readouterr().err

    def test_a_model_without_tokenizer_is_an_error(self, text: Path, capsys: pytest.CaptureFixture) -> None:
        model = str(GOLDEN / "llama-llama3")
        assert main(["eval", model, "--text", str(text), "--cache", "bf16"]) == 2
        assert "no tokenizer.json" in capsys.readouterr().err


def test_a_cache_differs_first_where_its_own_generation_does(model: xq.Model, text: Path, out: Path, capsys) -> None:
    """What `--generate` reports, against greedy generation through the same cache."""
    length, specs = 40, ["xquant:2"]
    typed = ["eval", "demo", "--text", str(text), *SIZES, "--json", str(out), "--cache", *specs]
    assert main([*typed, "--generate", str(length)]) == 0
    assert f"3 windows continued greedily by {length} tokens" in capsys.readouterr().out
    found = Evaluation.from_json(json.loads(out.read_text()))
    windows = [window.tolist() for window in cut(model, TEXT, 128, 3).tokens]
    assert found.baseline.differing == [[], [], []]
    for m in found.measurements:
        results = xq.generate(
            model, windows, cache=m.cache, max_new_tokens=length, prefill_chunk=64, stop_ids=[]
        ).results
        assert m.differing is not None
        for places, continuation, result in zip(m.differing, found.continuations, results, strict=True):
            own = [a != b for a, b in zip(continuation, result.tokens, strict=True)]
            assert min(places, default=length) == (own.index(True) if any(own) else length)
        row = found.row(m)
        assert row["first_divergence"] == np.median([min(places, default=length) for places in m.differing])
        assert row["continuation_agreement"] == pytest.approx(1 - sum(map(len, m.differing)) / 3 / length)
    assert any(min(places, default=length) < length for m in found.measurements for places in m.differing or [])
    # another length asks anew, the same one does not
    before = out.read_text()
    assert main([*typed, "--resume", "--generate", str(length)]) == 0
    assert out.read_text() == before
    assert main([*typed, "--resume", "--generate", "8"]) == 0
    again = Evaluation.from_json(json.loads(out.read_text()))
    assert again.continuations == [tokens[:8] for tokens in found.continuations]
    assert [m.losses for m in again.measurements] == [m.losses for m in found.measurements]


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"xquant-jax\[plot\]"):
        figures.check(tmp_path / "out.png")


# From an independent fake-quantized computation of a model (float32; windows of 512 tokens, the first three layers
# at 4 bits; methods as they were published): increase of the mean negative log-likelihood over 16 bit.
INCREASES = {"xquant:2": 0.07816, "xquant-cl:2,predict=paper,input=post_norm,accumulator=bf16": 0.01071}


@pytest.mark.slow
@pytest.mark.optimized  # 32 windows of 512 tokens take longer than compiling
def test_agrees_with_an_independent_computation(shared: Path) -> None:
    """Within 15 % of each increase, or 0.002 nats."""
    model = xq.load(shared / "models" / "pystdlib-gqa", dtype="float32")
    text = read_text(shared / "data" / "pystdlib_valid.txt")
    published = "first=3@4,rotate=false,clip=false,sink=0"
    result = evaluate.evaluate(model, text, [f"{spec},{published}" for spec in INCREASES], limit_windows=32)
    assert result.row(result.baseline)["perplexity"] == pytest.approx(34.7309, abs=2e-4)
    for m, expected in zip(result.measurements, INCREASES.values(), strict=True):
        assert result.row(m)["delta_nll"] == pytest.approx(expected, rel=0.15, abs=0.002), m.cache
