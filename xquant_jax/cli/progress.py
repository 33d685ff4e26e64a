"""How far a long command has come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
