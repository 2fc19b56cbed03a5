"""The curves of a run, reduced to as many points as a page can show."""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from job.run.metrics import read_rows, restart_steps
from job.run.plot import MAX_PLOTTED_PERPLEXITY
from job.storage import Folder

MAX_POINTS = 1000  # of a curve
NUM_DIGITS = 6  # of a value
POSITIONS = ("step", "tokens", "time")  # what a curve may be drawn over

Rows = list[dict[str, Any]]
Curve = dict[str, list[float | None]]  # columns of the same length: POSITIONS and "value"


def read_curves(folder: Folder) -> dict[str, Any]:
    """Returns the curves of a run that have points, and its events: restarts, and changes of the number of workers.

    The time is in seconds since the first row, and None in rows of early versions.

    Raises:
        OSError: the run's folder cannot be read
    """
    rows = list(read_rows(folder))
    start = next((row["time"] for row in rows if row.get("time")), 0.0)
    splits = {split: [row for row in rows if row["split"] == split] for split in ("train", "epoch", "validation")}
    training = splits["train"] if len(splits["train"]) > len(splits["epoch"]) else splits["epoch"]
    curves = {
        "training": _curve(training, "perplexity", start),
        "validation": _curve(splits["validation"], "perplexity", start),
        "learning_rate": _curve(training, "learning_rate", start),
        "tokens_per_second": _curve(training, "tokens_per_second", start),
    }
    events = find_events(training, restart_steps(folder))
    return {
        "curves": {name: curve for name, curve in curves.items() if curve["value"]},
        "events": [{**_position(row, start), "kind": kind, "text": text} for row, kind, text in events],
    }


def find_events(rows: Rows, restarts: list[int]) -> list[tuple[dict[str, Any], str, str]]:
    """Returns the first row after each restart and each change of the number of workers, its kind and what happened.

    Args:
        rows: of one split
        restarts: the steps after which workers have started again
    """
    events = []
    for before, row in pairwise(rows):
        workers, old_workers = row.get("workers"), before.get("workers")
        if workers and old_workers and workers != old_workers:
            events.append((row, "resize", f"{old_workers} → {workers} workers"))
        elif any(before["step"] < step <= row["step"] for step in restarts):
            events.append((row, "restart", "restart"))
    return events


def _curve(rows: Rows, name: str, start: float) -> Curve:
    rows = [row for row in rows if isinstance(row.get(name), int | float) and math.isfinite(row[name])]
    values = np.minimum([row[name] for row in rows], MAX_PLOTTED_PERPLEXITY if name == "perplexity" else np.inf)
    indices = decimate(values, MAX_POINTS)
    positions = [_position(rows[index], start) for index in indices]
    columns: Curve = {key: [position[key] for position in positions] for key in POSITIONS}
    return {**columns, "value": [float(f"{values[index]:.{NUM_DIGITS}g}") for index in indices]}


def _position(row: dict[str, Any], start: float) -> dict[str, float | None]:
    time = row.get("time")
    return {"step": row["step"], "tokens": row.get("tokens"), "time": round(time - start, 1) if time else None}


def decimate(values: "np.ndarray | Iterable[float]", max_points: int) -> np.ndarray:
    """Returns the indices of the first and the last value, and of the least and the largest of each part of the values.

    All values are kept if they are no more than ``max_points``. So no extreme is lost.
    """
    array = np.asarray(values, dtype=float)
    if len(array) <= max_points:
        return np.arange(len(array))
    bounds = np.linspace(0, len(array), max_points // 2).astype(int)
    parts = [(start, array[start:stop]) for start, stop in pairwise(bounds)]
    extremes = [start + index for start, part in parts for index in (part.argmin(), part.argmax())]
    return np.unique([0, *extremes, len(array) - 1])
