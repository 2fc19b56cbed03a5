"""What Ray does with a run's workers while none of them can speak: failures, and waiting for room."""

import itertools
import time
from typing import Any

import ray
import ray.util
from ray.train.v2._internal.execution.callback import ControllerCallback

from job.cluster.autoscaler import scalable_node_types
from job.cluster.connection import free_resources
from job.cluster.event_channel import dumps
from job.cluster.resources import Placement
from job.cluster.train_worker import one_line
from job.console import Console
from job.training.events import WorkerGroupEnded

FIRST_NOTICE_S, REPEAT_NOTICE_S = 10.0, 60.0  # seconds without workers after which it is said what is waited for


class WorkerGroupFailureCallback(ControllerCallback):
    """Tells the driver, from Ray's controller, of each end of a group of workers.

    Ray's public callback hears of workers that fail and not of those that cannot be started.
    """

    def __init__(self, event_channel: Any) -> None:
        self.event_channel = event_channel
        self.numbers = itertools.count()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called by Ray at each change of what it does with the workers."""
        kind = type(current_state).__name__
        if kind in ("RestartingState", "ReschedulingState", "ResizingState"):
            error = getattr(current_state, "training_failed_error", None)
            event = WorkerGroupEnded("", _describe_failure(error))
            self.event_channel.post.remote("controller", next(self.numbers), dumps(event))


def _describe_failure(error: Any) -> str:
    """What failed; nothing where the workers only lacked room for a time, or the group changes its size."""
    workers = getattr(error, "worker_failures", None)
    if workers:
        rank, first = sorted(workers.items())[0]
        cause = getattr(first, "health_check_failure", first)  # which Ray wraps where a worker is killed
        return f"worker {rank}: {one_line(cause)}"
    cause = getattr(error, "controller_failure", error)
    if cause is None or type(cause).__name__ == "WorkerGroupStartupTimeoutError":
        return ""
    return one_line(cause.__cause__ or cause)


class WaitingNotice:
    """Says what a run waits for where no worker stands for some time, and says it again every minute."""

    def __init__(self, placement: Placement, console: Console) -> None:
        self.placement, self.console = placement, console
        self.next = time.monotonic() + FIRST_NOTICE_S

    def look(self, *, standing: bool) -> None:
        """To be called now and then."""
        now = time.monotonic()
        if standing:
            self.next = now + FIRST_NOTICE_S
        elif now >= self.next:
            self.next = now + REPEAT_NOTICE_S
            self._say()

    def _say(self) -> None:
        ours = ray.get_runtime_context().get_job_id()
        groups = [group for name, group in ray.util.placement_group_table().items() if name.endswith(ours)]
        # The driver of a search's trial has a group that is no worker's.
        if any(group["state"] == "CREATED" and "CPU" in next(iter(group["bundles"].values())) for group in groups):
            return  # workers have their place and are starting
        wanted = self.placement.min_workers
        lacking = wanted - min(wanted, self.placement.room(free_resources()))
        more = "" if scalable_node_types() == [] else "; the cluster's autoscaler is asked for more"
        self.console.print(
            f"waiting for {lacking or wanted} of {wanted} workers: {self.placement.each}, and "
            f"{'that is not free' if lacking else 'Ray has not placed them yet'}{more}"
        )
