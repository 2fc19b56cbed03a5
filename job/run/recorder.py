"""Records what workers report: metrics, committed checkpoints, and the run's status."""

from collections.abc import Mapping
from typing import Any

from job.config.schema import Config
from job.console import Console
from job.errors import RunFailed
from job.run.checkpoint_committer import CheckpointCommitter
from job.run.lease import Lease
from job.run.metrics import MetricsLog
from job.run.run_dir import RESULT_FILE
from job.run.run_status import RunStatus
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
    Sampled,
    Started,
    WorkerGroupEnded,
)


class Recorder:
    """Consumes worker events in order of arrival. Only this class commits checkpoints.

    The rows of metrics that precede a checkpoint are made durable before it is committed, so the rows up to the last
    checkpoint survive any crash.
    """

    def __init__(
        self,
        config: Config,
        lease: Lease,
        console: Console,
        on_event: EventSink | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.lease = lease.folder, lease
        self.status = RunStatus(config, console)
        self.metrics = MetricsLog(self.folder, hyperparameters)
        self.committer = CheckpointCommitter(self.folder / "checkpoints", config.train.keep_checkpoints)
        self.on_event = on_event or (lambda _: None)

    @property
    def is_done(self) -> bool:
        """Whether the run has failed, or has finished and its last checkpoint is committed."""
        finished = self.status.finished
        names = [checkpoint.name for checkpoint in self.committer.checkpoints]
        return self.status.failed is not None or (finished is not None and finished.checkpoint in names)

    def handle(self, event: Event) -> None:
        """Records an event, unless its workers have been replaced. Raises RunFailed if the folder cannot be written."""
        if self.status.is_stale(event):
            return
        try:
            self._dispatch(event)
        except OSError as error:
            raise RunFailed(f"{self.folder}: cannot be written to: {error.strerror or error}") from None
        self.on_event(event)

    def _dispatch(self, event: Event) -> None:
        match event:
            case Started():
                self._start(event)
            case MetricsRow() | Sampled():
                self._append(event)
            case PartWritten():
                if self.committer.add(event.receipt):
                    self._commit(event)
            case ProgressUpdate():
                self.status.show_progress(event.epoch, event.step, event.nats, event.tokens_per_second)
            case Crashed():
                self.status.report_crash(event.message)
            case WorkerGroupEnded():
                self.status.end_attempt(event.message)
            case Failed():
                self.status.failed = event.error
            case Finished():
                self.status.finished = event

    def _start(self, event: Started) -> None:
        """Makes a worker group the current one; discards what earlier ones wrote after its first step."""
        self.status.start_attempt(event)
        self.committer.check_seen(event)
        self.folder.remove(RESULT_FILE)  # of the same run with fewer epochs or steps
        self.committer.resume(event.step, event.attempt)
        self.metrics.truncate(event.step)
        for corrupt in event.skipped_checkpoints:
            self.status.console.warn(f"{corrupt}; the one before it is used")
        self.status.print_start()

    def _append(self, event: MetricsRow | Sampled) -> None:
        self.lease.check_if_stale()
        if isinstance(event, MetricsRow):
            self.metrics.append(event.row)
            self.status.show_row(event.row)
        else:
            self.metrics.append_samples(event.rows)
            self.status.show_samples(event.rows)

    def _commit(self, event: PartWritten) -> None:
        self.metrics.sync()
        checkpoint = self.committer.commit(event.receipt.checkpoint)
        self.status.consecutive_failures = 0
        self.on_event(CheckpointCommitted(event.attempt, checkpoint))

    def close(self) -> None:
        """Closes the files of metrics."""
        self.metrics.close()
