"""The command line, `xquant COMMAND ...`. A command is one file here: its options (`add_parser`) and what it does."""

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from xquant_jax.cli import (
    batch,
    calibrate,
    chat,
    compilation_cache,
    convert,
    evaluate,
    generate,
    lm_eval,
    plan,
    prefill,
    terminal,
)
from xquant_jax.errors import XQuantError, XQuantWarning

COMMANDS = (convert, generate, prefill, chat, batch, evaluate, plan, calibrate, lm_eval)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0; 1 if some of its prompts could not be answered; 2 for an error that the user can
    mend (printed in one line); 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="xquant",
        description="Attention caches that store the quantized layer input (XQuant, arXiv 2508.10395).",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        compilation_cache.add_option(subparser)
    arguments = parser.parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", XQuantWarning)
            warnings.showwarning = _once()
            compilation_cache.switch(arguments.compilation_cache)
            return arguments.run(arguments) or 0
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (XQuantError, OSError) as error:
        _complain(str(error))
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _complain(f"out of memory: {str(error).splitlines()[0]}")
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _once() -> Callable[..., None]:
    """Shows warnings: our own in one line, each text once."""
    shown, others = set(), warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if not issubclass(category, XQuantWarning):
            others(message, category, *rest)
        elif str(message) not in shown:
            shown.add(str(message))
            console = terminal.console(stderr=True)
            terminal.write(console, "warning: ", style="bold yellow", end="")
            terminal.write(console, str(message))

    return show


def _complain(message: str) -> None:
    console = terminal.console(stderr=True)
    terminal.write(console, "error: ", style="bold red", end="")
    terminal.write(console, message)
