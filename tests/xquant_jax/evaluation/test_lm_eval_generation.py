"""What lm-evaluation-harness gets from a model that it lets generate or talk; skipped where it is not installed."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import xquant_jax as xq
from xquant_jax.cli import main
from xquant_jax.errors import ConfigError, PromptError, XQuantError, XQuantWarning
from xquant_jax.generation import buckets
from xquant_jax.model.chat_template import ChatTemplate
from xquant_jax.model.loading import DEMO
from xquant_jax.model.template_sandbox import Template
from xquant_jax.model.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="needs the lm-eval extra")

from lm_eval import tasks

from xquant_jax.evaluation import lm_eval

# the harness and what it imports warn on their own account
pytestmark = pytest.mark.filterwarnings("default")

START = "<|endoftext|>"


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """The demo model, and one program for all prompts; and the command reads no task files of the harness."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "SMALLEST_BUCKET", 64)
        patch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
        patch.setattr(lm_eval, "load", functools.cache(xq.load))
        yield


def make(**options: Any) -> Any:
    model: Any = lm_eval.XQuantLM
    return model("demo", cache="bf16,dtype=float32", dtype="float32", batch_size=2, max_length=40, **options)


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_what_is_generated_is_the_likeliest() -> None:
    lm = make()
    start = "    def __init__("
    whole, stopped = lm.generate_until(
        [request(start, {"max_gen_toks": 4}), request(start, {"until": [":"], "max_gen_toks": 4})]
    )
    assert whole == f"{stopped}:"
    (again,) = lm.loglikelihood([request(start, whole)])
    assert again[1]


def test_what_is_generated_is_what_generate_says() -> None:
    """Prompts of different options and lengths in one call, one of them too long, one of them empty."""
    lm = make()
    start = lm.tok_encode("import os\n" * 20)
    prompts = ["import os\nimport ", start[-32:], "class A:", [lm.prefix_token_id]]
    stops = [["\n"], [], ["(", START], ["", "\n\n"]]
    expected = [
        xq.generate(lm.model, [prompt], cache=lm.cache, max_new_tokens=8, stop=[s for s in stop if s]).results[0].text
        for prompt, stop in zip(prompts, stops, strict=True)
    ]
    texts = [prompts[0], "import os\n" * 20, prompts[2], ""]
    asked = [request(t, {"until": stop, "max_gen_toks": 8}) for t, stop in zip(texts, stops, strict=True)]
    hook = lm.cache_hook = SimpleNamespace(seen={})
    hook.add_partial = lambda kind, arguments, text: hook.seen.update({arguments[0]: text})
    assert lm.generate_until(asked) == expected
    assert hook.seen == dict(zip(texts, expected, strict=True))


def test_stop_strings_may_hold_special_tokens() -> None:
    lm = make()
    start, wishes = "    def __init__(", {"max_gen_toks": 8}
    whole, stopped = lm.generate_until([request(start, wishes), request(start, wishes | {"until": "):"})])
    backend = Tokenizer.from_file(DEMO / "tokenizer.json").backend
    backend.add_special_tokens(["):"])
    assert backend.get_vocab_size() == lm.model.tokenizer.backend.get_vocab_size()  # it was a token before
    lm.model = dataclasses.replace(lm.model, tokenizer=Tokenizer(backend))
    hidden, *ended = lm.generate_until(
        [request(start, wishes), *(request(start, wishes | {"until": [stop]}) for stop in ("):", "name):"))]
    )
    assert hidden == whole.replace("):", "")
    assert ended == [stopped, stopped.removesuffix("name")]


