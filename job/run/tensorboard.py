"""Writes metrics as TensorBoard events."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

CURVES = ("perplexity", "nats", "tokens_per_second", "learning_rate")


def create_events(folder: Path, rows: Iterable[dict[str, Any]]) -> EventsWriter:
    """Replaces a folder by one with an events file of these rows.

    tensorboardX's own ``SummaryWriter`` would write in a thread, where a full disk goes unnoticed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    events = EventsWriter(str(folder / "events"))
    for row in rows:
        add_row(events, row)
    return events


def add_row(events: EventsWriter, row: dict[str, Any]) -> None:
    """Adds a row of ``metrics.jsonl``; its split becomes the last part of each curve's name."""
    wall_time = row.get("time") or time.time()  # rows of earlier versions have no time
    for name in CURVES:
        summary = scalar(f"{name}/{row['split']}", row[name])
        events.write_event(Event(wall_time=wall_time, step=row["step"], summary=summary))
