"""The prompts of an offline batch, a JSON object a line, as people have them, and the lines of results.

{"prompt": text}, {"tokens": [ids]} or {"messages": [{"role", "content"}, ...]}; if wanted "id", and what differs from
the run: the fields of `Request` and of `Sampling`, or the names that OpenAI's API and vLLM have for them (`ALIASES`).
Lines of OpenAI's batch API ({"custom_id", "url", "body"}) are such objects, in `body`. A result is a `Completion`:

{"line", "id", "text", "tokens", "logprobs", "finish_reason", "seed"}, with "top_logprobs" where "logprobs" asks for
them, and "speculation" in a run that drafts; {"line", "id", "samples": [...]} where "n" asks for several;
{"line", "id", "error"} for what could not be answered.

`line` counts from 1. Columns that mean nothing here are kept for the results or left.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from xquant_jax.errors import ConfigError
from xquant_jax.generation.answer import Answer, Completion
from xquant_jax.generation.prompts import Chat
from xquant_jax.generation.request import Request
from xquant_jax.generation.sampling import FILTERS, Sampling

SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
WHOLE = ("max_new_tokens", "min_tokens", "seed", "top_k", "logprobs", "n")
NUMBERS = tuple(name for name in SAMPLING if name != "top_k")
FLAGS = ("add_special_tokens", "ignore_eos", "speculate")
PROMPTS = ("prompt", "tokens", "messages")
CHAT = ("tools", "chat_template_kwargs")
IDS = ("id", "custom_id")

ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_new_tokens": "min_tokens",
    "stop_token_ids": "stop_ids",
    "top_logprobs": "logprobs",
}
"""What OpenAI's API, vLLM and transformers call these fields."""

FIELDS = (*IDS, *PROMPTS, *CHAT, *WHOLE, *NUMBERS, *FLAGS, "stop", "stop_ids")

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("auto",),
    "suffix": ("",),
    "echo": (False,),
    "num_beams": (1,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "length_penalty": (1, 0),
    "no_repeat_ngram_size": (0,),
    "bad_words": ([],),
    "prompt_logprobs": (False, 0),
    "use_beam_search": (False,),
    "do_sample": (),
    "typical_p": (1,),
    "allowed_token_ids": (),
    "max_length": (),
    "min_length": (0,),
    "sampling_params": ({},),
    "extra_body": ({},),
}
"""Fields that would change the answer if they were honoured, with the values at which they do not."""

SILENT = ("model", "stream", "stream_options", "user", "store", "metadata", "service_tier", "method", "url")
"""Fields of OpenAI's API that make no difference to an answer from a file."""

URLS = ("/v1/chat/completions", "/v1/completions")


@dataclasses.dataclass(frozen=True)
class Line:
    """Line `number` of the prompts: a request, or the error that it is.

    identity: the user's own `id` or `custom_id`, if there is one, by its name
    columns: those that mean nothing here
    """

    number: int
    identity: dict[str, Any]
    request: Request | None
    error: str | None = None
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self, answer: Answer | None = None, *, keep: bool = False) -> dict[str, Any]:
        """Its line of results, with its columns if they are to be kept."""
        known = {"line": self.number, **self.identity, **(self.columns if keep else {})}
        if answer is None or not answer.completions:
            return known | {"error": self.error if answer is None else answer.error}
        samples = [_written(completion) for completion in answer.completions]
        if len(samples) == 1:
            return known | samples[0]
        errors = [sample["error"] for sample in samples if "error" in sample]
        return known | {"samples": samples} | ({"error": errors[0]} if errors else {})


def _written(completion: Completion) -> dict[str, Any]:
    return {name: value for name, value in completion.to_json().items() if name != "prompt"}


RESULT = ("line", *IDS, "error", "samples", *(f.name for f in dataclasses.fields(Completion) if f.name != "prompt"))
"""What a result calls its own."""


def parse_prompts(text: bytes, default: Request, *, keep: bool = False) -> list[Line]:
    """All lines that are not blank, with what `default` says where they say nothing; a malformed one has an `error`.

    A byte order mark before the first line is dropped. `keep`: whether columns that mean nothing here have to be such
    as results can repeat.
    """
    lines, first_with_id = [], {}
    for number, raw in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        identity, columns = {}, {}
        try:
            entry = _entry(raw)
            identity = {name: _writable(entry[name]) for name in IDS if entry.get(name) is not None}
            for own in identity.values():
                if (earlier := first_with_id.setdefault(_plain(own), number)) != number:
                    raise ValueError(f"id {own!r} is that of line {earlier} too; give every line its own")
            entry, columns = _flat(entry)
            if keep:
                _writable(columns)
            lines.append(Line(number, identity, _request(entry, default), columns=columns))
        except ValueError as error:
            lines.append(Line(number, identity, None, str(error), columns))
    return lines


