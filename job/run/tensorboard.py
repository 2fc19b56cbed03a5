"""Writes metrics as TensorBoard events."""

import contextlib
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

CURVES = ("perplexity", "nats", "tokens_per_second", "learning_rate")


class TensorBoardWriter:
    """Writes one events file into a folder.

    tensorboardX's own ``SummaryWriter`` writes in a thread, where a full disk would go unnoticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: EventsWriter | None = None

    def rewrite(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replaces the events file by one with these rows, so that no step appears twice."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.writer = EventsWriter(str(self.folder / "events"))
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row of ``metrics.jsonl``; its split becomes the last part of each curve's name."""
        assert self.writer
        for name in CURVES:
            summary = scalar(f"{name}/{row['split']}", row[name])
            self.writer.write_event(Event(wall_time=time.time(), step=row["step"], summary=summary))

    def flush(self) -> None:
        """Writes buffered events to the file."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Closes the file. A failure is ignored: what matters has been flushed with the last checkpoint."""
        if self.writer:
            with contextlib.suppress(OSError):
                self.writer.close()
