"""How text is put out: exactly as it is, and on a terminal so that nothing in it can take the terminal over.

`write` is for what a user or a model wrote, in errors and names of files too; `console` is for tables, bars and our own
words.
"""

import re

from rich.console import Console
from rich.segment import Segment, Segments

UNSAFE = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and the ends of lines, and those that change the direction in which text is shown."""


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr that takes brackets, colons and numbers for what they are."""
    return Console(stderr=stderr, emoji=False, markup=False, highlight=False)


def write(console: Console, text: str, *, style: str | None = None, end: str = "\n") -> None:
    """Puts out the text and the end, and nothing else, at once.

    On a terminal the text has the style, as far as NO_COLOR and TERM allow, and is as `visible` makes it.
    """
    if not console.file.isatty():
        console.file.write(text + end)
        console.file.flush()
        return
    shown = Segment(visible(text), console.get_style(style) if style else None)
    console.print(Segments([shown, Segment(end)]), soft_wrap=True)  # segments are neither wrapped nor changed


def visible(text: str) -> str:
    r"""The text with the codes of its unsafe characters in their place, `\x1b` and `\u202e`; for tables and bars."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
