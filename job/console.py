"""Terminal output of a run: a line redrawn in place on a TTY, plain lines elsewhere."""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO
from unicodedata import east_asian_width

NO_BREAK = "\xa0"  # a space at which textwrap does not break a line
_CONTROLS = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
_logger = logging.getLogger(__name__)
LARGEST_COUNT = 10**300  # that a float can hold, rounded
BAR_WIDTH = 20
PLAIN_INTERVAL_S = 10.0  # seconds between two lines of progress if the stream is no terminal


class Console:
    """Writes to a stream; a stream that is closed during a run does not disturb it.

    What stays on a terminal is also logged.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_tty = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.last_plain_at = 0.0
        self.num_drawn = 0  # lines that the next write replaces

    def print(self, text: str = "", *, wrap: bool = True) -> None:
        """Prints a line that stays.

        Args:
            text: the line; on a terminal it is wrapped to the terminal's width
            wrap: False for what may not change, such as a sample or a command to copy
        """
        if text:
            _logger.info(text)
        self._print_line(text, wrap)

    def _print_line(self, text: str, wrap: bool = True) -> None:
        text = escape_controls(text)
        text = "\n".join(_wrap(text)) if wrap and self.is_tty else text
        self._write(f"{self._clear_sequence()}{text}\n")
        self.num_drawn = 0

    def progress(self, text: str, share: float = 0.0, sample: str = "") -> None:
        """Shows progress: redrawn in place on a terminal, elsewhere a line every ``PLAIN_INTERVAL_S``.

        Args:
            text: one line; a terminal that is too narrow breaks it between fields, which two spaces separate
            share: what is done, 0 to 1, which a terminal shows as a bar
            sample: a text that a terminal shows on a line of its own; empty: none
        """
        if self.is_tty:
            done = round(BAR_WIDTH * min(max(share, 0.0), 1.0))
            fields = f"[{'#' * done:-<{BAR_WIDTH}}]  {text}".replace(" ", NO_BREAK).replace(2 * NO_BREAK, "  ")
            lines = [line.replace(NO_BREAK, " ") for line in _wrap(fields)]
            self.redraw([sample.replace("\n", "\\n").replace("\t", "\\t")] * bool(sample) + lines)
        elif time.monotonic() - self.last_plain_at >= PLAIN_INTERVAL_S:
            self.last_plain_at = time.monotonic()
            self._print_line(text)

    def redraw(self, lines: list[str]) -> None:
        """Replaces the lines that were drawn last. Omits lines before the last one if the terminal is too low."""
        width, height = shutil.get_terminal_size()
        if len(lines) >= height:
            lines = [*lines[: height - 2], lines[-1]]
        text = "\n".join(_cut(escape_controls(line), width - 1) for line in lines)
        self._write(f"{self._clear_sequence()}{text}")
        self.num_drawn = len(lines)

    def _clear_sequence(self) -> str:
        """Returns the escape sequence that erases the drawn lines."""
        up = f"\x1b[{self.num_drawn - 1}A" if self.num_drawn > 1 else ""
        return f"\r{up}\x1b[J" if self.num_drawn else ""

    def warn(self, text: str) -> None:
        """Prints a warning on a line of its own."""
        _logger.warning(text)
        self._print_line(f"warning: {text}")

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        except (OSError, ValueError):  # the terminal is gone; the run continues
            self.is_tty = False


def _wrap(text: str) -> list[str]:
    """Returns the lines of a text that fit the terminal's width; a longer word, such as a path, is not broken."""
    width = max(1, shutil.get_terminal_size().columns - 1)
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [""]


def _cut(text: str, width: int) -> str:
    """Returns the beginning of a text that takes at most ``width`` columns of a terminal."""
    columns = itertools.accumulate(2 if east_asian_width(character) in "WF" else 1 for character in text)
    return text[: sum(column <= width for column in columns)]


def escape_controls(text: str) -> str:
    r"""Returns the text with control characters, which a terminal interprets, as ``\x1b``; line ends and tabs stay."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def format_json(value: Any) -> str:
    """Returns a value as JSON in ASCII, control characters escaped; numbers that are not finite become null."""
    return json.dumps(finite_values(value), indent=1).replace("\x7f", "\\u007f")


def finite_values(value: Any) -> Any:
    """Returns a value of JSON with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(rows: Sequence[Sequence[str]], num_left: int = 0) -> list[str]:
    """Returns rows as lines with aligned columns: the first ``num_left`` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    alignments = ["<" if index < num_left else ">" for index in range(len(widths))]
    columns = list(zip(alignments, widths, strict=True))
    lines = ("  ".join(f"{cell:{a}{w}}" for cell, (a, w) in zip(row, columns, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def format_count(count: int) -> str:
    """Formats a number of at most ten characters: ``12,345``, ``1.23e+12``."""
    return f"{count:,}" if count < 1e8 else f"{float(min(count, LARGEST_COUNT)):.3g}"


def format_bytes(count: float) -> str:
    """Formats a number of bytes: ``512 KiB``, ``1.5 GiB``."""
    count = min(count, LARGEST_COUNT)
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1e6 else f"{count:.3g} GiB"


def format_duration(seconds: float) -> str:
    """Formats seconds: ``42 s``, ``3:05``, ``1:02:03``, ``1,234 days``."""
    whole = round(seconds)
    if whole >= 100 * 3600:
        return f"{format_count(whole // 86400)} days"
    if whole < 60:
        return f"{whole} s"
    minutes, seconds_left = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def program() -> str:
    """Returns the name by which this process was started: ``python -m job``, or ``lanes``, the installed script."""
    return "lanes" if Path(sys.argv[0]).name == "lanes" else "python -m job"


def program_command() -> str:
    """Returns ``program()`` with the path of its file, relative to the working directory if it is below it."""
    name, *arguments = program().split()
    with contextlib.suppress(ValueError, OSError):
        file = Path(sys.argv[0] if name == "lanes" else sys.executable).absolute()
        name = shlex.quote(str(file.relative_to(Path.cwd())))
    return " ".join([name, *arguments])
