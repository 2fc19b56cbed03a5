"""A run's metrics and samples: the rows of ``metrics.jsonl`` and ``samples.jsonl``, and the same for TensorBoard."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter

from job.run.row_file import RowFile, first_steps, remove_later_files
from job.run.samples import SAMPLES
from job.run.tensorboard import add_hyperparameters, add_row, add_sample, create_events
from job.storage import Folder
from job.training.progress import finite_or_none

METRICS_FILE = "metrics.jsonl"
SEGMENTS = "metrics"
METRICS = RowFile(METRICS_FILE, SEGMENTS, "split", numbers=("perplexity",))
ROW_FILES = (METRICS, SAMPLES)
TENSORBOARD = "tensorboard"
SEGMENT_BYTES = 1 << 18  # the segments of all files grow until they are as large together


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and ``samples.jsonl``, and to the TensorBoard events.

    If the storage cannot append, the rows since the last full segment grow in a local folder. ``sync`` uploads them
    as segments and an events file, and ``merge`` makes each file of all its segments. A row that is both in the file
    and in a segment, after a crash, is read once.

    Args:
        folder: the run's folder
        hyperparameters: by full name, for TensorBoard; empty: none are shown
    """

    def __init__(self, folder: Folder, hyperparameters: Mapping[str, Any] | None = None) -> None:
        self.folder, self.hyperparameters = folder, hyperparameters or {}
        self.is_local = folder.local_path is not None
        self.local_dir = folder.local_path or Path(tempfile.mkdtemp(prefix="lanes-"), "new")  # where the files grow
        self.paths: dict[RowFile, Path] = {}
        self.events: EventsWriter | None = None  # from the first row after a start or after a full segment
        self.num_segments = 0
        self.next_step = 0  # TensorBoard hides what earlier events files contain of this and later steps

    def truncate(self, step: int) -> None:
        """Removes the rows after a step, since workers that resume there report them again.

        Called whenever a worker group starts, before any row is appended. Reads and writes no more than what follows
        that step.
        """
        self._close_files()
        remove_later_files(self.folder / TENSORBOARD, step)
        self.num_segments = max(row_file.truncate(self.folder, step) for row_file in ROW_FILES)
        self.next_step = step + 1

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row of metrics."""
        add_row(self._append(METRICS, {**row, "nats": finite_or_none(row["nats"])}), row)

    def append_samples(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends samples."""
        for row in rows:
            add_sample(self._append(SAMPLES, row), row)

    def _append(self, row_file: RowFile, row: dict[str, Any]) -> EventsWriter:
        if self.events is None:
            self.events = self._start_files(row["step"])
        path = self.paths[row_file]
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.next_step = row["step"] + 1
        return self.events

    def _start_files(self, step: int) -> EventsWriter:
        """Starts an events file, and segments if the storage cannot append; their first row is of this step."""
        name = f"steps-{step:012}-{self.num_segments:06}"
        self.num_segments += 1
        for row_file in ROW_FILES:
            file = row_file.name if self.is_local else f"{row_file.segments}/{name}.jsonl"
            self.paths[row_file] = self.local_dir / file
        events = create_events(self.local_dir / TENSORBOARD, name, self.next_step)
        add_hyperparameters(events, self.hyperparameters)
        return events

    def sync(self) -> None:
        """Makes all rows durable: on the disk, or in the storage if it cannot append."""
        if self.events is None:
            return
        self.events.flush()
        paths = [path for path in self.paths.values() if path.exists()]
        for path in paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if not self.is_local:
            self.folder.upload(self.local_dir)
            if sum(path.stat().st_size for path in paths) >= SEGMENT_BYTES:
                self._close_files()

    def merge(self) -> None:
        """Makes all rows durable at the end of a run, in one file of each kind."""
        self.sync()
        segmented = [] if self.is_local else [kind for kind in ROW_FILES if self.folder.has(kind.segments)]
        if not segmented:
            return
        self._close_files()
        self.local_dir.mkdir()
        for row_file in segmented:
            with (self.local_dir / row_file.name).open("w") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in row_file.read(self.folder))
        self.folder.upload(self.local_dir)
        for row_file in segmented:
            self.folder.remove(row_file.segments)

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
    return METRICS.read(folder)


def read_last_rows(folder: Folder) -> dict[str, dict[str, Any]]:
    """Returns the last row of each split that the ends of the last two files have; raises as ``read_rows``."""
    return METRICS.read_last(folder)


def restart_steps(folder: Folder) -> list[int]:
    """Returns the steps of the first rows of all worker groups but the first one.

    Each group starts an events file. Empty for an object store, where a full segment starts one, too.
    """
    return [] if folder.local_path is None else [*first_steps(folder / TENSORBOARD).values()][1:]
