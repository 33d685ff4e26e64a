"""How a long conversion shows where it is: a bar on a terminal, one plain line per step elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def steps(total: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with the name of each of `total` steps once it is done. Writes to stderr."""
    console = Console(stderr=True, quiet=not shown, emoji=False, markup=False, highlight=False)
    if not console.is_terminal:
        done = iter(range(1, total + 1))
        yield lambda name: console.print(f"{next(done)}/{total} {name}", soft_wrap=True)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("converting", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)
