"""The sandbox of jinja2's that chat templates run in, set up as Hugging Face transformers 5 does."""

import dataclasses
import json
import reprlib
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from xquant_jax.errors import CheckpointError, PromptError


@dataclasses.dataclass(frozen=True)
class Template:
    """The source of one template and the file that it stands in."""

    source: str
    file: Path

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises `PromptError` for variables that are not plain data or that the template refuses."""
        program, _ = _compiled(self)
        try:
            return program.render(_plain(variables))
        except PromptError:
            raise
        except _RefusalError as refusal:
            raise PromptError(f"the model's chat template refuses the messages: {refusal}") from refusal
        except Exception as error:  # a template can fail in every way that a program can
            raise PromptError(
                f"the chat template in {self.file} cannot render the messages: {type(error).__name__}: {error}"
            ) from error

    @property
    def takes_parts(self) -> bool:
        """Whether it loops over the parts of a message's content, so that content need not be text."""
        return _compiled(self)[1]

    def check(self) -> None:
        """Raises `CheckpointError` if it is no program of jinja2's."""
        _compiled(self)


def _plain(value: Any) -> Any:
    """A copy in the types of JSON, since the sandbox does not know which methods of other types do harm."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # without the methods of a subclass
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    raise PromptError(
        f"a chat template cannot be given {reprlib.repr(value)}, a {type(value).__name__}; give what JSON can hold"
    )


class _RefusalError(jinja2.TemplateError):
    """What a template raises on purpose."""


class _Generation(Extension):
    """`{% generation %}`, by which templates mark an assistant's words for training; here they are just put out."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_put_out"), [], [], body).set_lineno(line)

    def _put_out(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """Stands for the class, from which a template would reach others."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """jinja2's, without private names."""

    def __init__(self, /, *items: Any, **named: Any) -> None:  # `namespace(self=...)` is allowed too
        attributes = dict(*items, **named)
        for name in attributes:
            _check_public(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise _RefusalError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, this leaves `<`, `>`, `&` and quotes as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        dict=_Dict(), namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
    )
    return environment


_ENVIRONMENT = _environment()


@lru_cache
def _compiled(template: Template) -> tuple[jinja2.Template, bool]:
    """The program, and whether it loops over the parts of a message's content. Raises `CheckpointError`."""
    try:
        loops = _ENVIRONMENT.parse(template.source).find_all(nodes.For)
        return _ENVIRONMENT.from_string(template.source), any(_is_content(loop.iter) for loop in loops)
    except Exception as error:  # `break` outside a loop, for example, is Python's SyntaxError
        line = f"line {error.lineno} of " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise CheckpointError(
            f"{template.file}: {line}the chat template cannot be compiled: {getattr(error, 'message', error)}"
        ) from error


def _is_content(node: nodes.Node) -> bool:
    """Whether a loop over `node` is over `message.content`, `message['content']`, or a variable of that name."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    match node:
        case nodes.Getattr(attr="content") | nodes.Name(name="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
    return False
