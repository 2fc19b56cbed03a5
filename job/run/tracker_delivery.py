"""Delivers a run's rows to its trackers, each in a thread, so that none delays or fails the run.

A row is delivered once its step is in a committed checkpoint, since rows after it may be reported again. So each step
reaches a tracker once: what it has is read from it when it is opened, and rows that it lacks from the run's files.
From a request to stop until the run's last checkpoint is saved nothing is sent, because the process may be killed soon.
"""

import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from job.config.run import TrackingConfig
from job.config.schema import Config
from job.console import Console
from job.documents import parse_record
from job.errors import UserError
from job.paths import mask_credentials
from job.run.metrics import read_rows
from job.run.samples import read_samples
from job.run.signals import StopRequest
from job.run.tracker import TrackedRun, Tracker, step_records
from job.storage import Folder
from job.training.events import CheckpointCommitted, Event, MetricsRow, Sampled, Started

TRACKING = "tracking"  # the folder with a tracker's run and last step, in the run's folder
MAX_ROWS = 20_000  # in memory; if there are more, they are read from the run's files
BATCH_STEPS = 100  # after which the last step is stored
RETRY_S, MAX_RETRY_S = 5.0, 300.0  # between two attempts
CLOSE_TIMEOUT_S, FAILED_CLOSE_TIMEOUT_S = 60.0, 5.0  # for the rest of a finished run, and if the last attempt failed
STOP_TIMEOUT_S = 1.0  # for the rest of another run, which gets it when it is resumed; ray job stop kills after 3 s
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")  # variables


def check_trackers(config: TrackingConfig) -> None:
    """Imports the packages of trackers. Raises UserError if that is not possible, or a variable is not set.

    That takes seconds, in which a driver that waits for the import of another thread cannot handle a signal to stop.
    """
    if config.mlflow == "env" and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError("tracking.mlflow = env: MLFLOW_TRACKING_URI is not set", "set it, or give the URI")
    for name in config.targets:
        if find_spec(name) is None:
            raise UserError(f"tracking.{name}: {name} is not installed", f"pip install 'lanes[{name}]'")
        try:
            import_module(f"job.run.{name}_tracker")
        except ImportError as error:
            problem = f"tracking.{name}: {name} cannot be imported: {' '.join(str(error).split())}"
            raise UserError(problem, f"pip install 'lanes[{name}]'") from None


class Trackers:
    """The trackers of a run."""

    def __init__(self, config: Config, folder: Folder, console: Console, stop_request: StopRequest) -> None:
        self.console = console
        runs = {
            name: TrackedRun(config.run.name, folder, config.values(), target)
            for name, target in config.tracking.targets.items()
        }
        uploads = config.tracking.checkpoint
        self.deliveries = [Delivery(name, run, uploads, stop_request) for name, run in runs.items()]

    def handle(self, event: Event) -> None:
        """Passes what was recorded to all trackers."""
        for delivery in self.deliveries:
            match event:
                case Started():
                    delivery.restart(event.step)
                case MetricsRow():
                    delivery.add(event.row)
                case Sampled():
                    delivery.add(*event.rows)
                case CheckpointCommitted():
                    delivery.commit(event.checkpoint.step)
            self._warn(delivery)

    def finish(self, checkpoint: str) -> None:
        """Records that the run has finished with a checkpoint, whose path is relative to the run's folder."""
        for delivery in self.deliveries:
            delivery.last_checkpoint = checkpoint

    def close(self) -> None:
        """Delivers what is left, within a time limit or until a signal."""
        for delivery in self.deliveries:
            delivery.request_close()
        with suppress(KeyboardInterrupt):
            for delivery in self.deliveries:
                delivery.join_in_time()
        for delivery in self.deliveries:
            delivery.report_rest()
            self._warn(delivery)

    def _warn(self, delivery: "Delivery") -> None:
        problem, delivery.problem = delivery.problem, ""
        if problem:
            self.console.warn(problem)


class _Paused(Exception):
    """Nothing may be sent now."""


