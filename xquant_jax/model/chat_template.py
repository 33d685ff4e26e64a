"""Chat messages to the text of a prompt, by the template of a model's directory, as Hugging Face transformers 5 does.

What a template may do is in `template_sandbox`.
"""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.shards import read_json
from xquant_jax.errors import CheckpointError, PromptError
from xquant_jax.model.template_sandbox import Template

CONFIG_FILE = "tokenizer_config.json"

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Those that every tokenizer may have. Others have names of the same form, such as `image_token`."""

EXAMPLE = '{"role": "user", "content": "Hello"}'
PART = '{"type": "text", "text": "Hello"}'


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The templates of a model's directory by their names, and the special tokens that they see.

    A model has one template, "default", or several, of which "tool_use" is for chats with tools.
    """

    templates: Mapping[str, Template]
    special_tokens: Mapping[str, str]

    @classmethod
    def from_directory(cls, directory: Path) -> "ChatTemplate | None":
        """Reads the files that transformers' tokenizers read; None if there is no template among them.

        `chat_template.jinja` and `additional_chat_templates/NAME.jinja` come before `tokenizer_config.json`.
        Raises `CheckpointError`, which names the file, for one that is broken or a template that jinja2 cannot compile.
        """
        file = directory / CONFIG_FILE
        config = read_json(file) if file.exists() else {}
        templates = _template_files(directory) or _configured_templates(config.get("chat_template"), file)
        if not templates:
            return None
        for template in templates.values():
            template.check()  # raises here, not in the first chat
        return cls(templates, _special_tokens(directory, config))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The prompt, special tokens included: encode it without adding any.

        messages: see `check_messages`. Parts of text reach a template that loops over them; for others, which would
            print the list, they are joined by line ends, as inference servers do. All else is as in transformers'
            `apply_chat_template`.
        tools: JSON schemas of functions
        documents: texts for templates that quote them
        add_generation_prompt: whether the prompt ends with the opening of an answer
        options: further variables of the template, such as `enable_thinking` of Qwen3's. One that a template does not
            read changes nothing.

        Raises `PromptError` for messages that have the wrong form or that the template refuses.
        """
        check_messages(messages)
        check_mappings("tools", tools)
        check_mappings("documents", documents)
        template = self._choose(tools)
        if not template.takes_parts:
            messages = [_with_joined_parts(message) for message in messages]
        return template.render(
            {
                **self.special_tokens,
                **options,
                "messages": [_prepared(message) for message in messages],
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def _choose(self, tools: object) -> Template:
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            files = ", ".join(sorted({str(template.file) for template in self.templates.values()}))
            raise CheckpointError(
                f"{files}: there are chat templates {sorted(self.templates)}; one must be the default"
            )
        return self.templates[name]


def check_messages(messages: Any) -> None:
    """Raises `PromptError` unless `messages` are a sequence of mappings in the form of OpenAI's chat API.

    Each has a `role` and a `content`: text, or a list of parts `{"type": "text", "text": ...}`. A message with
    `tool_calls` can do without content. Other keys are the template's business, and so are the roles and their order.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise PromptError(f"messages={reprlib.repr(messages)} is not a list of messages; give [{EXAMPLE}]")
    if not messages:
        raise PromptError(f"the list of messages is empty; give one at least, such as {EXAMPLE}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {number} is {reprlib.repr(message)}; give a mapping such as {EXAMPLE}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise PromptError(f"message {number} has role={reprlib.repr(role)}; give a name, such as user or assistant")
        if content is None and not message.get("tool_calls"):
            raise PromptError(f"message {number} has no content; give text, or tool_calls instead")
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            for part in content:
                _check_part(number, part)
        elif not isinstance(content, str | None):
            raise PromptError(
                f"message {number} has content={reprlib.repr(content)}; give text, or a list of parts of text"
            )


def check_mappings(name: str, values: Any) -> None:
    """Raises `PromptError` unless `values`, the tools or documents of a chat, are a sequence of mappings, or None."""
    if values is not None and not (
        isinstance(values, Sequence) and all(isinstance(value, Mapping) for value in values)
    ):
        raise PromptError(f"{name}={reprlib.repr(values)} is not a list of mappings; give one, or None")


def _check_part(number: int, part: Any) -> None:
    if not isinstance(part, Mapping) or "type" not in part:
        raise PromptError(f"message {number} has a part {reprlib.repr(part)}; give mappings such as {PART}")
    if part["type"] != "text":
        raise PromptError(
            f"message {number} has a part of type {reprlib.repr(part['type'])}; only text is supported, so give parts "
            f"such as {PART}"
        )
    if not isinstance(part.get("text"), str):
        raise PromptError(f"message {number} has a part with text={reprlib.repr(part.get('text'))}; give a string")


def _with_joined_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that hold None, and with the reasoning under both names that templates read."""
    held = {key: value for key, value in message.items() if value is not None}
    found = next((held[name] for name in ("reasoning_content", "thinking", "reasoning") if name in held), None)
    return held if found is None else {"thinking": found, **held, "reasoning_content": found}


def _template_files(directory: Path) -> dict[str, Template]:
    files = {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").exists():
        files = {"default": directory / "chat_template.jinja"} | files
    return {name: Template(_read_text(file), file) for name, file in files.items()}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not text in UTF-8: {error}") from error


def _configured_templates(entry: Any, file: Path) -> dict[str, Template]:
    """The `chat_template` of tokenizer_config.json: one, or a list of named ones."""
    found: list[tuple[Any, Any]] = []
    match entry:
        case None:
            return {}
        case str():
            found = [("default", entry)]
        case dict():
            found = list(entry.items())
        case list() if all(isinstance(named, dict) for named in entry):
            found = [(named.get("name"), named.get("template")) for named in entry]
    if not found or not all(isinstance(text, str) for pair in found for text in pair):
        raise CheckpointError(
            f"{file} has chat_template={reprlib.repr(entry)}; it must be text, or a list of objects with name and "
            "template"
        )
    return {name: Template(source, file) for name, source in found}


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. special_tokens_map.json, the older place, counts unless tokenizer_config.json lists the added tokens."""
    file, entries = directory / CONFIG_FILE, config
    older = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and older.exists():
        counted = {key: value for key, value in read_json(older).items() if key in SPECIAL_TOKENS or key not in config}
        file, entries = older, config | counted
    named = {name: entry for name, entry in entries.items() if name.endswith("_token")}
    extra = entries.get("extra_special_tokens")
    found = {}
    for name, entry in (named | (extra if isinstance(extra, dict) else {})).items():
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str):
            found[name] = token
        elif name in SPECIAL_TOKENS and entry is not None:
            raise CheckpointError(f"{file} has {name}={reprlib.repr(entry)}; a special token must be text")
    return found
