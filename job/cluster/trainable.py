"""One trial of a search, in an actor of Ray Tune: an ordinary run, which waits at each report for the word to go on."""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from signal import SIGTERM
from typing import Any

import ray
from ray import tune

from job.cluster.launcher import TrialLauncher
from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.console import Console
from job.errors import Diverged, RunFailed, UnrecoverableError, UserError
from job.run.driver import run_training
from job.run.lease import HEARTBEAT_INTERVAL_S, LEASE_TIMEOUT_S, acquire_lease, raise_if_held
from job.run.local_launcher import LocalLauncher
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.checkpoint import Checkpoint
from job.training.events import CheckpointCommitted, Event, MetricsRow
from job.tuning.exchange import export_checkpoint, import_checkpoint
from job.tuning.params import trial_config, trial_folder
from job.tuning.trials import read_trial_rows, row_score


@dataclass(frozen=True)
class TrialContext:
    """What all trials share."""

    base: Config
    search: SearchConfig
    folder: Folder
    directory: str  # where the command was given, from which its paths are
    event_channel: Any  # brings the order to stop


class TrialTrainable(tune.Trainable):
    """Runs one trial after another: each an ordinary run, which waits at each report for the word to go on."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Called by Ray Tune once."""
        self.context = context
        with contextlib.suppress(OSError):  # another host may not have it
            os.chdir(context.directory)
        self.attempt: TrialRunner | None = None
        self.told_to_stop = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the search's driver is gone, and soon this process
            ray.get(self.context.event_channel.commands_after.remote(0))
            self.told_to_stop = True
            if self.attempt:
                self.attempt.request_stop()

    @property
    def options(self) -> Config:
        """The run's configuration; the trial is known by its name, since its point may be another's."""
        return trial_config(
            self.context.base, self.context.folder, int(self.trial_name), self.config["trial"]["params"]
        )

    @property
    def place(self) -> Folder:
        """The run's folder."""
        return trial_folder(self.context.folder, int(self.trial_name))

    def step(self) -> dict[str, Any]:
        """Goes on to the next report."""
        if self.attempt is None:
            self.attempt = TrialRunner(self.options, self.place, self.context.search)
            if self.told_to_stop:
                self.attempt.request_stop()
        return self.attempt.next_report()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copies the checkpoint of the last report, for the trials that will go on from it."""
        assert self.attempt and self.attempt.checkpoint
        export_checkpoint(self.attempt.checkpoint, self.place, Folder(checkpoint_dir))

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        """Makes a checkpoint, this trial's or another's, the one that the run goes on from."""
        wait_until_free(self.place, lambda: self.told_to_stop)  # its last actor may still be writing
        lease = acquire_lease(self.place)
        try:
            import_checkpoint(Folder(checkpoint_dir), self.place, self.options)
        finally:
            lease.release()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends this trial's run; the actor takes another."""
        self.cleanup()
        return True

    def cleanup(self) -> None:
        """Ends the run, with a checkpoint, and whatever it has started."""
        if self.attempt:
            self.attempt.end()
            self.attempt = None


def wait_until_free(place: Folder, told_to_stop: Callable[[], bool]) -> None:
    """A driver of this run that is dying, or died with its node, is waited for."""
    until = time.monotonic() + LEASE_TIMEOUT_S + 2 * HEARTBEAT_INTERVAL_S
    while not told_to_stop() and time.monotonic() < until:
        try:
            return raise_if_held(place)
        except UserError:
            time.sleep(0.5)


class TrialRunner:
    """A trial's run in a thread; it reports when the checkpoint of an epoch is whole, and waits there."""

    def __init__(self, config: Config, place: Folder, search: SearchConfig) -> None:
        self.options, self.place, self.search = config, place, search
        self.reports: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self.may_go_on = threading.Semaphore(0)
        self.ending = False
        self.stop_request = StopRequest()
        self.checkpoint: Checkpoint | None = None  # the last one that was committed
        self.row: dict[str, Any] | None = None  # that waits for its checkpoint
        self.told = 0  # the step of the last report
        self.thread = threading.Thread(target=self._drive, daemon=True)

    # --- called by Ray Tune, in the actor's main thread ---

    def next_report(self) -> dict[str, Any]:
        """Lets the run go on, and waits for its next report; raises what ended it unforeseen."""
        if not self.thread.is_alive():
            self.thread.start()
        else:
            self.may_go_on.release()
        found = self.reports.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def request_stop(self) -> None:
        """Has the run save and stop at its next step."""
        self.stop_request.exit_code = 128 + SIGTERM

    def end(self) -> None:
        """Stops the run, where it is not over, and waits until it is."""
        self.ending = True
        self.request_stop()
        self.may_go_on.release()
        if self.thread.ident:
            self.thread.join()

    # --- in the run's thread ---

    def _drive(self) -> None:
        try:
            self.reports.put({"done": True, **self._outcome()})
        except BaseException as error:  # told by the main thread, and tried again by Ray Tune
            self.reports.put(error)

    def _outcome(self) -> dict[str, str]:
        if self.search.scheduler == "asha":
            self._recall()
        if self.stop_request.exit_code:
            return {"state": "interrupted"}
        launcher = TrialLauncher() if self.options.scale.max_workers else LocalLauncher()
        try:
            wait_until_free(self.place, lambda: bool(self.stop_request.exit_code))
            if self.stop_request.exit_code:
                return {"state": "interrupted"}
            with open(os.devnull, "w") as nowhere:
                exit_code = run_training(
                    self.options, "", Console(nowhere), launcher, self.stop_request, self._on_event
                )
        except Diverged as error:
            return {"state": "diverged", "reason": _short(error)}
        except (UnrecoverableError, UserError) as error:
            return {"state": "failed", "reason": _short(error)}
        return {"state": "interrupted" if exit_code else "finished"}

    def _recall(self) -> None:
        """Reports again what an earlier start of the search has seen, for the scheduler."""
        for row in read_trial_rows(self.place):
            if not self.stop_request.exit_code:
                self._report(row)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, MetricsRow):
            if row_score(event.row, self.search.metric) is not None:
                self.row = event.row
        elif isinstance(event, CheckpointCommitted):
            self.checkpoint = event.checkpoint
            if self.row and event.checkpoint.step == self.row["step"]:
                row, self.row = self.row, None
                self._report(row)

    def _report(self, row: dict[str, Any]) -> None:
        """Tells Ray Tune, once for each step, and waits for its word."""
        value = row_score(row, self.search.metric)
        if value is None or row["step"] <= self.told or self.ending:
            return
        self.told = row["step"]
        self.reports.put({"epoch": row["epoch"], "step": row["step"], "score": value})
        self.may_go_on.acquire()


def _short(error: UserError | RunFailed) -> str:
    """What went wrong, without what the run's own command would say of going on."""
    return error.problem
