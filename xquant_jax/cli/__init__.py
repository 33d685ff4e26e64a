"""The command line, `xquant COMMAND ...`. A command is one file here: its options (`add_parser`) and what it does."""

import argparse
import io
import sys
from collections.abc import Sequence

import jax

from xquant_jax.cli import batch, calibrate, convert, evaluate, generate, lm_eval, plan, terminal
from xquant_jax.errors import XQuantError

COMMANDS = (convert, generate, batch, evaluate, plan, calibrate, lm_eval)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for an error that the user can mend (printed in one line), 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="xquant",
        description="Attention caches that store the quantized layer input (XQuant, arXiv 2508.10395).",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its code
    try:
        arguments.run(arguments)
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
    return 0


def _complain(message: str) -> None:
    console = terminal.console(stderr=True)
    terminal.write(console, "error: ", style="bold red", end="")
    terminal.write(console, message)
