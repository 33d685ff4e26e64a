"""Conversations: the template's text, the same answers as from `generate`, and a cache that is kept between turns."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

import xquant_jax as xq
from tests.xquant_jax.generation.conftest import EXACT
from xquant_jax.cli import main, options
from xquant_jax.generation import runner
from xquant_jax.generation.request import Options, Request
from xquant_jax.model.chat_template import ChatTemplate
from xquant_jax.model.template_sandbox import Template

PLAIN = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.arguments.path }}\n{% endif %}{% endfor %}"
    "{% if tools %}{{ tools[0].name }}{% endif %}{% if add_generation_prompt %}assistant:{% endif %}{{ mood }}"
)
FORGETS = "{% for m in messages[-1:] %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"
USER = {"role": "user", "content": "def main():"}


def with_template(model: xq.Model, source: str) -> xq.Model:
    template = ChatTemplate({"default": Template(source, Path("chat_template.jinja"))}, {})
    return dataclasses.replace(model, chat_template=template)


@pytest.fixture(scope="module")
def talking(model: xq.Model) -> xq.Model:
    """Its generation_config says how it is to be sampled."""
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    return dataclasses.replace(with_template(model, PLAIN), generation_config=settings)


def test_chat_is_generate_on_the_text_that_the_template_writes(talking: xq.Model) -> None:
    conversations = [[USER], [{"role": "system", "content": "short"}, USER]]
    texts = ["user:def main():\nassistant:", "system:short\nuser:def main():\nassistant:"]
    chatted = xq.chat(talking, conversations, max_new_tokens=8, seed=1).results
    sampling = xq.Sampling(temperature=0.8, top_p=0.9)
    expected = xq.generate(talking, texts, max_new_tokens=8, seed=1, sampling=sampling).results
    assert [(r.prompt, r.tokens, r.text) for r in chatted] == [(r.prompt, r.tokens, r.text) for r in expected]
    (alone,) = xq.chat(talking, [USER], max_new_tokens=8, seed=1).results
    assert alone.tokens == expected[0].tokens
    streamed = xq.stream(talking, xq.Chat([USER]), max_new_tokens=8, seed=1, sampling="model")
    assert [token.token for token in streamed] == expected[0].tokens


def test_tools_options_and_calls_reach_the_template(talking: xq.Model) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": '{"path": "a.txt"}'}}]}
    (result,) = xq.chat(
        talking, [USER, called], tools=[{"name": "read"}], template_options={"mood": "!"}, max_new_tokens=1
    ).results
    assert result.prompt == "user:def main():\nassistant:\na.txt\nreadassistant:!"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "the list of messages is empty"),
        ([{"content": "Hi"}], {}, "role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "only text is supported"),
        ([USER], {"template_options": {"messages": []}}, "'messages' is no option of a chat template"),
    ],
)
def test_what_is_no_conversation_is_a_clear_error(talking: xq.Model, messages: list, options: dict, message) -> None:
    with pytest.raises(xq.PromptError, match=message):
        xq.chat(talking, messages, **options)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of what engines feed, a list for every time."""
    lengths, arrivals = [], runner.Arrivals.of

    def watched(*arguments: Any) -> Any:
        made = arrivals(*arguments)
        lengths.append(made.lengths.tolist())
        return made

    monkeypatch.setattr(runner.Arrivals, "of", watched)
    return lengths


def talk(conversation: xq.Conversation, *messages: str) -> list[tuple[list[int], str]]:
    answers = []
    for message in messages:
        tokens = list(conversation.say(message))
        answers.append(([token.token for token in tokens], "".join(token.text for token in tokens)))
    return answers


def test_every_turn_is_what_the_whole_conversation_would_get_and_feeds_only_what_is_new(
    talking: xq.Model, fed: list[list[int]]
) -> None:
    """Exactly cached; over a block of the cache. A long first message makes the others small."""
    sampling = xq.Sampling(1.2, 0.9, frequency_penalty=0.3)
    conversation = xq.Conversation(
        talking, Request("", 64, 3, sampling, stop_ids=[]), Options(EXACT), context=255, system="x = 1\n" * 12
    )
    (first, said), (second, _) = talk(conversation, "def f(a):", "class A:")
    before = conversation.messages[:-1]
    lengths = [length for (length,) in fed if length]
    assert lengths[0] > 60
    assert lengths[1] < 16
    assert conversation.tokens > 128
    prompt = talking.chat_template.render(before)
    assert before[2] == {"role": "assistant", "content": said}
    assert prompt.endswith(f"user:def f(a):\nassistant:{said}\nuser:class A:\nassistant:")
    head, tail = (
        talking.tokenizer.encode(text) for text in (prompt[: prompt.index(said)], "\nuser:class A:\nassistant:")
    )
    (whole,) = xq.generate(
        talking, [[*head, *first, *tail]], cache=EXACT, max_new_tokens=64, seed=3, sampling=sampling, stop_ids=[]
    ).results
    assert second == whole.tokens


