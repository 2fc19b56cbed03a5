"""Events to the run's folder and to the screen: metrics, TensorBoard, and the commit of checkpoints."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from job.config.schema import Config
from job.console import Console, format_duration
from job.errors import RunFailed, UnrecoverableError
from job.run.lease import Lease
from job.run.metrics import parse_rows
from job.run.tensorboard import TensorBoardWriter
from job.storage import Folder
from job.training.checkpoint import (
    Checkpoint,
    PartReceipt,
    commit_checkpoint,
    discard_after,
    list_checkpoints,
    remove_checkpoint,
)
from job.training.events import (
    CheckpointCommitted,
    Crashed,
    Event,
    EventSink,
    Failed,
    Finished,
    MetricsRow,
    PartWritten,
    ProgressUpdate,
    Started,
    WorkerGroupEnded,
)
from job.training.progress import perplexity

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"  # of a run that is finished
MAX_CONSECUTIVE_FAILURES = 6
COMMIT_VISIBILITY_S = 60.0  # seconds between a group's look at the checkpoints and its word of it, at most


class Recorder:
    """The driver's ear: takes events in the order of their coming, and is the only one to commit.

    A checkpoint is committed when the parts of all workers of one attempt are there, after the rows
    of metrics that came before it: whatever a crash leaves, the rows up to the last checkpoint are
    on the disk.
    """

    def __init__(
        self, folder: Folder, config: Config, lease: Lease, console: Console, on_event: EventSink | None = None
    ) -> None:
        self.folder, self.options, self.lease, self.console = folder, config, lease, console
        self.checkpoints = folder / "checkpoints"
        self.place = folder.local_path or Path(tempfile.mkdtemp(prefix="lanes-"))
        self.attempts = [""]
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.failed: UnrecoverableError | None = None
        self.committed: list[Checkpoint] = []
        self.committed_at: dict[str, float] = {}  # by time.monotonic
        self.setbacks = 0
        self.standing = False  # whether a group of workers is there
        self.is_told = False  # whether one of them has said why it ended
        self.parts: dict[str, list[PartReceipt]] = {}
        self.early: list[PartWritten] = []  # of a group whose first worker has not been heard yet
        self.board: TensorBoardWriter | None = None
        self.on_event = on_event or (lambda _: None)
        if folder.local_path is None and folder.has(METRICS_FILE):
            (self.place / METRICS_FILE).write_bytes(folder.read(METRICS_FILE))

    @property
    def attempt(self) -> str:
        """The group of workers that counts."""
        return self.attempts[-1]

    @property
    def starts(self) -> int:
        """Groups of workers that have stood."""
        return len(self.attempts) - 1

    @property
    def over(self) -> bool:
        """Whether the run has come to an end, and its last checkpoint is committed."""
        done = self.finished and any(entry.name == self.finished.checkpoint for entry in self.committed)
        return bool(done or self.failed)

    def handle(self, event: Event) -> None:
        """Takes one event in; RunFailed where the folder cannot be written."""
        self._take(event)
        if event.attempt == self.attempt:
            self.on_event(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, Started):
            return self._writing(self._start, event)
        if isinstance(event, Crashed):
            self.is_told = True
            return self.console.warn(event.message)
        if isinstance(event, WorkerGroupEnded):
            return self._ended(event.message)
        if isinstance(event, Failed) and event.attempt not in self.attempts[:-1]:
            self.failed = event.error  # perhaps before the group stood
        if isinstance(event, PartWritten) and event.attempt not in self.attempts:
            return self.early.append(event)
        if event.attempt != self.attempt:
            return  # of workers that have been replaced
        match event:
            case MetricsRow():
                self._writing(self._row, event.row)
            case PartWritten():
                self._writing(self._part, event.receipt)
            case ProgressUpdate():
                self._pulse(event)
            case Finished():
                self.finished = event

    def _writing(self, action: Any, what: Any) -> None:
        try:
            action(what)
        except OSError as error:
            raise RunFailed(f"{self.folder}: cannot be written to: {error.strerror or error}") from None

    def _ended(self, why: str) -> None:
        """Counts failures with no checkpoint between them: what fails each time will fail for ever."""
        if why and not self.is_told:  # a worker that is killed says nothing itself
            self.console.warn(why)
        self.standing = self.is_told = False
        self.setbacks += bool(why)
        if self.setbacks >= MAX_CONSECUTIVE_FAILURES:
            self.failed = UnrecoverableError(
                f"the workers failed {MAX_CONSECUTIVE_FAILURES} times without reaching a checkpoint; last: {why}"
            )

    def _start(self, event: Started) -> None:
        """A group of workers goes on from a step: what came after it will come again."""
        self.lease.check()
        self.attempts.append(event.attempt)
        self.started, self.finished, self.standing, self.is_told = event, None, True, False
        self.parts.clear()
        if overlooked := self._overlooked(event):
            self.failed = UnrecoverableError(
                f"{self.checkpoints}: the workers start at step {event.step:,} and do not see {overlooked}",
                "make sure that all nodes mount the same storage",
            )
            return
        self.folder.remove(RESULT_FILE)  # of a shorter run that goes on
        discard_after(self.checkpoints, event.step, event.attempt)
        self.committed, _ = list_checkpoints(self.checkpoints)
        rows = self._cut_metrics(event.step)
        if self.board:
            self.board.close()
        if self.folder.local_path is None:  # the new file has another name
            self.folder.remove("tensorboard")
        self.board = TensorBoardWriter(self.place / "tensorboard", rows)
        for corrupt in event.skipped_checkpoints:
            self.console.warn(f"{corrupt}; the one before it is used")
        self._say_start(event)
        early, self.early = self.early, []
        for part in early:
            self._take(part)

    def _overlooked(self, event: Started) -> str:
        """A checkpoint that the workers must have seen and do not name; nothing is removed then.

        They may miss what was committed while they looked.
        """
        skipped = {corrupt.name for corrupt in event.skipped_checkpoints}
        checkpoints, _ = list_checkpoints(self.checkpoints)
        for checkpoint in checkpoints:
            age_s = time.monotonic() - self.committed_at.get(checkpoint.name, 0.0)
            if checkpoint.step > event.step and checkpoint.name not in skipped and age_s > COMMIT_VISIBILITY_S:
                return checkpoint.name
        return ""

    def _say_start(self, event: Started) -> None:
        options, workers = self.options, f"{event.workers} worker{'s' * (event.workers != 1)}"
        if self.starts > 1:
            return self.console.print(f"goes on from step {event.step:,} on {workers}")
        layers = f"{options.model.num_layers} × " if options.model.num_layers > 1 else ""
        self.console.print(
            f"{options.model.cell} {layers}{options.model.hidden_size}, {event.num_weights:,} weights; "
            f"{options.stream.batch_size} lanes × {options.stream.num_steps} steps; "
            f"{workers} on {event.device}, {event.precision}"
        )
        if event.step:
            self.console.print(f"goes on from step {event.step:,} of {event.total_steps:,}")

    def _cut_metrics(self, step: int) -> list[dict[str, Any]]:
        """Leaves the rows up to a step, and gives them."""
        kept = [row for row in self.rows() if row["step"] <= step]
        Folder(str(self.place)).write(METRICS_FILE, "".join(f"{json.dumps(row)}\n" for row in kept).encode())
        return kept

    def _row(self, row: dict[str, Any]) -> None:
        self.lease.check_if_stale()
        with (self.place / METRICS_FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")
        assert self.board
        self.board.add(row)
        if row["split"] != "train":
            self._pulse(
                ProgressUpdate(self.attempt, row["epoch"], row["step"], row["nats"], row["tokens_per_second"]),
                "validation " if row["split"] == "validation" else "",
            )

    def _pulse(self, event: ProgressUpdate, split: str = "") -> None:
        assert self.started
        left = (self.started.total_steps - event.step) * self.tokens_of_step / max(event.tokens_per_second, 1.0)
        self.console.progress(
            f"epoch {event.epoch}/{self.options.train.epochs}  step {event.step:,}/{self.started.total_steps:,}  "
            f"{split}perplexity {perplexity(event.nats):.2f}  {event.tokens_per_second:,.0f} tokens/s  "
            f"{format_duration(left)} left"
        )

    @property
    def tokens_of_step(self) -> int:
        """Tokens in a window of all lanes."""
        return self.options.stream.batch_size * self.options.stream.num_steps

    def _part(self, receipt: PartReceipt) -> None:
        parts = self.parts.setdefault(receipt.checkpoint, [])
        parts.append(receipt)
        if len(parts) < receipt.workers:
            return
        del self.parts[receipt.checkpoint]
        self.lease.check()
        self.sync()
        self.committed.append(commit_checkpoint(self.checkpoints, receipt.checkpoint, parts))
        self.committed_at[receipt.checkpoint] = time.monotonic()
        self.setbacks = 0
        kept = [*self.committed[-self.options.train.keep_checkpoints :], self.best]
        for entry in self.committed:
            if entry not in kept:
                remove_checkpoint(entry)
        self.committed = [entry for entry in self.committed if entry in kept]
        self.on_event(CheckpointCommitted(self.attempt, self.committed[-1]))

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation loss, where there is a validation."""
        scored = [entry for entry in self.committed if entry.validation_nats is not None]
        return min(scored, key=lambda entry: entry.validation_nats or 0.0, default=None)

    def sync(self) -> None:
        """Has the growing files on the disk, or in the storage where that cannot append."""
        path = self.place / METRICS_FILE
        if self.board:
            self.board.flush()
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if self.folder.local_path is None:
            self.folder.upload(self.place)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics so far."""
        path = self.place / METRICS_FILE
        return parse_rows(path.read_bytes()) if path.exists() else []

    def close(self) -> None:
        """Lets go of files."""
        if self.board:
            with contextlib.suppress(OSError):
                self.board.close()
        if self.folder.local_path is None:
            shutil.rmtree(self.place, ignore_errors=True)
