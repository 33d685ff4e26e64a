"""How far a long command has come."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from xquant_jax.cli import terminal

QUIET_SECONDS = 10.0
"""Where there is no terminal, a line more is printed about a piece of work whenever so much time has passed."""

Report = Callable[[int, int, str], None]
"""How many of how many steps are done, and what of."""


@contextmanager
def reported() -> Iterator[Report]:
    """How far a command has come, on stderr: a bar on a terminal, plain lines elsewhere.

    A line is printed for the first report of every piece of work, for its last one, and for those between that come
    `QUIET_SECONDS` after the line before.
    """
    console = terminal.console(stderr=True)
    if console.is_terminal:
        with Progress(*_columns(), console=console) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, name: bar.update(
                task, completed=done, total=total, description=terminal.visible(name)
            )
        return
    shown, since = "", 0.0

    def line(done: int, total: int, name: str) -> None:
        nonlocal shown, since
        now = time.monotonic()
        if name != shown or done == total or now - since >= QUIET_SECONDS:
            terminal.write(console, f"{done}/{total} {name}")
            shown, since = name, now

    yield line


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on a terminal, a plain line at every tenth of the prompts elsewhere; on stderr."""
    console = terminal.console(stderr=True)
    if done:
        console.print(f"{done} of {total} lines have their results already")
    if not console.is_terminal:
        finished = done

        def line(record: dict[str, Any]) -> None:
            nonlocal finished
            finished += 1
            if finished * 10 // total > (finished - 1) * 10 // total:
                console.print(f"{finished}/{total}")

        yield line
        return
    with Progress(*_columns(), console=console) as bar:
        task = bar.add_task("compiling", total=total, completed=done)
        new = 0

        def advance(record: dict[str, Any]) -> None:
            nonlocal new
            new += sum(len(own.get("tokens", ())) for own in record.get("samples", [record]))
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = f"{new / elapsed:,.0f} tokens/s" if elapsed else "answering"
            bar.update(task, advance=1, description=rate)

        yield advance


def _columns() -> tuple[ProgressColumn, ...]:
    name = TextColumn("{task.description}", markup=False)
    return name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
