"""`xquant chat MODEL`: a conversation at the terminal."""

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Iterator

from rich.console import Console

from xquant_jax.cli import terminal
from xquant_jax.cli.options import MODEL, add_options, load_model, options_of, settled, told
from xquant_jax.errors import XQuantError
from xquant_jax.generation.chat import Conversation

CONTEXT = 4096
"""Tokens of a conversation, where the model was made for as many."""

HELP = "/clear begins anew, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description=f"Every line is a message; {HELP}. The cache is kept from turn to turn. Without a terminal the "
        "lines of stdin are answered one by one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--system", help="the system message")
    add_options(
        parser,
        sampling="model",
        max_new_tokens=1024,
        texts=False,
        context=f"the conversation ({CONTEXT}, or the model's)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    request, options = options_of(arguments)
    model = load_model(arguments)
    request = settled(request, arguments, model)
    bounds = [bound for bound in (CONTEXT, model.positions, model.config.rope.longest) if bound is not None]
    context = arguments.context or min(bounds)
    conversation = Conversation(model, request, options, context=context, system=arguments.system)
    console, notes = terminal.console(), terminal.console(stderr=True)
    terminal.write(notes, f"sampling: {told(request)}; context: {context} tokens. {HELP}.", style="dim")
    return _talk(conversation, console, notes)


def _talk(conversation: Conversation, console: Console, notes: Console) -> int:
    """Answers until the user has enough; 1 if an answer failed where nobody sits at a terminal."""
    failed = False
    with _interruptions(notes) as interruptions:
        for line in _lines(console, interruptions):
            if line == "/exit":
                break
            if line == "/clear":
                conversation.clear()
                terminal.write(notes, "a new conversation", style="dim")
            elif line.startswith("/"):
                terminal.write(notes, f"{line} is no command: {HELP}", style="red")
            elif line.strip():
                failed |= not _answer(conversation, line, console, notes, interruptions)
    return int(failed and not sys.stdin.isatty())


class _Interruptions:
    """How often Ctrl-C was pressed since the last line was typed, and whether one is being typed."""

    def __init__(self) -> None:
        self.count = 0
        self.typing = False


@contextlib.contextmanager
def _interruptions(notes: Console) -> Iterator[_Interruptions]:
    """At a terminal Ctrl-C ends the line that is being typed or the answer that is being given, where the cache is
    whole; pressed three times in one answer, it ends all."""
    state = _Interruptions()
    if not sys.stdin.isatty():
        yield state
        return

    def note(number: int, frame: object) -> None:
        state.count += 1
        if state.typing or state.count > 2:
            raise KeyboardInterrupt
        terminal.write(notes, " (the answer ends with its next token)", style="dim")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(console: Console, interruptions: _Interruptions) -> Iterator[str]:
    """What the user types, or what stdin holds."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are an error of their message
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` has arrow keys and a history by it
    while True:
        try:
            interruptions.count, interruptions.typing = 0, True
            line = input("> ")
        except EOFError:
            terminal.write(console, "")
            return
        except KeyboardInterrupt:
            terminal.write(console, f"\n({HELP})", style="dim")
            continue
        finally:
            interruptions.typing = False
        yield line


def _answer(
    conversation: Conversation, line: str, console: Console, notes: Console, interruptions: _Interruptions
) -> bool:
    """Prints the answer as it comes, until it ends or is interrupted. Whether there was no error."""
    error, reason = None, None
    try:
        answer = conversation.say(line)
        for token in answer:
            terminal.write(console, token.text, end="")
            error, reason = token.error, token.finish_reason
            if interruptions.count:
                answer.close()
                reason = "interrupted"
                break
    except XQuantError as caught:
        error = str(caught)
    terminal.write(console, "")
    if error is not None:
        terminal.write(notes, f"error: {error}", style="red")
    elif reason != "stop":
        terminal.write(notes, f"({reason})", style="dim")
    return error is None
