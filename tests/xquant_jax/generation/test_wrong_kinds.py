"""Arguments of the wrong kind get this library's errors: in a process of its own, where nobody checks types first."""

import subprocess
import sys

SCRIPT = """
import xquant_jax as xq

model = xq.load("demo")
wrong = [
    (None, {}, xq.PromptError, "prompts of type NoneType are not a list"),
    ([None], {}, xq.PromptError, "prompt 0 is None"),
    ([["a"]], {}, xq.PromptError, "prompt 0 holds 'a', which is not a whole number"),
    ({"role": "user", "content": "Hi"}, {}, xq.PromptError, "wrap it: Chat([message, ...])"),
    ([{"role": "user", "content": "Hi"}], {}, xq.PromptError, "wrap it: Chat(messages)"),
    ((text for text in ["Hi"]), {}, xq.PromptError, "prompts of type generator"),
    ({"Hi"}, {}, xq.PromptError, "prompts of type set"),
    (7, {}, xq.PromptError, "prompts of type int"),
    (bytearray(b"Hi"), {}, xq.PromptError, "a prompt is bytes"),
    (["Hi", b"Hi"], {}, xq.PromptError, "prompt 1 is bytes"),
    ("Hi", {"seed": 1.5}, xq.ConfigError, "seed=1.5 is not a whole number"),
    ("Hi", {"seed": "7"}, xq.ConfigError, "seed='7' is not a whole number"),
    ("Hi", {"seed": [None]}, xq.ConfigError, "seed=None is not a whole number"),
    ("Hi", {"stop": None}, xq.ConfigError, "stop=None is not possible"),
    ("Hi", {"stop": b"a"}, xq.ConfigError, "stop=b'a' is not possible"),
    ("Hi", {"stop": [b"a"]}, xq.ConfigError, "give a list of strings"),
    ("Hi", {"stop": 5}, xq.ConfigError, "stop=5 is not possible"),
    ("Hi", {"stop_ids": "ab"}, xq.PromptError, "stop_ids is 'ab'"),
    ("Hi", {"stop_ids": 5}, xq.PromptError, "stop_ids is 5"),
    ("Hi", {"max_new_tokens": 2.5}, xq.ConfigError, "max_new_tokens=2.5 is not a whole number"),
    ("Hi", {"max_new_tokens": None}, xq.ConfigError, "max_new_tokens=None is not a whole number"),
    ("Hi", {"n": "2"}, xq.ConfigError, "n='2' is not a whole number"),
    ("Hi", {"sampling": "hot"}, xq.ConfigError, "sampling='hot' is not possible"),
    ("Hi", {"sampling": None}, xq.ConfigError, "sampling=None is not possible"),
    ("Hi", {"sampling": {"temperature": 1}}, xq.ConfigError, "give a Sampling"),
    ("Hi", {"sampling": xq.Sampling(temperature="hot")}, xq.ConfigError, "temperature='hot' is not a number"),
    ("Hi", {"sampling": xq.Sampling(temperature=1.0, top_k=2.5)}, xq.ConfigError, "top_k=2.5 is not possible"),
    ("Hi", {"add_special_tokens": None}, xq.ConfigError, "add_special_tokens=None"),
    ("Hi", {"cache": 4}, xq.ConfigError, "cache=4"),
    ("Hi", {"prefix": "prefix"}, xq.ConfigError, "prefix='prefix' is not a prefix"),
    ("Hi", {"prefill_chunk": 0.5}, xq.ConfigError, "prefill_chunk=0.5 is not a whole number"),
]
for prompts, options, error, message in wrong:
    for call in (xq.generate, xq.stream):
        try:
            call(model, prompts, **options)
        except error as caught:
            assert message in str(caught), f"{prompts!r} {options}: {caught}"
        else:
            raise AssertionError(f"{prompts!r} {options}: no error")
for messages in (None, "Hi", 5, [5], [None], {"role": "user", "content": "Hi"}):
    try:
        xq.chat(model, messages)
    except xq.PromptError:
        pass
    else:
        raise AssertionError(f"{messages!r}: no error")
"""


def test_every_one_is_a_clear_error() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=300)