class Delivery(threading.Thread):
    """Delivers rows to one tracker."""

    def __init__(self, name: str, run: TrackedRun, uploads_checkpoint: bool, stop_request: StopRequest) -> None:
        super().__init__(name=f"tracker-{name}", daemon=True)
        self.run_id = self.key = ""
        self.tracker_name, self.run_info, self.uploads_checkpoint = name, run, uploads_checkpoint
        self.tracker: Tracker | None = None
        self.changed = threading.Condition()
        self.rows: list[dict[str, Any]] = []
        self.late_rows: list[dict[str, Any]] = []  # of the step at which workers resumed, reported after that
        self.due_late_rows: list[dict[str, Any]] = []  # those that are in a committed checkpoint
        self.resumed = -1
        self.missing_until = -1  # the last step of which rows may be missing there
        self.committed, self.delivered = -1, -1
        self.stop_request, self.closes_at = stop_request, 0.0  # by time.monotonic; 0: not requested
        self.is_complete = False  # all is delivered, and the tracker's run is closed
        self.last_checkpoint = ""  # of a finished run
        self.has_failed, self.problem = False, ""  # the last attempt, and what the console has not shown

    # --- called by the driver ---

    def restart(self, step: int) -> None:
        """Discards rows after the step at which workers resume."""
        with self.changed:
            self.rows = [row for row in self.rows if row["step"] <= step]
            self.late_rows = []
            self.committed = self.resumed = step
            self.changed.notify()
        if not self.ident:
            self.missing_until = step
            self.start()

    def add(self, *rows: dict[str, Any]) -> None:
        """Adds rows, which are delivered once their step is committed."""
        with self.changed:
            self.late_rows += [row for row in rows if row["step"] <= self.resumed]
            self.rows += [row for row in rows if row["step"] > self.resumed]
            if len(self.rows) > MAX_ROWS:
                self.rows, self.missing_until = [], self.rows[-1]["step"]

    def commit(self, step: int) -> None:
        """Records that a checkpoint of a step exists."""
        with self.changed:
            self.committed = step
            self.due_late_rows += self.late_rows
            self.late_rows = []
            self.changed.notify()

    def request_close(self) -> None:
        """Makes the thread deliver what is left within a time limit, and end."""
        timeout_s = FAILED_CLOSE_TIMEOUT_S if self.has_failed else CLOSE_TIMEOUT_S
        if self.stop_request.exit_code or not self.last_checkpoint:
            timeout_s = STOP_TIMEOUT_S
        with self.changed:
            self.closes_at = time.monotonic() + timeout_s
            self.changed.notify()

    def join_in_time(self) -> None:
        """Waits for the thread within the time limit."""
        if self.ident:
            self.join(max(0.0, self.closes_at - time.monotonic()))

    def report_rest(self) -> None:
        """Shows whether something is left."""
        if self.ident and not self.is_complete:
            rest = "until the end of the run" if self.last_checkpoint else "yet, but when the run is resumed"
            self.problem = self.problem or f"tracking.{self.tracker_name}: has not got all {rest}"

    # --- called in the thread ---

    def run(self) -> None:
        """Delivers until the run is closed; retries what fails."""
        delay_s = RETRY_S
        while True:
            with self.changed:
                self.changed.wait_for(self._has_work)
                is_closing, committed = bool(self.closes_at), self.committed
            try:
                self._deliver(committed)
                if is_closing:
                    self._close()
                    return
                self.has_failed, delay_s = False, RETRY_S
            except _Paused:
                if is_closing:
                    return
            except Exception as error:  # of any client
                self._report(error)
                if is_closing:
                    return
                with self.changed:
                    self.changed.wait_for(lambda: self.closes_at, delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_S)

    def _has_work(self) -> bool:
        is_late = self.committed > self.delivered or bool(self.due_late_rows)
        return bool(self.closes_at) or (is_late and not self.stop_request.exit_code)

    def _check_time(self) -> None:
        """Raises _Paused if a stop was requested and the run is not saved yet, or if the time limit has passed."""
        is_over = time.monotonic() > self.closes_at if self.closes_at else bool(self.stop_request.exit_code)
        if is_over:
            raise _Paused

    def _report(self, error: Exception) -> None:
        """Shows the first of some errors in a row, without credentials."""
        text = mask_credentials(" ".join(str(error).split()) or type(error).__name__)
        for secret in filter(None, map(os.environ.get, SECRETS)):
            text = text.replace(secret, "***")
        if not self.has_failed:
            problem = f"tracking.{self.tracker_name}: {type(error).__name__}: {text[:200]}"
            self.problem = problem if self.closes_at else f"{problem}; the run continues"
        self.has_failed = True

    def _deliver(self, committed: int) -> None:
        """Delivers all rows up to a step that were not delivered. What is left if it raises is in the run's files."""
        tracker = self.tracker or self._open()
        with self.changed:
            rows = [row for row in self.rows if row["step"] <= committed]
            self.rows = [row for row in self.rows if row["step"] > committed]
            late_rows, num_due = [*self.late_rows], len(self.due_late_rows)
            due_rows = [*self.due_late_rows] if self.delivered <= self.resumed else []
            is_complete = self.delivered >= self.missing_until
            self.missing_until = max(self.missing_until, committed)  # if the delivery fails
        if not is_complete:
            late = {_series(row) for row in [*late_rows, *due_rows]}
            folder = self.run_info.folder
            rows = [row for row in [*read_rows(folder), *read_samples(folder)] if _series(row) not in late]
        rows = [row for row in rows if row["step"] > self.delivered]
        records = step_records([*due_rows, *rows], committed)
        for start in range(0, len(records), BATCH_STEPS):
            batch = records[start : start + BATCH_STEPS]
            self._check_time()
            tracker.log(batch)
            self._store(batch[-1].step)
        self.delivered = max(self.delivered, committed)
        with self.changed:
            del self.due_late_rows[:num_due]

    def _open(self) -> Tracker:
        """Opens the tracker's run, whose identifier the run's folder has unless it is new, but always the key."""
        stored = self._read()
        self.run_id, self.key = stored["run"], stored.get("key") or uuid.uuid4().hex
        self._store(stored["step"])
        module = import_module(f"job.run.{self.tracker_name}_tracker")
        tracker: Tracker = module.create_tracker(self.run_info)
        self._check_time()
        self.run_id, last_step = tracker.open(self.run_id, self.key)
        self._store(stored["step"] if last_step is None else last_step)  # first: if the rest fails, it is no new run
        tracker.describe()
        self.tracker = tracker
        return tracker

    def _read(self) -> dict[str, Any]:
        try:
            data = (self.run_info.folder / TRACKING).read(f"{self.tracker_name}.json", 1 << 16)
            return parse_record(data, {"run": str, "step": int})
        except (OSError, ValueError):
            return {"run": "", "step": -1}

    def _store(self, step: int) -> None:
        """Stores the tracker's run and the last step that it has."""
        self.delivered = step
        data = json.dumps({"run": self.run_id, "key": self.key, "step": step}).encode()
        (self.run_info.folder / TRACKING).write(f"{self.tracker_name}.json", data)

    def _close(self) -> None:
        assert self.tracker
        self._check_time()
        if self.last_checkpoint and self.uploads_checkpoint:
            with _local_copy(self.run_info.folder, self.last_checkpoint) as path:
                self.tracker.upload(path)
        self.tracker.close(finished=bool(self.last_checkpoint))
        self.is_complete = True


def _series(row: dict[str, Any]) -> tuple[str, int]:
    """Returns what a row is of: its split or kind, and its step."""
    return row.get("split") or row["kind"], row["step"]


@contextmanager
def _local_copy(folder: Folder, name: str) -> Iterator[Path]:
    """Gives a folder inside the run's one as a local path."""
    for part in name.split("/"):
        folder /= part
    if folder.local_path:
        yield folder.local_path
        return
    with tempfile.TemporaryDirectory(prefix="lanes-") as copy:
        for file in folder.names():
            Path(copy, file).write_bytes(folder.read(file))
        yield Path(copy)
