"""Rows of metrics to a TensorBoard event file, written as they come."""

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
    """A folder's one event file; made anew from the rows there are, so that a step stands in it once.

    tensorboardX's ``SummaryWriter`` writes in a thread of its own, where a full disk goes untold.
    """

    def __init__(self, folder: Path, rows: Iterable[dict[str, Any]]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.writer = EventsWriter(str(folder / "events"))
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row of ``metrics.jsonl``; its split is the last part of each curve's name."""
        for name in CURVES:
            summary = scalar(f"{name}/{row['split']}", row[name])
            self.writer.write_event(Event(wall_time=time.time(), step=row["step"], summary=summary))

    def flush(self) -> None:
        """Has what was written in the file."""
        self.writer.flush()

    def close(self) -> None:
        """Lets go of the file."""
        self.writer.close()
