"""Messages from the workers to the driver."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from job.errors import UnrecoverableError
from job.training.checkpoint import Checkpoint, CorruptCheckpoint, PartReceipt
from job.training.progress import Progress


@dataclass(frozen=True)
class Event:
    """A message from the worker group ``attempt``; the driver ignores those of replaced groups."""

    attempt: str


@dataclass(frozen=True)
class Started(Event):
    """A worker group is ready to train."""

    step: int  # that it resumes from; 0 in a new run
    epoch: int
    workers: int
    device: str
    precision: str
    num_weights: int
    total_steps: int
    skipped_checkpoints: tuple[CorruptCheckpoint, ...]  # later than the one that was loaded
    num_multiplied: int = 0  # weights in matrix products, each used once per token; 0: not known


@dataclass(frozen=True)
class ProgressUpdate(Event):
    """Current numbers for the console; not stored."""

    epoch: int
    step: int
    nats: float  # mean per token of the epoch
    tokens_per_second: float


@dataclass(frozen=True)
class MetricsRow(Event):
    """A row for ``metrics.jsonl``."""

    row: dict[str, Any]


@dataclass(frozen=True)
class Sampled(Event):
    """Rows for ``samples.jsonl``: texts that the weights of a step generate."""

    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class PartWritten(Event):
    """A worker has written its part of a checkpoint."""

    receipt: PartReceipt


@dataclass(frozen=True)
class Finished(Event):
    """Training has ended, or stopped on request, and rank 0 has written its part of the last checkpoint."""

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
    """A worker ended with an unexpected exception."""

    message: str


@dataclass(frozen=True)
class WorkerGroupEnded(Event):
    """No worker group is running: it failed, could not start, or is replaced by one of another size.

    ``message`` describes the failure and is empty if there was none; ``attempt`` is unknown and empty.
    """

    message: str


@dataclass(frozen=True)
class CheckpointCommitted(Event):
    """The driver has committed a checkpoint. No worker sends this; it is for those who observe the driver."""

    checkpoint: Checkpoint


EventSink = Callable[[Event], None]
