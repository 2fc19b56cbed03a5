"""Writes metrics as TensorBoard events."""

import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

CURVES = ("perplexity", "nats", "tokens_per_second", "learning_rate")


def create_events(folder: Path, name: str, step: int) -> EventsWriter:
    """Creates an events file, which continues those before it in the order of their names.

    tensorboardX's own ``SummaryWriter`` would write in a thread, where a full disk goes unnoticed.

    Args:
        folder: the folder of the events files; created if it does not exist
        name: the beginning of the file's name
        step: TensorBoard hides what the files before contain of this and later steps
    """
    folder.mkdir(parents=True, exist_ok=True)
    events = EventsWriter(str(folder / name))
    start = SessionLog(status=SessionLog.START)
    events.write_event(Event(wall_time=time.time(), step=step, session_log=start))
    return events


def add_row(events: EventsWriter, row: dict[str, Any]) -> None:
    """Adds a row of ``metrics.jsonl``; its split becomes the last part of each curve's name."""
    wall_time = row.get("time") or time.time()  # rows of earlier versions have no time
    for name in CURVES:
        summary = scalar(f"{name}/{row['split']}", row[name])
        events.write_event(Event(wall_time=wall_time, step=row["step"], summary=summary))
