"""What Ray does with a run's workers while none of them can speak: failures, and waiting for room."""

import itertools
import time
from typing import Any

from job import cluster  # isort: skip  first: it sets what Ray reads when it is imported
import ray
import ray.util
from ray.train.v2._internal.execution.callback import ControllerCallback

from job import autoscaler
from job.events import GroupEnded
from job.mailbox import sealed
from job.placement import Placement
from job.screen import Screen
from job.worker import in_a_line

FIRST, AGAIN = 10.0, 60.0  # seconds without workers after which it is said what is waited for


class Watch(ControllerCallback):
    """Tells the driver, from Ray's controller, of each end of a group of workers.

    Ray's public callback hears of workers that fail and not of those that cannot be started.
    """

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self.numbers = itertools.count()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called by Ray at each change of what it does with the workers."""
        kind = type(current_state).__name__
        if kind in ("RestartingState", "ReschedulingState", "ResizingState"):
            error = getattr(current_state, "training_failed_error", None)
            event = GroupEnded("", _fault(error))
            self.mailbox.post.remote("controller", next(self.numbers), sealed(event))


def _fault(error: Any) -> str:
    """What failed; nothing where the workers only lacked room for a time, or the group changes its size."""
    workers = getattr(error, "worker_failures", None)
    if workers:
        rank, first = sorted(workers.items())[0]
        cause = getattr(first, "health_check_failure", first)  # which Ray wraps where a worker is killed
        return f"worker {rank}: {in_a_line(cause)}"
    cause = getattr(error, "controller_failure", error)
    if cause is None or type(cause).__name__ == "WorkerGroupStartupTimeoutError":
        return ""
    return in_a_line(cause.__cause__ or cause)


class Waiting:
    """Says what a run waits for where no worker stands for some time, and says it again every minute."""

    def __init__(self, placement: Placement, screen: Screen) -> None:
        self.placement, self.screen = placement, screen
        self.next = time.monotonic() + FIRST

    def look(self, *, standing: bool) -> None:
        """To be called now and then."""
        now = time.monotonic()
        if standing:
            self.next = now + FIRST
        elif now >= self.next:
            self.next = now + AGAIN
            self._say()

    def _say(self) -> None:
        ours = ray.get_runtime_context().get_job_id()
        groups = [group for name, group in ray.util.placement_group_table().items() if name.endswith(ours)]
        # The driver of a search's trial has a group that is no worker's.
        if any(group["state"] == "CREATED" and "CPU" in next(iter(group["bundles"].values())) for group in groups):
            return  # workers have their place and are starting
        wanted = self.placement.min_workers
        lacking = wanted - min(wanted, self.placement.room(cluster.free()))
        more = "" if autoscaler.growth() == [] else "; the cluster's autoscaler is asked for more"
        self.screen.line(
            f"waiting for {lacking or wanted} of {wanted} workers: {self.placement.each}, and "
            f"{'that is not free' if lacking else 'Ray has not placed them yet'}{more}"
        )
