"""Chat templates against Hugging Face transformers, whose renderings `make golden` wrote, and what they refuse."""

import enum
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import GOLDEN
from xquant_jax.errors import CheckpointError, PromptError
from xquant_jax.model import template_sandbox
from xquant_jax.model.chat_template import ChatTemplate, check_mappings, check_messages
from xquant_jax.model.template_sandbox import Template

MODELS = sorted(path.parent for path in (GOLDEN / "chat").glob("*/golden.json"))
CONVERSATIONS = json.loads((GOLDEN / "chat" / "conversations.json").read_text(encoding="utf-8"))
TAKE_PARTS = ["gemma-3"]
HELLO = [{"role": "user", "content": "Hello"}]


class Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.fromisoformat(CONVERSATIONS["now"])


def template(source: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate({"default": Template(source, Path("chat_template.jinja"))}, special_tokens)


def read(directory: Path, **files: Any) -> ChatTemplate | None:
    """From a directory of these files: text for `NAME.jinja`, values for `NAME.json`."""
    for name, value in files.items():
        path = directory / (f"{name}.jinja" if name == "chat_template" else f"{name}.json")
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return ChatTemplate.from_directory(directory)


def rendered(directory: Path, tools: list[dict[str, Any]] | None = None, **files: Any) -> str:
    chat_template = read(directory, **files)
    assert chat_template is not None
    return chat_template.render(HELLO, tools=tools)


class TestAgainstTransformers:
    def test_families_are_there(self) -> None:
        names = {"gemma-3", "llama-3.1", "llama-3.2", "mistral-v0.3", "qwen2.5", "qwen3", "smollm2"}
        assert {model.name for model in MODELS} == names

    @pytest.mark.parametrize("case", CONVERSATIONS["cases"], ids=lambda case: case["name"])
    @pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
    def test_renders_the_same(self, model: Path, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(template_sandbox, "datetime", Clock)
        chat_template = ChatTemplate.from_directory(model)
        assert chat_template is not None
        renderings = json.loads((model / "golden.json").read_text(encoding="utf-8"))["renderings"]
        joins = case["name"] == "parts" and model.name not in TAKE_PARTS
        expected = renderings["parts joined" if joins else case["name"]]

        def render() -> str:
            return chat_template.render(
                case["messages"],
                tools=case.get("tools"),
                add_generation_prompt=case.get("add_generation_prompt", True),
                **case.get("options", {}),
            )

        if isinstance(expected, str):
            assert render() == expected
        else:
            with pytest.raises(PromptError) as raised:
                render()
            assert expected["error"] in str(raised.value)

    @pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
    def test_special_tokens_are_the_same(self, model: Path) -> None:
        chat_template = ChatTemplate.from_directory(model)
        assert chat_template is not None
        assert chat_template.special_tokens == json.loads((model / "golden.json").read_text())["special_tokens"]


class TestFiles:
    def test_none_without_a_template(self, tmp_path: Path) -> None:
        assert read(tmp_path) is None
        assert read(tmp_path, tokenizer_config={"bos_token": "<s>", "chat_template": None}) is None
        assert read(tmp_path, chat_template_json={"chat_template": "of a processor"}) is None

    def test_jinja_file_comes_before_the_config(self, tmp_path: Path) -> None:
        assert rendered(tmp_path, tokenizer_config={"chat_template": "config"}) == "config"
        named = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "config with tools"}]
        assert rendered(tmp_path, [{}], tokenizer_config={"chat_template": named}, chat_template="file") == "file"

    def test_named_templates(self, tmp_path: Path) -> None:
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
        assert rendered(tmp_path, tokenizer_config={"chat_template": named}) == "plain"
        assert rendered(tmp_path, [], tokenizer_config={"chat_template": named}) == "with tools"
        assert rendered(tmp_path, [{}], tokenizer_config={"chat_template": named[:1]}) == "plain"

    def test_named_templates_in_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "additional_chat_templates"
        folder.mkdir()
        (folder / "tool_use.jinja").write_text("with tools")
        assert rendered(tmp_path, chat_template="plain") == "plain"
        assert rendered(tmp_path, [{}]) == "with tools"

    def test_named_templates_need_a_default(self, tmp_path: Path) -> None:
        named = [{"name": "rag", "template": "{{ documents }}"}]
        with pytest.raises(CheckpointError, match=r"tokenizer_config.json.*\['rag'\].*default"):
            rendered(tmp_path, tokenizer_config={"chat_template": named})

    def test_special_tokens_are_text_or_objects(self, tmp_path: Path) -> None:
        config = {
            "add_bos_token": True,
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
            "eos_token": "</s>",
            "pad_token": None,
            "image_token": "<image>",
            "additional_special_tokens": ["<a>"],
            "extra_special_tokens": {"audio_token": "<audio>"},
            "chat_template": "{{ bos_token ~ eos_token ~ image_token ~ audio_token }} {{ pad_token is defined }}",
        }
        assert rendered(tmp_path, tokenizer_config=config) == "<s></s><image><audio> False"

    def test_older_special_tokens_count_where_no_added_tokens_are_listed(self, tmp_path: Path) -> None:
        config = {
            "bos_token": "<s>",
            "image_token": "<i>",
            "chat_template": "{{ bos_token ~ eos_token ~ image_token }}",
        }
        older = {"bos_token": {"content": "<old>"}, "eos_token": "</s>", "image_token": "<old>"}
        assert rendered(tmp_path, tokenizer_config=config, special_tokens_map=older) == "<old></s><i>"
        config["added_tokens_decoder"] = {}
        assert rendered(tmp_path, tokenizer_config=config, special_tokens_map=older) == "<s><i>"

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"tokenizer_config": "{"}, "tokenizer_config.json is not valid JSON"),
            ({"tokenizer_config": {"chat_template": 3}}, "tokenizer_config.json has chat_template=3"),
            ({"tokenizer_config": {"chat_template": []}}, r"tokenizer_config.json has chat_template=\[\]"),
            (
                {"tokenizer_config": {"chat_template": [{"name": "default"}]}},
                "tokenizer_config.json has chat_template=",
            ),
            ({"tokenizer_config": {"chat_template": [{"name": []}]}}, "tokenizer_config.json has chat_template="),
            ({"tokenizer_config": {"chat_template": "", "bos_token": 1}}, "tokenizer_config.json has bos_token=1"),
            ({"chat_template": "", "special_tokens_map": {"eos_token": []}}, "special_tokens_map.json has eos_token="),
            ({"chat_template": "", "special_tokens_map": "[]"}, "special_tokens_map.json is not valid"),
            ({"chat_template": "\n{% if %}"}, "chat_template.jinja: line 2 of the chat template cannot be compiled"),
            ({"chat_template": "{{ x | nothing }}"}, "chat_template.jinja: .*No filter named 'nothing'"),
            ({"chat_template": "{% break %}"}, "chat_template.jinja: the chat template cannot be compiled: 'break'"),
        ],
    )
    def test_broken_files_are_named(self, tmp_path: Path, files: dict[str, Any], message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path, **files)

    def test_file_in_another_encoding_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_bytes("Grüße".encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not text in UTF-8"):
            ChatTemplate.from_directory(tmp_path)


class TestSandbox:
    def test_generation_is_put_out(self) -> None:
        source = (
            "{% for m in messages %}\n    {% generation %}\n    {{ m.content }}\n    {% endgeneration %}\n{% endfor %}"
        )
        assert template(source).render(HELLO) == "    Hello\n"

    def test_loops_can_break(self) -> None:
        assert (
            template("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}").render(HELLO)
            == "01"
        )

    def test_json_options(self) -> None:
        source = "{{ {'b': '<é>', 'a': [1]} | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"
        assert template(source).render(HELLO) == '{"a":[1],"b":"<\\u00e9>"}'

    def test_globals(self) -> None:
        source = (
            "{% set n = namespace(dict(a=1), self=2) %}{% set n.a = 5 %}{{ n.a }}{{ n.self }}{{ dict.fromkeys('x') }}"
        )
        assert template(source).render(HELLO) == "52{'x': None}"

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ messages.append(1) }}",
            "{{ raise_exception.__globals__.json }}",
            "{{ dict.__class__.__mro__ }}",
            "{% set n = namespace(__class__=1) %}",
            "{% set n = namespace() %}{% set n.__x = 1 %}",
            "{% include 'other' %}",
            "{{ range(10000000) }}",
            "{{ 1 / 0 }}",
            "{{ missing.attribute }}",
            "{{ messages | tojson(indent=missing) }}",
        ],
    )
    def test_what_fails_is_a_prompt_error(self, source: str) -> None:
        with pytest.raises(
            PromptError, match=r"template in chat_template\.jinja cannot render the messages: \w+Error: "
        ):
            template(source).render(HELLO)

    def test_refusal_has_the_words_of_the_template(self) -> None:
        with pytest.raises(PromptError, match="refuses the messages: No system, please"):
            template("{{ raise_exception('No system, please') }}").render(HELLO)

    def test_only_plain_data_is_given(self) -> None:
        class Color(str, enum.Enum):  # noqa: UP042 - a string that prints as something else
            RED = "red"

        options = {"color": Color.RED, "half": np.float64(0.5), "pair": (1, True), "none": None}
        assert (
            template("{{ color }} {{ half }} {{ pair }} {{ none }}").render(HELLO, **options)
            == "red 0.5 (1, True) None"
        )
        with pytest.raises(PromptError, match="a ndarray; give what JSON can hold"):
            template("").render(HELLO, image=np.zeros(2))


