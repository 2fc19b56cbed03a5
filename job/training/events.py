"""What workers tell the driver, and nothing else travels that way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from job.errors import UnrecoverableError
from job.training.checkpoint import Checkpoint, CorruptCheckpoint, PartReceipt
from job.training.progress import Progress


@dataclass(frozen=True)
class Event:
    """``attempt`` names the group of workers that tells; of an older group nothing counts."""

    attempt: str


@dataclass(frozen=True)
class Started(Event):
    """A group of workers stands, and goes on from ``step``."""

    step: int
    epoch: int
    workers: int
    device: str
    precision: str
    weights: int
    total_steps: int
    skipped_checkpoints: tuple[CorruptCheckpoint, ...]  # later than the one that was loaded


@dataclass(frozen=True)
class ProgressUpdate(Event):
    """Where the run is now, for the eye."""

    epoch: int
    step: int
    nats: float
    tokens_per_second: float


@dataclass(frozen=True)
class MetricsRow(Event):
    """A row of ``metrics.jsonl``."""

    row: dict[str, Any]


@dataclass(frozen=True)
class PartWritten(Event):
    """A worker's part of a checkpoint is on the disk."""

    receipt: PartReceipt


@dataclass(frozen=True)
class Finished(Event):
    """The end was reached, or a stop that was asked for; rank 0's parts are written."""

    stopped: bool
    progress: Progress
    checkpoint: str
    workers: int


@dataclass(frozen=True)
class Failed(Event):
    """The run cannot continue, and restarting the workers would not help."""

    error: UnrecoverableError


@dataclass(frozen=True)
class Crashed(Event):
    """A worker ended by an error of its own."""

    message: str


@dataclass(frozen=True)
class WorkerGroupEnded(Event):
    """No group of workers stands: one failed, could not start, or makes way for one of another size.

    ``message`` says what failed, and is empty where nothing did; ``attempt`` is not known.
    """

    message: str


@dataclass(frozen=True)
class CheckpointCommitted(Event):
    """The driver has committed a checkpoint. No worker sends this; it is for those who observe the driver."""

    checkpoint: Checkpoint


EventSink = Callable[[Event], None]
