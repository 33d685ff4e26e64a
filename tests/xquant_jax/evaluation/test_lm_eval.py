"""lm-evaluation-harness over a cache method, with a small task of our own; skipped where it is not installed."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from xquant_jax.cli import main
from xquant_jax.errors import ConfigError

pytest.importorskip("lm_eval", reason="needs the lm-eval extra")

# the harness and what it imports warn on their own account
pytestmark = pytest.mark.filterwarnings("default")

TASKS = {
    "endings": """
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: DOCUMENTS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: good
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "whole": """
task: whole
dataset_path: json
dataset_kwargs: {data_files: {test: DOCUMENTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{story}}"
metric_list: [{metric: bits_per_byte}]
""",
    "continued": """
task: continued
dataset_path: json
dataset_kwargs: {data_files: {test: DOCUMENTS}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["."], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
""",
}
DOCUMENTS = [
    {"start": "Once upon a time, there was a little", "ends": [" girl named Lily.", " tax of seven per"], "good": 0},
    {"start": "Tom went to the park to play with his", "ends": [" the of and was", " friends."], "good": 1},
    {"start": "The dog was very happy and", "ends": [" ran", " Q"], "good": 0},
]


@pytest.fixture
def tasks(tmp_path: Path, shared: Path) -> Path:
    documents = tmp_path / "documents.jsonl"
    story = (shared / "data" / "tinystories_val.txt").read_text()
    lines = [document | {"story": story[: 700 * (i + 1)], "said": "x"} for i, document in enumerate(DOCUMENTS)]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DOCUMENTS", str(documents)))
    return folder


@pytest.fixture(scope="module")
def make(shared: Path):
    from xquant_jax.evaluation.lm_eval import XQuantLM

    return lambda **options: XQuantLM(str(shared / "models" / "stories260K"), dtype="float32", **options)


def request(*arguments) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.mark.parametrize("protocol", ["paper", "streaming"])
def test_command_runs_tasks_of_every_kind(
    tasks: Path, shared: Path, protocol: str, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    out = tmp_path / "out.json"
    command = ["lm-eval", str(shared / "models" / "stories260K"), "--include-path", str(tasks), "--json", str(out)]
    command += ["--cache", "bf16", "xquant:2", "--batch-size", "4", "--protocol", protocol, "--max-length", "512"]
    assert main([*command, "--tasks", *TASKS]) == 0
    exact, coarse = (row["results"] for row in json.loads(out.read_text())["rows"])
    assert exact["endings"]["acc,none"] == 1.0
    assert exact["whole"]["bits_per_byte,none"] < coarse["whole"]["bits_per_byte,none"]
    printed = capsys.readouterr().out
    for name in TASKS:
        assert name in printed


def test_likelihoods_are_those_of_the_tokens(make) -> None:
    """Batched, padded and sorted, against one request at a time; and against the model without a cache."""
    from xquant_jax.evaluation.scoring import Scorer

    texts = [
        ("Once upon a time", " there was a girl"),
        ("", "The dog"),
        ("A b c d e f g h", " i"),
        ("One day, Tom", " ran."),
    ]
    lm = make(cache="bf16,dtype=float32", batch_size=3)
    answers = lm.loglikelihood([request(*text) for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        context, continuation = (
            lm._encode_pair(*text) if text[0] else ([lm.prefix_token_id], lm.tok_encode(text[1], False))
        )
        tokens = np.asarray([[*context, *continuation]], np.int32)
        scores = Scorer(lm.model, None).program(*tokens.shape)(tokens, np.asarray([tokens.shape[1]], np.int32))
        assert answer[0] == pytest.approx(-float(scores.loss[0, -len(continuation) :].sum()), abs=1e-3)
        assert answer[1] == bool(scores.greedy[0, -len(continuation) :].all())
    (greedy,) = lm.generate_until([request("Once upon a time", {"until": ["."], "max_gen_toks": 8})])
    (again,) = lm.loglikelihood([request("Once upon a time", greedy)])
    assert again[1]


def test_rolling_likelihood_counts_every_token_once(make) -> None:
    lm = make(cache="bf16,dtype=float32", max_length=40)
    text = "Once upon a time there was a big dog. He liked to run. " * 4
    count = len(lm.tok_encode(text, add_special_tokens=False))
    seen = []
    inner = lm._loglikelihood_tokens
    lm._loglikelihood_tokens = lambda pieces: seen.extend(len(piece[2]) for piece in pieces) or inner(pieces)
    (total,) = lm.loglikelihood_rolling([request(text)])
    assert sum(seen) == count
    assert total < 0


def test_start_token_is_not_set_twice(make) -> None:
    lm = make()
    once = lm.tok_encode("One day")
    assert lm.tok_encode("<s>One day").count(lm.prefix_token_id) == once.count(lm.prefix_token_id) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "JAX chooses the device"),
        ({"batch_size": "auto"}, "batch_size=auto is not supported"),
        ({"protocol": "other"}, "protocol=other is not known"),
        ({"cache": "other"}, "cache method 'other' is not known"),
    ],
)
def test_options_that_cannot_be_honoured(make, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_requests_that_cannot_be_honoured(make) -> None:
    lm = make(max_length=8)
    with pytest.raises(ConfigError, match="num_beams are not supported"):
        lm.generate_until([request("x", {"num_beams": 4})])
    with pytest.raises(ConfigError, match="max_gen_toks=8 leaves no room"):
        lm.generate_until([request("x", {"max_gen_toks": 8})])
    with pytest.raises(ConfigError, match="does not fit max_length=8"):
        lm.loglikelihood([request("x", " a b c d e f g h i j k l m n o p")])
