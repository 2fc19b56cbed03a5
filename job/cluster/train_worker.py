"""The function that Ray Train runs on each worker, and the worker's tie to its driver."""

import itertools
import re
import threading
import uuid
from collections import deque
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist

from job.cluster.event_channel import dumps, loads
from job.distributed.context import World
from job.distributed.gradient_sync import ControlFlags
from job.training.events import Crashed, Event
from job.training.run_spec import RunSpec
from job.training.trainer import train


class _RayDriverLink:
    """A worker's tie to its driver through the mailbox."""

    def __init__(self, event_channel: Any, rank: int) -> None:
        self.event_channel = event_channel
        self.name = uuid.uuid4().hex
        self.sent: deque[Any] = deque(maxlen=100)  # calls, of which the last ones may not have arrived
        self.numbers = itertools.count()
        self.lock = threading.Lock()
        self.wanted = ControlFlags()
        if rank == 0:  # one worker's word is everybody's: signals are added up over all
            threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        seen = 0
        while True:
            try:
                orders = [loads(order) for order in ray.get(self.event_channel.orders_after.remote(seen))]
            except Exception:  # the driver is gone, and with it soon this process
                return
            seen += len(orders)
            with self.lock:
                for order in orders:
                    self.wanted = ControlFlags(*(a or b for a, b in zip(self.wanted, order, strict=True)))

    def post(self, event: Event) -> None:
        with self.lock:  # the loop posts, and the thread that writes checkpoints
            self.sent.append(self.event_channel.post.remote(self.name, next(self.numbers), dumps(event)))

    def flush(self) -> None:
        """Waits until all events have arrived."""
        ray.get([*self.sent])

    def signals(self) -> ControlFlags:
        with self.lock:
            asked, self.wanted = self.wanted, self.wanted._replace(checkpoint=False)
        return asked

    def preemption_pending(self) -> bool:
        return ray.train.get_preemption_info() is not None


def train_worker(task: dict[str, Any]) -> None:
    """One worker of the group: finds its place, takes its lanes, and trains.

    ``task`` holds ``spec`` (a reference into the object store), ``mailbox`` and ``threads``.
    """
    if ray.get(task["mailbox"].is_over.remote()):
        return
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    link = _RayDriverLink(task["mailbox"], rank)
    attempt = ""
    try:
        attempt = _broadcast_attempt(size)
        world = World(rank, size, ray.train.torch.get_device(), task["threads"], attempt)
        spec: RunSpec = ray.get(task["spec"])
        train(spec, world, link)
    except Exception as error:
        link.post(Crashed(attempt, f"worker {rank} of {size} ended: {one_line(error)}"))
        raise
    finally:
        link.flush()


def one_line(error: BaseException) -> str:
    """What went wrong, without the places in torch's source that its messages begin with."""
    first = str(error).partition("\n")[0]
    said = re.sub(r"\[\S+/\S+:\d+\] ", "", first.rpartition("RuntimeError: ")[2])
    return f"{type(error).__name__}: {said.partition('. This is')[0]}"[:200]


def _broadcast_attempt(size: int) -> str:
    """A name for this group of workers that none before it had."""
    name = [uuid.uuid4().hex[:8]]
    if size > 1:
        dist.broadcast_object_list(name)
    return name[0]
