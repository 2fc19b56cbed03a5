"""A trial of a search in a Ray Tune actor: an ordinary run that pauses at each report until Ray Tune continues it."""

import contextlib
import os
import queue
import threading
import time
import uuid
from dataclasses import dataclass
from signal import SIGTERM
from typing import Any

import ray
from ray import tune

from job.cluster.launcher import RayLauncher
from job.cluster.ray_extensions import TrainingResult
from job.config.schema import Config
from job.config.search_space import METRIC_SPLITS, SearchConfig
from job.console import Console
from job.errors import Diverged, UnrecoverableError, UserError
from job.run.driver import run_training
from job.run.lease import HEARTBEAT_INTERVAL_S, LEASE_TIMEOUT_S, POLL_INTERVAL_S, LeaseObserver, acquire_lease
from job.run.local_launcher import LocalLauncher
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.checkpoint import Checkpoint
from job.training.events import CheckpointCommitted, Event, MetricsRow
from job.tuning.exchange import EXCHANGE_FOLDER, export_checkpoint, forget_exchange, import_checkpoint
from job.tuning.trials import read_score_rows, trial_config, trial_folder

STOPPED = 128 + SIGTERM  # the exit code of a StopRequest


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search share."""

    base: Config
    search: SearchConfig
    folder: Folder  # of the search
    directory: str  # the driver's working directory, for relative paths
    event_channel: Any  # carries the request to stop
    is_local: bool  # whether all workers are on the driver's machine


class TrialTrainable(tune.Trainable):
    """The actor class: runs trials, one after another."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Called by Ray Tune once per actor."""
        self.context = context
        with contextlib.suppress(OSError):  # another host may not have the directory
            os.chdir(context.directory)
        self.runner: TrialRunner | None = None
        self.stop_request = StopRequest()
        threading.Thread(target=self._wait_for_stop, daemon=True).start()

    def _wait_for_stop(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the driver died, and Ray will end this process
            ray.get(self.context.event_channel.wait_for_requests.remote((0, 0)))
            self.stop_request.exit_code = STOPPED
            if self.runner:
                self.runner.request_stop()

    # The trial is identified by its name: its Ray Tune configuration may be a copy of another trial's.

    @property
    def run_config(self) -> Config:
        """The configuration of the trial's run."""
        context, params = self.context, self.config["trial"]["params"]
        return trial_config(context.base, context.folder, int(self.trial_name), params)

    @property
    def run_folder(self) -> Folder:
        """The folder of the trial's run."""
        return trial_folder(self.context.folder, int(self.trial_name))

    def step(self) -> dict[str, Any]:
        """Continues the run until its next report. Called by Ray Tune."""
        if self.runner is None:
            self.runner = TrialRunner(
                self.run_config, self.run_folder, self.context.search, is_local=self.context.is_local
            )
            if self.stop_request.exit_code:
                self.runner.request_stop()
        return self.runner.next_report()

    # Ray's own save and restore exchange files through Ray's folder of the search, and unpickle one of them if it is
    # there. Here a trial exports a checkpoint to a new folder, and a trial that imports it reads nothing else.

    def save(self, checkpoint_dir: str | None = None) -> TrainingResult:
        """Exports the checkpoint of the last report for other trials. Called by Ray Tune."""
        assert self.runner
        assert self.runner.checkpoint
        target = self.context.folder / EXCHANGE_FOLDER / uuid.uuid4().hex
        export_checkpoint(self.runner.checkpoint, self.run_folder, target)
        assert target.location
        file_system, path = target.location
        return TrainingResult(tune.Checkpoint(path, file_system), {})

    def restore(self, checkpoint_path: TrainingResult) -> None:  # type: ignore[override]
        """Makes the run resume from a checkpoint, which may be another trial's. Called by Ray Tune."""
        checkpoint = checkpoint_path.checkpoint
        source = Folder(checkpoint.path, retry=True, location=(checkpoint.filesystem, checkpoint.path))
        # A previous actor may still be writing.
        with acquire_lease(self.run_folder, watch_until_free(self.run_folder, self.stop_request)) as lease:
            import_checkpoint(source, lease.folder, self.run_config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends this trial's run, so that the actor can be reused. Called by Ray Tune."""
        self.cleanup()
        return True

    def cleanup(self) -> None:
        """Ends the run after a checkpoint. Called by Ray Tune."""
        if self.runner:
            self.runner.end()
            self.runner = None


def watch_until_free(run_folder: Folder, stop_request: StopRequest) -> LeaseObserver:
    """Waits until the lease of a run is released or a stop is requested, at most a little longer than it can last."""
    deadline = time.monotonic() + LEASE_TIMEOUT_S + 2 * HEARTBEAT_INTERVAL_S
    observer = LeaseObserver(run_folder)
    while observer.is_held() is not False and not stop_request.exit_code and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)
    return observer


class TrialRunner:
    """A trial's run in a thread. After each epoch's checkpoint it reports the score and pauses."""

    def __init__(self, config: Config, folder: Folder, search: SearchConfig, is_local: bool = False) -> None:
        self.config, self.folder, self.search, self.is_local = config, folder, search, is_local
        self.reports: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self.resume = threading.Semaphore(0)
        self.ending = False
        self.stop_request = StopRequest()
        self.checkpoint: Checkpoint | None = None  # the last one that was committed
        self.last_row: dict[str, Any] | None = None  # with a score, perhaps of the step after which an epoch ends early
        self.pending_rows: dict[int, dict[str, Any]] = {}  # by step; each waits for the checkpoint of its step
        self.last_epoch_step = self.last_reported_step = 0
        self.thread = threading.Thread(target=self._run, daemon=True)

    # --- called in the actor's main thread ---

    def next_report(self) -> dict[str, Any]:
        """Continues the run and waits for its next report. Raises the error of a run that may succeed if retried."""
        if self.thread.is_alive():
            self.resume.release()
        else:
            self.thread.start()
        report = self.reports.get()
        if isinstance(report, BaseException):
            raise report
        return report

    def request_stop(self) -> None:
        """Makes the run save and stop at its next step."""
        self.stop_request.exit_code = STOPPED

    def end(self) -> None:
        """Stops the run if it has not ended, and waits for it."""
        self.ending = True
        self.request_stop()
        self.resume.release()
        if self.thread.ident:
            self.thread.join()

    # --- called in the run's thread ---

    def _run(self) -> None:
        try:
            # ASHA decides from the scores of earlier runs of the search, too.
            for row in read_score_rows(self.folder, self.search.metric) if self.search.scheduler == "asha" else ():
                if not self.stop_request.exit_code:
                    self._report(row)
            self.reports.put({"done": True, **self._train()})
        except BaseException as error:  # raised by next_report
            self.reports.put(error)

    def _train(self) -> dict[str, str]:
        """Runs the training to its end, and returns the trial's state with a reason if it failed."""
        uses_workers = self.config.scale.max_workers > 0
        launcher = RayLauncher(in_trial=True, is_local=self.is_local) if uses_workers else LocalLauncher()
        try:
            observer = watch_until_free(self.folder, self.stop_request)
            if self.stop_request.exit_code:
                return {"state": "interrupted"}
            acquire_lease(self.folder, observer).release()  # removes that of a dead actor
            with open(os.devnull, "w") as null:
                arguments = self.config, "", Console(null), launcher, self.stop_request, self._on_event
                outcome = run_training(*arguments, retry=True, in_trial=True)
        except Diverged as error:
            return {"state": "diverged", "reason": error.problem}
        except (UnrecoverableError, UserError) as error:
            return {"state": "failed", "reason": error.problem}
        return {"state": "interrupted" if outcome.exit_code else "finished"}

    def _on_event(self, event: Event) -> None:
        if isinstance(event, MetricsRow):
            split, step = event.row["split"], event.row["step"]
            if split == "epoch":
                self.last_epoch_step = step
            if split == METRIC_SPLITS[self.search.metric]:
                self.last_row = event.row
            if self.last_row and self.last_row["step"] == self.last_epoch_step:
                self.pending_rows[step], self.last_row = self.last_row, None
        if isinstance(event, CheckpointCommitted):
            self.checkpoint = event.checkpoint
            if row := self.pending_rows.pop(event.checkpoint.step, None):
                self._report(row)

    def _report(self, row: dict[str, Any]) -> None:
        """Passes a score to Ray Tune, once per step, and pauses the run.

        Training continues during the pause until its next checkpoint, so it may complete another epoch before the
        run ends. That epoch is not reported to Ray Tune, so the run must restart from the one that was reported.
        """
        if self.ending:
            forget_exchange(self.folder)
        elif row["step"] > self.last_reported_step:
            self.last_reported_step = row["step"]
            self.reports.put({"epoch": row["epoch"], "step": row["step"], "score": row["perplexity"]})
            self.resume.acquire()
