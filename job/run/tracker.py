"""What a run gives to a tracker of experiments, and what a tracker does."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from job.storage import Folder

_NO_METRICS = ("step", "time", "epoch", "workers")  # numbers of a row


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker shows it.

    Args:
        name: of the run
        folder: of the run
        config: the values of all fields of its configuration, by full name
        target: the tracker's field of the section tracking: a URI or a project
    """

    name: str
    folder: Folder
    config: Mapping[str, Any]
    target: str


@dataclass
class StepRecord:
    """What was reported of a step: metrics by split and name, as ``train/nats``, and texts by kind."""

    step: int
    time: float  # Unix seconds
    metrics: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """A connection to a tracker. All methods raise whatever its client raises."""

    def open(self, run_id: str, key: str) -> tuple[str, int | None]:
        """Creates a run of the tracker, or continues the one with an identifier unless that is empty.

        Args:
            run_id: its identifier
            key: of this run in all attempts, by which one is found that was created just before a crash

        Returns:
            its identifier, and the last step that it has, -1 if it has none, None if that is not known
        """

    def describe(self) -> None:
        """Stores the configuration, where the run has none."""

    def log(self, records: list[StepRecord]) -> None:
        """Stores steps, in order. The first may be the last step that it has, of which more was reported later."""

    def upload(self, checkpoint: Path) -> None:
        """Stores the folder of a checkpoint as an artifact."""

    def close(self, *, finished: bool) -> None:
        """Ends the tracker's run, which may be continued unless the run has finished."""


def step_records(rows: Iterable[dict[str, Any]], until: int) -> list[StepRecord]:
    """Returns rows of metrics and samples by their steps, which are at most ``until``."""
    records: dict[int, StepRecord] = {}
    for row in rows:
        if row["step"] <= until:
            record = records.setdefault(row["step"], StepRecord(row["step"], row.get("time") or 0.0))
            if "kind" in row:
                record.texts[row["kind"]] = row["prefix"] + row["continuation"]
            else:
                numbers = {name: value for name, value in row.items() if _is_metric(name, value)}
                record.metrics |= {f"{row['split']}/{name}": value for name, value in numbers.items()}
    return [records[step] for step in sorted(records)]


def _is_metric(name: str, value: Any) -> bool:
    return name not in _NO_METRICS and isinstance(value, int | float) and math.isfinite(value)
