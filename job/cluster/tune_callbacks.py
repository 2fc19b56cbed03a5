"""Callbacks of Ray Tune in the driver of a search: for trial events, and to stop the search."""

import contextlib
import queue
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as RayTrial

from job.console import Console
from job.tuning.report import format_trial
from job.tuning.trials import Trial, Trials


class NotPickled:
    """Base of objects that are not written into Ray Tune's records.

    Ray Tune pickles callbacks, schedulers and searchers to restore an experiment. A search resumes from the
    folders of its trials instead, and these objects hold locks and threads.
    """

    def __reduce__(self) -> Any:
        return (object, ())


def trial_number(ray_trial: RayTrial) -> int:
    """A trial's number, from its name: population-based training may replace its config by another trial's."""
    return int(str(ray_trial))


class TrialCallback(NotPickled, tune.Callback, tune.Stopper):
    """Records in ``trials`` how trials start, report and end, and ends the search if ``stop_requested`` is set.

    Args:
        trials: the trials of the search
        max_failures: how often a trial is restarted without having reported a new epoch in between
    """

    def __init__(self, trials: Trials, max_failures: int) -> None:
        self.trials, self.max_failures, self.stop_requested = trials, max_failures, False
        self.last_result_at = time.monotonic()
        self.started: dict[int, RayTrial] = {}
        self.ended: queue.SimpleQueue[Trial] = queue.SimpleQueue()  # for the main thread to record

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Called by Ray Tune when an actor starts or resumes a trial."""
        number = trial_number(trial)
        self.started[number] = trial
        self.trials.start(number, trial.config["trial"]["params"])

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Ray Tune when a trial reports a result. Records its score."""
        self.last_result_at = time.monotonic()
        if "score" in result and self.trials.report(trial_number(trial), result["epoch"], result["score"]):
            # Ray Tune limits the failures of a trial in total; here only those without progress in between count.
            trial.max_failures = trial.num_failures + self.max_failures

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Called by Ray Tune when a trial has ended. There is no state if the scheduler stopped it."""
        result = trial.last_result
        self._end(trial, result.get("state", "stopped"), result.get("reason", ""))

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """Called by Ray Tune when a trial has failed too often."""
        self._end(trial, "failed", _failure_reason(trial.error_file))

    def _end(self, ray_trial: RayTrial, state: str, reason: str) -> None:
        if state != "interrupted":
            number = trial_number(ray_trial)
            self.trials.end(number, state, reason)
            self.ended.put(self.trials.by_number[number])

    def record_ended(self, console: Console) -> None:
        """Records the trials that have ended since the last call, and prints a line for each."""
        ended = [self.ended.get() for _ in range(self.ended.qsize())]  # others may end while these are written
        if ended:
            self.trials.write_records()
        for trial in ended:
            console.print(format_trial(self.trials, trial))

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether Ray Tune shall stop this trial: never."""
        return False

    def stop_all(self) -> bool:
        """Whether Ray Tune shall end the search: once no trial is running, so that all have saved."""
        return self.stop_requested and not any(trial.status == RayTrial.RUNNING for trial in self.started.values())


def _failure_reason(error_file: str | None) -> str:
    """The last line of the traceback in Ray Tune's error file. Without a traceback, the process died."""
    with contextlib.suppress(OSError, TypeError, IndexError):
        return [line for line in Path(str(error_file)).read_text().splitlines() if line.strip()][-1].strip()[:200]
    return "its process died"
