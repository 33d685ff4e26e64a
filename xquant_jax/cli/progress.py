"""How far a long command has come."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, name: bar.update(
                task, completed=done, total=total, description=name.replace("[", r"\[")
            )
        return
    shown, since = "", 0.0

    def line(done: int, total: int, name: str) -> None:
        nonlocal shown, since
        now = time.monotonic()
        if name != shown or done == total or now - since >= QUIET_SECONDS:
            console.print(f"{done}/{total} {name}", highlight=False, markup=False, soft_wrap=True)
            shown, since = name, now

    yield line


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on a terminal, a plain line at every tenth of the prompts elsewhere; on stderr."""
    console = Console(stderr=True)
    if done:
        console.print(f"{done} of {total} lines have their results already", highlight=False)
    if not console.is_terminal:
        finished = done

        def line(record: dict[str, Any]) -> None:
            nonlocal finished
            finished += 1
            if finished * 10 // total > (finished - 1) * 10 // total:
                console.print(f"{finished}/{total}", highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=total, completed=done)
        new = 0

        def advance(record: dict[str, Any]) -> None:
            nonlocal new
            new += len(record.get("tokens", ()))
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = f"{new / elapsed:,.0f} tokens/s" if elapsed else "answering"
            bar.update(task, advance=1, description=rate)

        yield advance
