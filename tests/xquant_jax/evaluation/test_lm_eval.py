"""lm-evaluation-harness over a cache method, with a small task of our own; skipped where it is not installed."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import xquant_jax as xq
from xquant_jax.cli import main
from xquant_jax.errors import ConfigError
from xquant_jax.evaluation.scoring import Scorer
from xquant_jax.model.loading import DEMO
from xquant_jax.model.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="needs the lm-eval extra")

from lm_eval import tasks as harness

from xquant_jax.evaluation import lm_eval

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
doc_to_target: "{{code}}"
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
generation_kwargs: {until: [":"], max_gen_toks: 16}
metric_list: [{metric: exact_match}]
""",
}
START = "<|endoftext|>"
DOCUMENTS = [
    {"start": "for i in range(", "ends": ["10):", " the of and was"], "good": 0},
    {"start": "    def __init__(", "ends": [" tax of seven per", "self):"], "good": 1},
    {"start": "import os\nimport ", "ends": ["sys", " Q"], "good": 0},
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    documents = tmp_path / "documents.jsonl"
    code = Path(xq.__file__).read_text(encoding="utf-8")
    lines = [document | {"code": code[: 200 * (i + 1)], "said": "x"} for i, document in enumerate(DOCUMENTS)]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DOCUMENTS", str(documents)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """The demo model; and the command reads no task files of the harness."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TaskManager", functools.partial(harness.TaskManager, include_defaults=False))
        patch.setattr(lm_eval, "load", functools.cache(xq.load))
        yield


def make(**options: Any) -> Any:
    model: Any = lm_eval.XQuantLM
    return model("demo", dtype="float32", **options)