def unknown_columns(lines: list[Line], *, keep: bool) -> list[str]:
    """The columns of all lines that mean nothing here.

    Raises `ConfigError` if they are to be kept and results have fields of their own with such a name.
    """
    names = sorted({name for line in lines for name in line.columns})
    if keep and (taken := [name for name in names if name in RESULT]):
        raise ConfigError(f"columns {', '.join(taken)} cannot be kept: results have fields of these names; rename them")
    return names


def _entry(raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON {type(entry).__name__}; it must be an object with prompt, tokens or messages")
    return entry


def _writable(value: Any) -> Any:
    """What results can repeat: no NaN, no infinity, nothing but Unicode."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("its id or another of its columns is not valid Unicode") from None
    except ValueError:
        raise ValueError("its id or another of its columns holds a number that JSON does not have") from None
    return value


def _flat(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a line by our names, and the columns that mean nothing here."""
    body = entry.get("body")
    if isinstance(body, dict) or (body is not None and not entry.keys() & set(PROMPTS)):
        if not isinstance(body, dict):
            raise ValueError(f"body is a JSON {type(body).__name__}; it must be an object")
        if (url := entry.get("url") or URLS[0]) not in URLS:
            raise ValueError(f"url {url!r} is not supported; supported: {', '.join(URLS)}")
        entry = {**{name: value for name, value in entry.items() if name != "body"}, **body}
    fields: dict[str, Any] = {}
    columns = {}
    if isinstance(entry.get("logprobs"), bool):  # in OpenAI's chats the number is top_logprobs
        entry = {**entry, "logprobs": None}
    for name, value in entry.items():
        ours = ALIASES.get(name, name)
        if ours in FIELDS:
            if value is None:
                continue
            if ours in fields and fields[ours] != value:
                raise ValueError(f"{ours} is given twice, as {fields[ours]!r} and as {value!r}; give it once")
            fields[ours] = value
        elif name in UNSUPPORTED:
            if value is not None and value not in UNSUPPORTED[name]:
                raise ValueError(f"{name}={value!r} is not supported; leave it out")
        elif name not in SILENT:
            columns[name] = value
    return fields, columns


def _request(entry: Any, default: Request) -> Request:
    given = [name for name in PROMPTS if name in entry]
    if len(given) != 1:
        raise ValueError("it must have one of prompt, tokens and messages")
    prompt: Any = entry[given[0]]
    if given == ["tokens"] and not _is_list(prompt, _is_integer):
        raise ValueError("tokens must be a list of whole numbers")
    if given == ["prompt"] and not isinstance(prompt, str) and not _is_list(prompt, _is_integer):
        raise ValueError(f"prompt is a JSON {type(prompt).__name__}; it must be a string")
    if given == ["messages"]:
        options: Any = entry.get("chat_template_kwargs", {})
        messages: Any = prompt
        if not isinstance(options, dict):
            raise ValueError(f"chat_template_kwargs is a JSON {type(options).__name__}; it must be an object")
        prompt = Chat(messages, entry.get("tools"), options)
    elif unused := [name for name in CHAT if name in entry]:
        raise ValueError(f"{unused[0]} is for messages, and there are none")
    said = {name: entry[name] for name in (*WHOLE, *NUMBERS, *FLAGS, "stop", "stop_ids") if name in entry}
    for name, value in said.items():
        if name in WHOLE and not _is_integer(value):
            raise ValueError(f"{name}={value!r} is not a whole number")
        if name in NUMBERS and not (_is_integer(value) or isinstance(value, float)):
            raise ValueError(f"{name}={value!r} is not a number")
        if name in FLAGS and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not true or false")
    if isinstance(said.get("stop"), str):
        said["stop"] = [said["stop"]]
    if not _is_list(said.get("stop", []), lambda string: isinstance(string, str)):
        raise ValueError("stop must be a string or a list of strings")
    if not _is_list(said.get("stop_ids", []), _is_integer):
        raise ValueError("stop_ids must be a list of whole numbers")
    if said.pop("ignore_eos", False) and said.setdefault("stop_ids", []):
        raise ValueError("ignore_eos and stop_ids are both given; choose one")
    sampling = {name: said.pop(name) for name in SAMPLING if name in said}
    if sampling.get("temperature") == 0:  # greedy, whatever else clients send along
        sampling = {name: value for name, value in sampling.items() if name not in FILTERS}
    if not isinstance(default.sampling, Sampling):
        raise TypeError("the sampling of a run is settled before its lines are read")
    own = Sampling(**{"temperature": None, **sampling}).over(default.sampling)
    return dataclasses.replace(default, prompt=prompt, sampling=own, **said)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(identity: Any) -> str:
    return json.dumps(identity, sort_keys=True)
