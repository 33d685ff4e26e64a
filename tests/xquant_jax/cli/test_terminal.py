"""What users and models wrote comes out as it is, and cannot take a terminal over."""

import ast
import contextlib
import io
import os
import pty
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xquant_jax import cli
from xquant_jax.cli import main, progress, terminal

MAKEFILE = "all:\n\tgcc -o a a.c\n\nclean:\n\trm a\n"
SLICE = "s = values[:x:2] :key: [red]"
LONG = "word " * 100
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
"""All characters but halves of surrogate pairs, which UTF-8 has no bytes for."""

CONTROLS = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))} - {"\t", "\n", "\r"}
DIRECTIONS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
NEAR = TEXT | st.text(st.sampled_from(["\r", "\n", "\t", "a", *sorted(CONTROLS | DIRECTIONS)]), max_size=30)


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal_of_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def screen() -> Iterator[tuple[int, io.TextIOWrapper]]:
    """A pseudo-terminal that changes nothing: where to read what it got, and a file that writes to it."""
    reading, writing = pty.openpty()
    tty.setraw(writing)
    with os.fdopen(writing, "w", encoding="utf-8", newline="") as file:
        yield reading, file
    os.close(reading)


def written(text: str, file: io.StringIO, style: str | None = None) -> str:
    with contextlib.redirect_stdout(file):
        terminal.write(terminal.console(), text, style=style, end="")
    return file.getvalue()


@given(NEAR, st.sampled_from([None, "dim", "bold red"]))
def test_what_is_no_terminal_gets_the_text_itself(text: str, style: str | None) -> None:
    assert written(text, io.StringIO(newline=""), style) == text


@given(NEAR)
def test_a_terminal_gets_no_character_that_steers_it(text: str) -> None:
    shown = written(text, Screen(newline=""))
    assert not (CONTROLS | DIRECTIONS) & set(shown)
    assert "\r" not in shown.replace("\r\n", "")


@given(TEXT)
def test_a_terminal_gets_all_other_text_unchanged(text: str) -> None:
    plain = "".join(c for c in text if c not in CONTROLS | DIRECTIONS | {"\r"}).replace("\n", "\r\n\t")
    assert written(plain, Screen(newline="")) == plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x1b[2J\x9b2J", r"\x1b[2J\x9b2J"),
        ("done\rfake\r\n", "done\\rfake\r\n"),
        ("user\u202enimda", r"user\u202enimda"),
    ],
)
def test_a_terminal_shows_codes_in_place_of_what_steers_it(text: str, shown: str) -> None:
    assert written(text, Screen(newline="")) == shown


@pytest.mark.parametrize(
    ("changed", "before", "after"),
    [({}, "\x1b[1;31m", "\x1b[0m"), ({"NO_COLOR": "1"}, "\x1b[1m", "\x1b[0m"), ({"TERM": "dumb"}, "", "")],
)
def test_a_real_terminal_gets_the_style_around_the_text(
    changed: dict[str, str], before: str, after: str, screen: tuple[int, io.TextIOWrapper], monkeypatch
) -> None:
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    reading, file = screen
    text = f"{MAKEFILE}{SLICE} {LONG}é"
    with contextlib.redirect_stdout(file):
        terminal.write(terminal.console(), text, style="bold red")
    assert os.read(reading, 10_000).decode() == f"{before}{text}{after}\n"


def test_prompts_are_printed_to_the_byte(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The prompts of a batch of three; the last has a line longer than any terminal and codes that would change it."""
    prompts = [MAKEFILE, SLICE, f"# {LONG}\x1b[31m\x07"]
    command = ["generate", "demo", "--max-new-tokens", "2"]
    for number, prompt in enumerate(prompts):
        path = tmp_path / f"{number}.txt"
        path.write_text(prompt, encoding="utf-8")
        command += ["--prompt-file", str(path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(MAKEFILE)
    assert [prompt for prompt in prompts if prompt not in printed] == []


def test_errors_are_printed_to_the_byte(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / f"a\tb :smile: [red] \x1b[31m {LONG[:100]}"
    path.write_bytes(b"ab\xff")
    assert main(["generate", "demo", "--prompt-file", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path} is not UTF-8 text: invalid start byte at byte 2\n"


def test_an_error_on_a_terminal_is_marked_and_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a\tb :smile: [red] \x1b[2J"
    path.write_bytes(b"\xff")
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    assert main(["generate", "demo", "--prompt-file", str(path)]) == 2
    shown = str(path).replace("\x1b", r"\x1b")
    assert screen.getvalue().startswith(f"\x1b[1;31merror: \x1b[0m{shown} is not")


def test_a_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with progress.reported() as report:
        report(1, 2, "[red]task[/] :smile: \x1b]0;")
    assert r"[red]task[/] :smile: \x1b]0;" in screen.getvalue()


def test_no_command_makes_a_console_of_its_own() -> None:
    makers = {
        path.name
        for path in Path(cli.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Console"
    }
    assert makers == {"terminal.py"}
