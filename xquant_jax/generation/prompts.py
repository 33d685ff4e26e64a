"""Prompts as they are given, a text, token ids or a conversation, and the token ids that they are."""

import dataclasses
import json
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xquant_jax.errors import PromptError
from xquant_jax.model.loading import Model


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation, which the chat template of the model turns into a text.

    messages: mappings with `role` ("system", "user", "assistant", "tool") and `content`, in the form of OpenAI's API;
        the answer is the next message of the assistant
    tools: JSON schemas of functions that the model may call
    options: more variables of the template, such as `{"enable_thinking": False}` for Qwen3
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Prompt = str | Sequence[int] | np.ndarray | jax.Array | Chat


def one_by_one(prompts: Any) -> list[Any]:
    """The prompts as a list, also where one stands alone. Raises `PromptError` for what is no prompt and no list."""
    if isinstance(prompts, jax.Array):
        prompts = np.asarray(prompts)
    if isinstance(prompts, bytes | bytearray):
        raise PromptError("a prompt is bytes; decode it to text, or give token ids")
    if isinstance(prompts, str | Chat):
        return [prompts]
    if not _is_list(prompts):
        kind = "a conversation; wrap it: Chat([message, ...])" if isinstance(prompts, Mapping) else "not a list"
        raise PromptError(
            f"prompts of type {type(prompts).__name__} are {kind}; give a text, token ids, a Chat or a list"
        )
    if len(prompts) > 0 and isinstance(prompts[0], Mapping):
        raise PromptError("a list of messages is one conversation; wrap it: Chat(messages), or call xq.chat")
    return [prompts] if len(prompts) > 0 and isinstance(prompts[0], numbers.Integral) else list(prompts)


def prompt_tokens(model: Model, name: str, prompt: Any, add_special_tokens: bool) -> tuple[str | list[int], list[int]]:
    """A prompt as text or ids, and its token ids. `name`: what errors call it.

    add_special_tokens: whether a text gets the special tokens that the tokenizer prescribes, such as a BOS, unless it
        begins with them; a conversation gets those of its template alone

    Raises `PromptError` for what the model cannot take.
    """
    if isinstance(prompt, bytes | bytearray):
        raise PromptError(f"{name} is bytes; decode it to text, or give token ids")
    if isinstance(prompt, Chat):
        prompt, add_special_tokens = written(model, prompt), False
    if isinstance(prompt, str):
        ids = encode(model, name, prompt, add_special_tokens)
    else:
        prompt = ids = token_ids(model, name, prompt)
    if not ids:
        raise PromptError(f"{name} is empty; give at least one token")
    return prompt, ids


def written(model: Model, chat: Chat) -> str:
    """A conversation as the model's chat template writes it, up to where the answer begins.

    Raises `PromptError` for a model without one, and for messages that it refuses.
    """
    if model.chat_template is None:
        raise PromptError(
            "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); give the"
            " prompt as a text, as the model was trained on it"
        )
    if not isinstance(chat.options, Mapping):
        raise PromptError(f"the options of a chat are {chat.options!r}; give a dict of variables of the template")
    own = ("messages", "tools", "documents", "add_generation_prompt")
    if taken := [name for name in chat.options if name in own or not isinstance(name, str)]:
        raise PromptError(
            f"{taken[0]!r} is no option of a chat template; options are variables beside {', '.join(own)}"
        )
    messages: Any = chat.messages
    listed = isinstance(messages, Sequence) and not isinstance(messages, str)
    written_out: Any = [_with_arguments(message) for message in messages] if listed else messages
    return model.chat_template.render(written_out, tools=chat.tools or None, **chat.options)


def _with_arguments(message: Any) -> Any:
    """A message whose tool calls have their arguments as objects, as templates want them; OpenAI's API has them as JSON
    in a string."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(calls, Sequence):
        return message

    def parsed(call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
            return call
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call
        return {**call, "function": {**function, "arguments": arguments}}

    return {**message, "tool_calls": [parsed(call) for call in calls]}


def encode(model: Model, name: str, prompt: str, add_special_tokens: bool) -> list[int]:
    """The token ids of a text. Raises `PromptError` for one that the model cannot take; `name`: what errors call it."""
    if model.tokenizer is None:
        raise PromptError("this model has no tokenizer.json; give prompts as token ids")
    if not prompt:
        raise PromptError(f"{name} is empty; give at least one character")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{name} is not valid Unicode: {error.reason}") from error
    ids = model.tokenizer.encode(prompt, special_tokens=add_special_tokens)
    return token_ids(model, name, ids)  # a tokenizer may have more tokens than the model


def token_ids(model: Model, what: str, ids: Any) -> list[int]:
    """Plain numbers. Raises `PromptError` for what is not a list of token ids of the model."""
    size, plain = model.config.vocab_size, []
    if isinstance(ids, str) or not _is_list(ids):
        raise PromptError(f"{what} is {ids!r}; give a text, or a list of token ids")
    for token in np.asarray(ids).tolist() if isinstance(ids, jax.Array) else ids:
        try:
            plain.append(operator.index(token))
        except TypeError:
            raise PromptError(f"{what} holds {token!r}, which is not a whole number") from None
        if not 0 <= plain[-1] < size:
            raise PromptError(f"{what} holds token id {token}; the model's ids are 0 to {size - 1}")
    return plain


def _is_list(value: Any) -> bool:
    """A list, a tuple or an array; no generator, no set, no dict: their order is nobody's word."""
    return value.ndim > 0 if isinstance(value, np.ndarray | jax.Array) else isinstance(value, Sequence)
