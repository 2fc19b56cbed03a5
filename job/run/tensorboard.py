"""Writes metrics, samples and hyperparameters as TensorBoard events."""

import math
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, scalar, text

from job.console import LARGEST_COUNT

SCORES = ("perplexity/epoch", "perplexity/validation")  # curves that the view of hyperparameters shows
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
    """Adds the finite values of a row of ``metrics.jsonl``; its split becomes the last part of each curve's name."""
    wall_time = row.get("time") or time.time()  # rows of earlier versions have no time
    for name in filter(lambda name: math.isfinite(row[name]), CURVES):  # tensorboardX prints a warning of the others
        summary = scalar(f"{name}/{row['split']}", row[name])
        events.write_event(Event(wall_time=wall_time, step=row["step"], summary=summary))


def add_sample(events: EventsWriter, row: dict[str, Any]) -> None:
    """Adds a row of ``samples.jsonl`` as text, indented so that TensorBoard does not read it as Markdown."""
    summary = text(f"samples/{row['kind']}", textwrap.indent(row["prefix"] + row["continuation"], "    ", bool))
    events.write_event(Event(wall_time=row["time"], step=row["step"], summary=summary))


def add_hyperparameters(events: EventsWriter, hyperparameters: Mapping[str, Any]) -> None:
    """Adds the run as a session of TensorBoard's view of hyperparameters, unless there are none."""
    params = {name: value if _is_number(value) else str(value) for name, value in hyperparameters.items()}
    experiment, start, _ = hparams(params, dict.fromkeys(SCORES, 0.0))
    for summary in (experiment, start) if params else ():
        events.write_event(Event(wall_time=time.time(), summary=summary))


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and abs(value) <= LARGEST_COUNT