class TestParts:
    PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]  # noqa: RUF012

    @pytest.mark.parametrize(
        "loop",
        [
            "{% for m in messages %}{% for part in m.content %}",
            "{% for m in messages %}{% for part in m['content'] | list %}",
            "{% for m in messages %}{% set content = m.content %}{% for part in content %}",
        ],
    )
    def test_template_that_loops_over_them_gets_them(self, loop: str) -> None:
        assert template(loop + "{{ part.text }};{% endfor %}{% endfor %}").render(self.PARTS) == "one;two;"

    def test_other_templates_get_lines(self) -> None:
        source = "{% for m in messages %}{% for word in m.content.split() %}{{ word }},{% endfor %}{% endfor %}"
        assert template(source).render(self.PARTS) == "one,two,"


class TestMessages:
    @pytest.mark.parametrize(
        ("messages", "error"),
        [
            ("Hello", "messages='Hello' is not a list of messages; give"),
            (None, "messages=None is not a list"),
            ({"role": "user", "content": "Hello"}, "is not a list"),
            ([], "the list of messages is empty; give one at least"),
            ([*HELLO, "Hello"], "message 2 is 'Hello'; give a mapping"),
            ([{"content": "Hello"}], "message 1 has role=None; give a name"),
            ([{"role": "", "content": "Hello"}], "message 1 has role=''"),
            ([{"role": 1, "content": "Hello"}], "message 1 has role=1"),
            ([{"role": "user"}], "message 1 has no content; give text, or tool_calls"),
            ([{"role": "assistant", "content": None, "tool_calls": []}], "message 1 has no content"),
            ([{"role": "user", "content": 3}], "message 1 has content=3; give text, or a list of parts"),
            ([{"role": "user", "content": b"Hello"}], "message 1 has content=b'Hello'"),
            ([{"role": "user", "content": {"text": "Hello"}}], "message 1 has content="),
            ([{"role": "user", "content": ["Hello"]}], "message 1 has a part 'Hello'; give mappings"),
            ([{"role": "user", "content": [{"text": "Hello"}]}], "message 1 has a part {'text': 'Hello'}"),
            (
                [{"role": "user", "content": [{"type": "image_url"}]}],
                "message 1 has a part of type 'image_url'; only text",
            ),
            ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a part with text=None; give a string"),
        ],
    )
    def test_wrong_form_is_refused(self, messages: Any, error: str) -> None:
        with pytest.raises(PromptError) as raised:
            check_messages(messages)
        assert error in str(raised.value)

    def test_right_forms_pass(self) -> None:
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        check_messages(HELLO)
        check_messages(({"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1", "name": "f"}))
        check_messages([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])

    def test_render_checks_them(self) -> None:
        with pytest.raises(PromptError, match="message 1 has no content"):
            template("").render([{"role": "user"}])

    def test_messages_are_not_changed(self) -> None:
        messages = [{"role": "assistant", "content": "Hi", "reasoning": "So", "name": None}]
        assert template("{{ messages[0].thinking }}").render(messages) == "So"
        assert messages == [{"role": "assistant", "content": "Hi", "reasoning": "So", "name": None}]

    @pytest.mark.parametrize("tools", [["get_time"], {"type": "function"}, "get_time", 1])
    def test_tools_are_mappings(self, tools: Any) -> None:
        with pytest.raises(PromptError, match=r"tools=.* is not a list of mappings; give one, or None"):
            check_mappings("tools", tools)
