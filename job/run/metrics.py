"""A run's metrics: the rows of ``metrics.jsonl``, and the same for TensorBoard."""

import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from tensorboardX.event_file_writer import EventsWriter

from job.documents import parse_record
from job.run.tensorboard import add_row, create_events
from job.storage import Folder
from job.training.progress import MAX_PERPLEXITY, finite_or_none

METRICS_FILE = "metrics.jsonl"
SEGMENTS = "metrics"  # the folder of the rows that follow those of METRICS_FILE on an object store
TENSORBOARD = "tensorboard"
SEGMENT_BYTES = 1 << 18  # a segment grows until it is as large
TAIL_BYTES, READ_BYTES = 1 << 16, 1 << 20  # of a first read from the end, and of a block of a whole file
_ROW_TYPES = {"split": str, "epoch": int, "step": int, "perplexity": float, "time": (float, NoneType)}
_GROWING_FILE = re.compile(r"steps-(\d+)-\d+\..*")  # a segment or an events file: its first row's step, and a number


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and to the TensorBoard events.

    If the storage cannot append, the rows since the last full segment grow in a local folder. ``sync`` uploads them
    as a segment and an events file, and ``merge`` makes ``metrics.jsonl`` of all segments. A row that is both in
    ``metrics.jsonl`` and in a segment, after a crash, is read once.

    Args:
        folder: the run's folder
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.is_local = folder.local_path is not None
        self.local_dir = folder.local_path or Path(tempfile.mkdtemp(prefix="lanes-"), "new")  # where the files grow
        self.rows_file = Path()
        self.events: EventsWriter | None = None  # from the first row after a start or after a full segment
        self.num_segments = 0
        self.next_step = 0  # TensorBoard hides what earlier events files contain of this and later steps

    def truncate(self, step: int) -> None:
        """Removes the rows after a step, since workers that resume there report them again.

        Called whenever a worker group starts, before any row is appended. Reads and writes no more than what follows
        that step.
        """
        self._close_files()
        for folder in (self.folder / SEGMENTS, self.folder / TENSORBOARD):
            _remove_later_files(folder, step)
        files = _row_files(self.folder)
        for folder, name in {*files[:1], *files[-1:]}:
            _remove_later_rows(folder, name, step)
        self.num_segments, self.next_step = len(files), step + 1

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row to both files."""
        if self.events is None:
            self.events = self._start_files(row["step"])
        with self.rows_file.open("a") as file:
            file.write(json.dumps({**row, "nats": finite_or_none(row["nats"])}) + "\n")
        add_row(self.events, row)
        self.next_step = row["step"] + 1

    def _start_files(self, step: int) -> EventsWriter:
        """Starts an events file, and a segment if the storage cannot append; their first row is of this step."""
        name = f"steps-{step:012}-{self.num_segments:06}"
        self.num_segments += 1
        self.rows_file = self.local_dir / (METRICS_FILE if self.is_local else f"{SEGMENTS}/{name}.jsonl")
        self.rows_file.parent.mkdir(parents=True, exist_ok=True)
        return create_events(self.local_dir / TENSORBOARD, name, self.next_step)

    def sync(self) -> None:
        """Makes all rows durable: on the disk, or in the storage if it cannot append."""
        if self.events is None:
            return
        self.events.flush()
        with self.rows_file.open("rb") as file:
            os.fsync(file.fileno())
        if not self.is_local:
            self.folder.upload(self.local_dir)
            if self.rows_file.stat().st_size >= SEGMENT_BYTES:
                self._close_files()

    def merge(self) -> None:
        """Makes all rows durable at the end of a run, in ``metrics.jsonl`` alone."""
        self.sync()
        if not self.is_local and self.folder.has(SEGMENTS):
            self._close_files()
            self.local_dir.mkdir()
            with (self.local_dir / METRICS_FILE).open("w") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in read_rows(self.folder))
            self.folder.upload(self.local_dir)
            self.folder.remove(SEGMENTS)

    def close(self) -> None:
        """Closes the files and removes local copies."""
        self._close_files()
        if not self.is_local:
            self.local_dir.parent.rmdir()

    def _close_files(self) -> None:
        if self.events:
            with contextlib.suppress(OSError):  # all that matters was flushed with the last checkpoint
                self.events.close()
        self.events = None
        if not self.is_local:
            shutil.rmtree(self.local_dir, ignore_errors=True)


def read_rows(folder: Folder) -> Iterator[dict[str, Any]]:
    """Yields the rows of a run in order, in each split a step once. Ignores lines that are no rows.

    Raises:
        OSError: the run's folder cannot be read
    """
    last_steps: dict[str, int] = {}
    for place, name in _row_files(folder):
        for row in filter(None, map(_parse_row, _read_lines(place, name))):
            if row["step"] > last_steps.get(row["split"], -1):
                last_steps[row["split"]] = row["step"]
                yield row


def read_last_rows(folder: Folder) -> dict[str, dict[str, Any]]:
    """Returns the last row of each split that the ends of the last two files have; raises as ``read_rows``."""
    tails = [place.read_block(name, -TAIL_BYTES, TAIL_BYTES) for place, name in _row_files(folder)[-2:]]
    rows = filter(None, map(_parse_row, b"\n".join(tails).splitlines()))
    return {row["split"]: row for row in rows}


def _row_files(folder: Folder) -> list[tuple[Folder, str]]:
    """The files with rows that exist, in the order of the rows."""
    segments = [(folder / SEGMENTS, name) for name in (folder / SEGMENTS).names()]
    return [(folder, METRICS_FILE), *segments] if folder.has(METRICS_FILE) else segments


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


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Returns a line's row, or None if it is not one, such as a line that a crash has cut off."""
    try:
        return parse_record(line, _ROW_TYPES, lambda _: MAX_PERPLEXITY)  # early versions stored NaN
    except ValueError:
        return None


def _remove_later_files(folder: Folder, step: int) -> None:
    """Removes the segments or events files whose first row is after a step."""
    for name in folder.names():
        match = _GROWING_FILE.fullmatch(name)
        if match and int(match[1]) > step:
            folder.remove(name)


def _remove_later_rows(folder: Folder, name: str, step: int) -> None:
    """Removes the rows after a step, and incomplete lines, from the end of a file. Reads only the end."""
    for num_bytes in (TAIL_BYTES * 4**count for count in itertools.count()):
        tail = folder.read_block(name, -num_bytes, num_bytes)
        kept = _lines_until(tail, step)
        if kept or len(tail) < num_bytes:
            break
    num_removed = len(tail) - sum(map(len, kept))
    end = b"" if not kept or kept[-1].endswith(b"\n") else b"\n"
    if num_removed or end:
        folder.replace_tail(name, num_removed, end)


def _lines_until(data: bytes, step: int) -> list[bytes]:
    """Returns the lines up to the last row that is not after a step."""
    lines = data.splitlines(keepends=True)
    while lines and not ((row := _parse_row(lines[-1])) and row["step"] <= step):
        lines.pop()
    return lines
