"""The notice while a run waits for resources for its workers."""

import time

from job.cluster.connection import query_autoscaler
from job.cluster.ray_extensions import free_resources, workers_are_placed
from job.cluster.resources import Placement
from job.console import Console

FIRST_NOTICE_S, REPEAT_NOTICE_S = 10.0, 60.0  # seconds without workers until the first, and between notices


class WaitingNotice:
    """Prints what a run waits for if it has had no workers for some time, and repeats it every minute."""

    def __init__(self, placement: Placement, console: Console) -> None:
        self.placement, self.console = placement, console
        self.next_notice_at = time.monotonic() + FIRST_NOTICE_S

    def poll(self, *, has_workers: bool) -> None:
        """Prints the notice if it is due. To be called about once a second."""
        now = time.monotonic()
        if has_workers:
            self.next_notice_at = now + FIRST_NOTICE_S
        elif now >= self.next_notice_at:
            self.next_notice_at = now + REPEAT_NOTICE_S
            if not workers_are_placed():
                self._print()

    def _print(self) -> None:
        needed = self.placement.min_workers
        missing = max(0, needed - self.placement.capacity(free_resources()))
        reason = "not enough resources are free" if missing else "Ray has not placed them yet"
        growth = "; the autoscaler has been asked for more nodes" if query_autoscaler() != [] else ""
        self.console.print(
            f"waiting for {missing or needed} of {needed} workers ({self.placement.describe()}): {reason}{growth}"
        )
