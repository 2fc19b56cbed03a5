"""Files of JSON rows that grow during a run, on a disk or as segments on an object store: reading and truncating."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

from job.documents import parse_record
from job.storage import Folder
from job.training.progress import MAX_PERPLEXITY

TAIL_BYTES, READ_BYTES = 1 << 16, 1 << 20  # of a first read from the end, and of a block of a whole file
_GROWING_FILE = re.compile(r"steps-(\d+)-\d+\..*")  # a segment or an events file: its first row's step, and a number


@dataclass(frozen=True)
class RowFile:
    """A kind of rows, each with a ``step``.

    Args:
        name: of the file
        segments: the folder of the rows that follow those of the file on an object store
        key: the field that names a row's series; in each series a step appears once
        texts: the fields of a row that are texts
        numbers: the fields that are numbers
    """

    name: str
    segments: str
    key: str
    texts: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    def places(self, folder: Folder) -> list[tuple[Folder, str]]:
        """Returns the files with rows that exist in a run's folder, in the order of the rows."""
        segments = [(folder / self.segments, name) for name in (folder / self.segments).names()]
        return [(folder, self.name), *segments] if folder.has(self.name) else segments

    def read(self, folder: Folder) -> Iterator[dict[str, Any]]:
        """Yields the rows of a run in order, in each series a step once. Ignores lines that are no rows.

        Raises:
            OSError: the run's folder cannot be read
        """
        last_steps: dict[str, int] = {}
        for place, name in self.places(folder):
            for row in filter(None, map(self._parse, _read_lines(place, name))):
                if row["step"] > last_steps.get(row[self.key], -1):
                    last_steps[row[self.key]] = row["step"]
                    yield row

    def read_last(self, folder: Folder) -> dict[str, dict[str, Any]]:
        """Returns the last row of each series that the ends of the last two files have; raises as ``read``."""
        tails = [place.read_block(name, -TAIL_BYTES, TAIL_BYTES) for place, name in self.places(folder)[-2:]]
        rows = filter(None, map(self._parse, b"\n".join(tails).splitlines()))
        return {row[self.key]: row for row in rows}

    def truncate(self, folder: Folder, step: int) -> int:
        """Removes the rows after a step, reading no more than what follows it. Returns the number of files left."""
        remove_later_files(folder / self.segments, step)
        files = self.places(folder)
        for place, name in {*files[:1], *files[-1:]}:
            self._remove_later_rows(place, name, step)
        return len(files)

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """Returns a line's row, or None if it is not one, such as a line that a crash has cut off."""
        types = {"epoch": int, "step": int, "time": (float, NoneType)}
        types |= {self.key: str, **dict.fromkeys(self.texts, str), **dict.fromkeys(self.numbers, float)}
        try:
            return parse_record(line, types, lambda _: MAX_PERPLEXITY)  # early versions stored NaN
        except ValueError:
            return None

    def _remove_later_rows(self, folder: Folder, name: str, step: int) -> None:
        """Removes the rows after a step, and incomplete lines, from the end of a file. Reads only the end."""
        for num_bytes in (TAIL_BYTES * 4**count for count in itertools.count()):
            tail = folder.read_block(name, -num_bytes, num_bytes)
            kept = self._lines_until(tail, step)
            if kept or len(tail) < num_bytes:
                break
        num_removed = len(tail) - sum(map(len, kept))
        end = b"" if not kept or kept[-1].endswith(b"\n") else b"\n"
        if num_removed or end:
            folder.replace_tail(name, num_removed, end)

    def _lines_until(self, data: bytes, step: int) -> list[bytes]:
        """Returns the lines up to the last row that is not after a step."""
        lines = data.splitlines(keepends=True)
        while lines and not ((row := self._parse(lines[-1])) and row["step"] <= step):
            lines.pop()
        return lines


def remove_later_files(folder: Folder, step: int) -> None:
    """Removes the segments or events files whose first row is after a step."""
    for name, first_step in first_steps(folder).items():
        if first_step > step:
            folder.remove(name)


def first_steps(folder: Folder) -> dict[str, int]:
    """Returns the step of the first row of each segment or events file, in the order of their names."""
    matches = {name: _GROWING_FILE.fullmatch(name) for name in folder.names()}
    return {name: int(match[1]) for name, match in matches.items() if match}


def _read_lines(folder: Folder, name: str) -> Iterator[bytes]:
    """Yields the lines of a file, which is read in blocks."""
    rest = b""
    for start in itertools.count(step=READ_BYTES):
        block = folder.read_block(name, start, READ_BYTES)
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        if len(block) < READ_BYTES:
            break
    yield rest
