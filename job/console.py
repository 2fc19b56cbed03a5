"""What a person sees of a run: one line that moves on a terminal, plain lines elsewhere."""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

PLAIN_INTERVAL_S = 10.0  # seconds between two plain lines of progress


class Console:
    """Writes to a stream that may go away at any time without harm to the run."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.moving = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.shown_at = 0.0
        self.drawn = 0  # lines that will move

    def line(self, text: str = "") -> None:
        """A line that stays."""
        self._write(f"{self._erased()}{text}\n")
        self.drawn = 0

    def progress(self, text: str, *, milestone: bool = False) -> None:
        """The line that moves; without a terminal a plain one now and then."""
        if self.moving:
            self.block([text])
        elif time.monotonic() - self.shown_at >= PLAIN_INTERVAL_S or (milestone and not self.shown_at):
            self.shown_at = time.monotonic()
            self.line(text)

    def block(self, lines: list[str]) -> None:
        """Several lines that move, on a terminal; where it is too low, the first of them and the last."""
        width, height = shutil.get_terminal_size()
        if len(lines) >= height:
            lines = [*lines[: height - 2], lines[-1]]
        shown = "\n".join(text[: width - 1] for text in lines)
        self._write(f"{self._erased()}{shown}")
        self.drawn = len(lines)

    def _erased(self) -> str:
        """Takes back what was drawn to move."""
        up = f"\x1b[{self.drawn - 1}A" if self.drawn > 1 else ""
        return f"\r{up}\x1b[J" if self.drawn else ""

    def warn(self, text: str) -> None:
        """A warning, on a line of its own."""
        self.line(f"warning: {text}")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal went away; the run goes on
            self.moving = False


def format_duration(seconds: float) -> str:
    """Seconds as a person reads them: 42 s, 3:05, 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds_left = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def python_command() -> str:
    """This Python, as one would type it here."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(sys.executable).relative_to(Path.cwd()))
    return "python"