def test_a_quantized_conversation_goes_on_over_turns(talking: xq.Model) -> None:
    conversation = xq.Conversation(talking, Request("", 60, 3, stop_ids=[]), Options(), context=255)
    exact = xq.Conversation(talking, Request("", 60, 3, stop_ids=[]), Options(EXACT), context=255)
    for (made, _), (expected, _) in zip(
        *(talk(c, "def f(a):", "class A:") for c in (conversation, exact)), strict=True
    ):
        assert made[:20] == expected[:20]


def test_a_template_that_forgets_has_all_fed_again(model: xq.Model, fed: list[list[int]]) -> None:
    talking = with_template(model, FORGETS)
    conversation = xq.Conversation(talking, Request("", 5, stop_ids=[]), Options(EXACT), context=255)
    answers = talk(conversation, "def f(a):", "class A:")
    alone = xq.generate(talking, "user:class A:\nassistant:", cache=EXACT, max_new_tokens=5, stop_ids=[]).results[0]
    assert answers[1][0] == alone.tokens
    assert conversation.messages[0] == {"role": "user", "content": "def f(a):"}


def test_an_answer_that_is_closed_early_stays_as_far_as_it_came(talking: xq.Model, fed: list[list[int]]) -> None:
    conversation = xq.Conversation(talking, Request("", 40, stop_ids=[]), Options(EXACT), context=255)
    answer = conversation.say("def f(a):")
    seen = [next(answer).text for _ in range(5)]
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(seen)}
    before = conversation.tokens
    talk(conversation, "x")
    assert conversation.tokens > before
    assert max(length for (length,) in fed[1:]) < 12  # nothing was fed again


def test_another_message_ends_the_answer_before_it(talking: xq.Model) -> None:
    conversation = xq.Conversation(talking, Request("", 20, stop_ids=[]), Options(EXACT), context=255)
    first = conversation.say("def f(a):")
    began = [next(first).text for _ in range(3)]
    talk(conversation, "x")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == "".join(began)
    assert list(first) == []


def test_a_message_that_is_no_text_is_an_error_and_the_next_is_answered(talking: xq.Model) -> None:
    conversation = xq.Conversation(talking, Request("", 3, stop_ids=[]), Options(EXACT), context=255)
    with pytest.raises(xq.PromptError, match="not valid Unicode"):
        talk(conversation, "a \udcff")
    assert conversation.messages == []
    assert len(talk(conversation, "x")[0][0]) == 3


def test_cleared_it_begins_anew_and_full_it_says_so(talking: xq.Model) -> None:
    conversation = xq.Conversation(talking, Request("", 200, stop_ids=[]), Options(EXACT), context=100, system="a")
    first = talk(conversation, "def f(a):")
    with pytest.raises(xq.CacheFullError, match="begin a new one, or give it a larger context"):
        talk(conversation, "x")
    assert len(conversation.messages) == 3  # the question that had no room is not part of it
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "a"}]
    assert talk(conversation, "def f(a):") == first


def test_a_model_without_a_template_cannot_talk(model: xq.Model) -> None:
    with pytest.raises(xq.PromptError, match="this model has no chat template"):
        xq.Conversation(model, Request(""), Options(), context=100)


def test_the_command_answers_the_lines_of_stdin(
    talking: xq.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(options, "load", lambda *_, **__: talking)
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(a):\n\n/clear\n/what\ndef f(a):\n/exit\nnever\n"))
    command = ["chat", "talking", "--cache", EXACT, "--max-new-tokens", "8", "--seed", "4", "--system", "a"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "sampling: temperature 0.8, top_p 0.9, seed 4" in printed.err
    assert "/what is no command" in printed.err
    half = len(printed.out) // 2
    assert printed.out[:half] == printed.out[half:]  # the same question in a new conversation
    out = tmp_path / "out.json"
    asked = ["generate", "talking", "--cache", EXACT, "--max-new-tokens", "8", "--seed", "4", "--sampling", "model"]
    assert main([*asked, "--chat", "def f(a):", "--system", "a", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["results"][0]["text"] + "\n" == printed.out[:half]


def test_messages_stand_in_lines_of_a_batch(talking: xq.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "load", lambda *_, **__: talking)
    asked, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    body = {"model": "any", "messages": [USER], "max_tokens": 6, "temperature": 0, "top_p": 1, "stream": False}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"messages": [USER], "max_tokens": 6},
        {"messages": [], "max_tokens": 6},
    ]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["batch", "talking", str(asked), str(results), "--cache", EXACT]) == 1
    written = {r["line"]: r for r in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    (expected,) = xq.chat(talking, [USER], cache=EXACT, max_new_tokens=6, sampling=xq.Sampling()).results
    assert (written[1]["custom_id"], written[1]["tokens"]) == ("a", expected.tokens)
    assert written[2]["text"] == expected.text
    assert "the list of messages is empty" in written[3]["error"]