def test_repeats_of_a_prompt_are_drawn_one_by_one() -> None:
    lm, other = (make(seed=seed) for seed in (0, 1))
    wishes = {"do_sample": True, "until": [], "max_gen_toks": 8}
    prompts = ["import "] * 2
    said = lm.generate_until([request(prompt, wishes) for prompt in prompts])
    assert said[0] != said[1]
    assert said == lm.generate_until([request(prompt, wishes) for prompt in prompts])
    drawn = xq.generate(
        lm.model, prompts, cache=lm.cache, max_new_tokens=8, sampling=xq.Sampling(temperature=1), seed=0
    )
    assert said == [result.text for result in drawn.results]
    others = other.generate_until([request(prompt, wishes) for prompt in prompts])
    assert not {*others} & {*said}
    assert others == lm.generate_until([request(prompt, wishes | {"seed": 1}) for prompt in prompts])


def test_an_answer_that_cannot_go_on_ends_the_run() -> None:
    lm = make()
    lm.model = dataclasses.replace(lm.model, params=jax.tree.map(lambda x: x * np.float32("nan"), lm.model.params))
    with pytest.raises(XQuantError, match=r"continuation 1 of 1 cannot be generated: .*not finite"):
        lm.generate_until([request("import os", {"max_gen_toks": 8})])


TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is a "},
]
PLAIN = """
{%- for message in messages %}{{ message.role }}> {{ message.content | trim }}
{% endfor %}
{%- if add_generation_prompt %}assistant>{% endif %}"""


def talking(lm: Any, **templates: str) -> Any:
    """With chat templates, and a tokenizer that puts the start token before every text."""
    backend = Tokenizer.from_file(DEMO / "tokenizer.json").backend
    backend.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, lm.prefix_token_id)])
    named = {name: Template(source, Path("chat_template.jinja")) for name, source in templates.items()}
    lm.model = dataclasses.replace(
        lm.model, tokenizer=Tokenizer(backend), chat_template=ChatTemplate(named, {"bos_token": START})
    )
    return lm


def test_conversations_are_written_by_the_chat_template() -> None:
    lm = talking(make(), default=PLAIN)
    assert lm.chat_template(True) == PLAIN
    assert lm.chat_template(False) is None
    asked = lm.apply_chat_template(TALK[:2])
    assert asked == "system> Be short.\nuser> What is it?\nassistant>"
    begun = lm.apply_chat_template(TALK, add_generation_prompt=False)
    assert begun == "system> Be short.\nuser> What is it?\nassistant> It is a"  # as the template trims it
    spaced = talking(make(), default=PLAIN.replace(" | trim", ""))
    assert spaced.apply_chat_template(TALK, add_generation_prompt=False) == f"{begun} "
    lost = talking(make(), default=PLAIN.replace("message.content | trim", "'...'"))
    with pytest.raises(PromptError, match="no answer can continue it"):
        lost.apply_chat_template(TALK, add_generation_prompt=False)


def test_conversations_get_the_special_tokens_of_their_template_alone() -> None:
    """As transformers' `apply_chat_template(tokenize=True)` does it, for answers and for likelihoods."""
    for template, starts in ((PLAIN, 0), ("{{ bos_token }}" + PLAIN, 1)):
        lm = talking(make(), default=template)
        text = lm.apply_chat_template(TALK[:2])
        own = lm.model.tokenizer.encode(text, special_tokens=False)
        assert own.count(lm.prefix_token_id) == starts
        assert lm.tok_encode(text) == own
        context, answer = lm._encode_pair(text, " A")
        assert [*context, *answer] == lm.model.tokenizer.encode(f"{text} A", special_tokens=False)
        assert lm.tok_encode(str(text)) == (own if starts else [lm.prefix_token_id, *own])  # a text of its own
        (said,) = lm.generate_until([request(text, {"max_gen_toks": 8})])
        chat = xq.generate(lm.model, xq.Chat(TALK[:2]), cache=lm.cache, max_new_tokens=8)
        assert said == chat.results[0].text