def with_start(lm: Any) -> Any:
    """With a tokenizer that puts the start token before every text."""
    backend = Tokenizer.from_file(DEMO / "tokenizer.json").backend
    backend.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, lm.prefix_token_id)])
    lm.model = dataclasses.replace(lm.model, tokenizer=Tokenizer(backend))
    return lm


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_command_runs_tasks_of_every_kind(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    out = tmp_path / "out.json"
    command = ["lm-eval", "demo", "--include-path", str(tasks), "--json", str(out), "--dtype", "float32"]
    command += ["--cache", "bf16", "xquant:2,sink=0", "--batch-size", "4", "--max-length", "128", "--tasks", *TASKS]
    assert main(command) == 0
    exact, coarse = (row["results"] for row in json.loads(out.read_text())["rows"])
    assert exact["endings"]["acc,none"] == 1.0
    assert exact["whole"]["bits_per_byte,none"] < coarse["whole"]["bits_per_byte,none"]
    same, agreed = (row["agreement"] for row in json.loads(out.read_text())["rows"])
    assert same == {"endings": {"same_answer": 1}, "continued": {"same_answer": 1, "same_text": 1}}
    assert agreed.keys() == same.keys()
    assert 0 < agreed["continued"]["same_answer"] <= agreed["continued"]["same_text"] <= 1
    printed = capsys.readouterr()
    assert "same answer" in printed.out
    for name in TASKS:
        assert name in printed.out
    lines = printed.err.splitlines()
    for cache in ("bf16", "xquant:2,sink=0"):
        for kind, count in (("likelihoods", 6), ("rolling likelihoods", 3), ("continuations", 3)):
            assert {f"{done}/{count} {cache}: {kind}" for done in (0, count)} <= {*lines}


@pytest.mark.parametrize("protocol", ["paper", "streaming"])
def test_likelihoods_are_those_of_the_tokens(protocol: str) -> None:
    """Batched, padded and sorted, against the model without a cache, one request at a time."""
    texts = [("import os", "\nimport sys"), ("", "def f"), ("a b c d e f g h", " i"), ("class A:\n    def", " run(")]
    lm = make(cache="bf16,dtype=float32", batch_size=3, protocol=protocol)
    answers = lm.loglikelihood([request(*text) for text in texts])
    exact = Scorer(lm.model, None).program(1, 16)
    for text, answer in zip(texts, answers, strict=True):
        context, continuation = (
            lm._encode_pair(*text) if text[0] else ([lm.prefix_token_id], lm.tok_encode(text[1], False))
        )
        tokens, end = np.zeros((1, 16), np.int32), len(context) + len(continuation)
        tokens[0, :end] = [*context, *continuation]
        scores = exact(tokens, np.asarray([end], np.int32))
        predicted = slice(len(context) - 1, end - 1)
        assert answer[0] == pytest.approx(-float(scores.loss[0, predicted].sum()), abs=1e-3)
        assert answer[1] == bool(scores.greedy[0, predicted].all())


def test_rolling_likelihood_counts_every_token_once() -> None:
    lm = make(cache="bf16,dtype=float32", max_length=32)
    text = "import os\nfor name in os.listdir():\n    print(name)\n" * 4
    count = len(lm.tok_encode(text, add_special_tokens=False))
    assert count > 2 * 32
    seen = []
    inner = lm._loglikelihood_tokens

    def watched(pieces: list, **options: Any) -> list:
        seen.extend(len(continuation) for _, _, continuation in pieces)
        return inner(pieces, **options)

    lm._loglikelihood_tokens = watched
    (total,) = lm.loglikelihood_rolling([request(text)])
    assert sum(seen) == count
    assert total < 0


GENERATED = """
import datasets

def documents(max_seq_lengths, tokenizer, **others):
    rows = [{"start": f"import {tokenizer[-4:]} " * (n // 64), "said": "x"} for n in max_seq_lengths]
    return {"test": datasets.Dataset.from_list(rows)}
"""


def test_tasks_that_generate_their_documents_are_told_lengths_and_tokenizer(tasks: Path, tmp_path: Path) -> None:
    """As RULER's are, which need more packages."""
    (tasks / "generated.py").write_text(GENERATED)
    task = TASKS["continued"].replace("continued", "generated").replace("dataset_path: json", "dataset_path: ''")
    task = "\n".join(line for line in task.splitlines() if not line.startswith("dataset_kwargs"))
    (tasks / "generated.yaml").write_text(f"{task}\ncustom_dataset: !function generated.documents\n")
    out = tmp_path / "out.json"
    typed = ["lm-eval", "demo", "--include-path", str(tasks), "--json", str(out), "--tasks", "generated"]
    typed += ["--cache", "bf16", "--max-length", "128", "--batch-size", "3", "--metadata"]
    assert main([*typed, '{"max_seq_lengths": [64, 64, 128]}']) == 0
    assert json.loads(out.read_text())["rows"][0]["results"]["generated"]["sample_len"] == 3
    assert main([*typed, "[64]"]) == 2


def test_a_task_that_lacks_a_package_says_what_to_install(tasks: Path, capsys: pytest.CaptureFixture) -> None:
    (tasks / "lacking.py").write_text("import a_package_that_there_is_not")
    task = TASKS["continued"].replace("continued", "lacking")
    (tasks / "lacking.yaml").write_text(f"{task}\ncustom_dataset: !function lacking.documents\n")
    typed = ["lm-eval", "demo", "--include-path", str(tasks), "--cache", "bf16", "--tasks", "lacking"]
    assert main(typed) == 2
    assert "pip install 'xquant-jax[ruler]'" in capsys.readouterr().err


def test_start_token_is_not_set_twice() -> None:
    """With a tokenizer that sets one, where the text begins with one too."""
    lm = with_start(make())
    plain = lm.tok_encode("import os", add_special_tokens=False)
    for add in (None, True):
        assert lm.tok_encode("import os", add) == lm.tok_encode(f"{START}import os", add) == [0, *plain]
    assert lm.tok_encode(f"{START}import os", add_special_tokens=False) == [0, *plain]
    assert lm.tok_encode("", add_special_tokens=False) == []


def test_likelihood_of_what_follows_nothing_but_spaces() -> None:
    lm = make(cache="bf16,dtype=float32", batch_size=3)
    (alone,) = lm.loglikelihood([request("", "\n\nimport os")])
    assert lm.loglikelihood([request("\n\n", "import os")]) == [alone]


@pytest.mark.parametrize("positions", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": 77}])
def test_context_is_what_config_says_or_2048(tmp_path: Path, positions: dict) -> None:
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    del config["max_position_embeddings"]
    for file in DEMO.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config | positions))
    model: Any = lm_eval.XQuantLM
    assert model(str(tmp_path)).max_length == positions.get("max_position_embeddings") or 2048


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "JAX chooses the device"),
        ({"batch_size": "auto"}, "batch_size=auto is not supported"),
        ({"protocol": "other"}, "protocol=other is not known"),
        ({"cache": "other"}, "cache method 'other' is not known"),
    ],
)
def test_options_that_cannot_be_honoured(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_requests_that_cannot_be_honoured() -> None:
    lm = make(max_length=8)
    with pytest.raises(ConfigError, match="num_beams=4 is not supported"):
        lm.generate_until([request("x", {"num_beams": 4})])
    with pytest.raises(ConfigError, match="max_gen_toks=8 leaves no room"):
        lm.generate_until([request("x", {"max_gen_toks": 8})])
    with pytest.raises(ConfigError, match="does not fit max_length=8"):
        lm.loglikelihood([request("x", " a b c d e f g h i j k l m n o p")])
