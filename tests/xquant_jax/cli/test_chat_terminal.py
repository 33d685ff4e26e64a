"""`xquant chat` at a terminal: Ctrl-C ends an answer and not the program."""

import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

from xquant_jax.model.loading import DEMO

AT_TERMINAL = """import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])"""
"""Takes its input for the terminal that controls it, so that Ctrl-C there is a signal, and becomes a command. A fork of
this process, which has the threads of JAX, would do it too, and might not end."""


class Terminal:
    """A program that believes to be at a terminal."""

    def __init__(self, *command: str) -> None:
        self.file, end = os.openpty()
        command = (sys.executable, "-c", AT_TERMINAL, *command)
        self.process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)
        os.close(end)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 90) -> str:
        """What was shown up to the text, which is taken away."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in {self.shown!r}"
            if select.select([self.file], [], [], 1)[0]:
                self.shown += os.read(self.file, 4096).decode(errors="replace")
        before, self.shown = self.shown.split(text, 1)
        return before

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def status(self) -> int:
        status = self.process.wait(90)
        os.close(self.file)
        return status


def test_an_answer_is_interrupted_and_the_next_one_given(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DEMO, tmp_path / "model"))
    (directory / "chat_template.jinja").write_text("{% for m in messages %}# {{ m.content }}\n{% endfor %}")
    options = ("--cache", "bf16", "--ignore-eos", "--max-new-tokens", "2000", "--context", "2040")
    terminal = Terminal(sys.executable, "-m", "xquant_jax", "chat", str(directory), *options)
    assert "sampling: greedy; context: 2040 tokens" in terminal.wait_for("> ")
    terminal.type("a function\n")
    terminal.wait_for("a function\r\n")  # the echo
    terminal.wait_for("\n")  # of the answer
    terminal.type("\x03")
    terminal.wait_for("(interrupted)")
    terminal.wait_for("> ")
    time.sleep(1)  # readline itself misses a key that comes while it begins to wait
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.type("a class\n")
    terminal.wait_for("class\r\n")  # the echo
    terminal.wait_for("\n")  # of the answer
    terminal.type("\x03")
    terminal.wait_for("(interrupted)")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.status() == 0