def test_a_template_that_refuses_a_system_message_gets_none() -> None:
    refusing = PLAIN.replace(
        "%}{{", "%}{% if message.role not in roles %}{{ raise_exception('no ' ~ message.role) }}{% endif %}{{", 1
    )
    lm = talking(make(), default="{%- set roles = ['user', 'assistant'] %}" + refusing)
    with pytest.warns(XQuantWarning, match="system messages are left out: .*no system"):
        assert lm.apply_chat_template(TALK[:2]) == "user> What is it?\nassistant>"
    with pytest.raises(PromptError, match="no judge"):
        lm.apply_chat_template([{"role": "judge", "content": "?"}])


def test_one_of_several_templates_is_chosen_by_its_name() -> None:
    lm = talking(make(), default=PLAIN, short="{{ messages[-1].content }}:")
    texts, names = [], []
    for name in (True, "short"):
        lm.chat_template(name)
        texts.append(lm.apply_chat_template(TALK[:2]))
        names.append(lm.tokenizer_name)
    assert texts == ["system> Be short.\nuser> What is it?\nassistant>", "What is it?:"]
    assert names[0] != names[1]  # the harness keeps texts by it
    with pytest.raises(ConfigError, match="no chat template 'long'; choose default, short"):
        lm.chat_template("long")


def test_a_model_without_a_template_says_so() -> None:
    lm = make()
    for ask in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template(TALK)):
        with pytest.raises(ConfigError, match="this model has no chat template"):
            ask()


TASK = """
task: asked
dataset_path: json
dataset_kwargs: {data_files: {test: DOCUMENTS}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["."], max_gen_toks: 16, do_sample: false}
repeats: 2
metric_list: [{metric: exact_match}]
"""


def test_command_passes_on_how_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    documents = [{"q": f"{i}?", "a": f"{i}!"} for i in range(2)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "asked.yaml").write_text(TASK.replace("DOCUMENTS", str(tmp_path / "documents.jsonl")))
    template = talking(make(), default="no", short=PLAIN).model.chat_template
    load, seen = lm_eval.load, []
    monkeypatch.setattr(
        lm_eval, "load", lambda *path, **options: dataclasses.replace(load(*path, **options), chat_template=template)
    )

    def generate_until(lm: Any, requests: list, disable_tqdm: bool = False) -> list[str]:
        seen.append((lm.seed, [request.args for request in requests]))
        return ["1!"] * len(requests)

    model: Any = lm_eval.XQuantLM
    monkeypatch.setattr(model, "generate_until", generate_until)
    out = tmp_path / "out.json"
    typed = [
        "lm-eval",
        "demo",
        "--tasks",
        "asked",
        "--include-path",
        str(tmp_path),
        "--cache",
        "bf16",
        "--json",
        str(out),
    ]
    typed += ["--num-fewshot", "1", "--system-instruction", "Count.", "--limit", "1"]
    how = ["--gen-kwargs", "do_sample=true,top_k=-1", "max_gen_toks=8", "--seed", "5"]
    assert main([*typed, "--apply-chat-template", "short", *how]) == 0
    wishes = {"until": ["."], "max_gen_toks": 8, "do_sample": True, "top_k": -1}
    turns = "system> Count.\nuser> 1?\nassistant> 1!\nuser> 0?\nassistant>"
    assert seen.pop() == (5, [(turns, wishes)] * 2)
    written = json.loads(out.read_text())
    assert (written["seed"], written["apply_chat_template"], written["fewshot_as_multiturn"]) == (5, "short", True)
    assert (written["system_instruction"], written["gen_kwargs"]["top_k"]) == ("Count.", -1)
    assert main([*typed, "--apply-chat-template", "short", "--no-fewshot-as-multiturn"]) == 0
    assert seen.pop()[1][0][0] == "system> Count.\nuser> 1? 1!\n\n0?\nassistant>"
    assert main([*typed, "--apply-chat-template", "long"]) == 2
    assert main([*typed, "--fewshot-as-multiturn"]) == 2
    assert main([*typed, "--gen-kwargs", "temperature"]) == 2
