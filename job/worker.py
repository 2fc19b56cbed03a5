"""The function that Ray Train runs on each worker, and the worker's tie to its driver."""

import itertools
import re
import threading
import uuid
from collections import deque
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch.distributed as dist

from job import trainer
from job.events import Crashed, Event
from job.gradients import Signals
from job.mailbox import opened, sealed
from job.trainer import Plan
from job.world import World


class _RayLink:
    """A worker's tie to its driver through the mailbox."""

    def __init__(self, mailbox: Any, rank: int) -> None:
        self.mailbox = mailbox
        self.name = uuid.uuid4().hex
        self.sent: deque[Any] = deque(maxlen=100)  # calls, of which the last ones may not have arrived
        self.numbers = itertools.count()
        self.lock = threading.Lock()
        self.wanted = Signals()
        if rank == 0:  # one worker's word is everybody's: signals are added up over all
            threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        seen = 0
        while True:
            try:
                orders = [opened(order) for order in ray.get(self.mailbox.orders_after.remote(seen))]
            except Exception:  # the driver is gone, and with it soon this process
                return
            seen += len(orders)
            with self.lock:
                for order in orders:
                    self.wanted = Signals(*(a or b for a, b in zip(self.wanted, order, strict=True)))

    def post(self, event: Event) -> None:
        with self.lock:  # the loop posts, and the thread that writes checkpoints
            self.sent.append(self.mailbox.post.remote(self.name, next(self.numbers), sealed(event)))

    def flush(self) -> None:
        """Waits until all events have arrived."""
        ray.get([*self.sent])

    def signals(self) -> Signals:
        with self.lock:
            asked, self.wanted = self.wanted, self.wanted._replace(checkpoint=False)
        return asked

    def leaving(self) -> bool:
        return ray.train.get_preemption_info() is not None


def train_worker(task: dict[str, Any]) -> None:
    """One worker of the group: finds its place, takes its lanes, and trains.

    ``task`` holds ``plan``, ``tokens`` (a reference into the object store), ``mailbox`` and
    ``threads``.
    """
    if ray.get(task["mailbox"].is_over.remote()):
        return
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    link = _RayLink(task["mailbox"], rank)
    attempt = ""
    try:
        attempt = _agreed_attempt(size)
        world = World(rank, size, ray.train.torch.get_device(), task["threads"], attempt)
        plan: Plan = task["plan"]
        tokens: np.ndarray = ray.get(task["tokens"])
        trainer.train(plan, tokens, world, link)
    except Exception as error:
        link.post(Crashed(attempt, f"worker {rank} of {size} ended: {in_a_line(error)}"))
        raise
    finally:
        link.flush()


def in_a_line(error: Exception) -> str:
    """What went wrong, without the places in torch's source that its messages begin with."""
    first = str(error).partition("\n")[0]
    said = re.sub(r"\[\S+/\S+:\d+\] ", "", first.rpartition("RuntimeError: ")[2])
    return f"{type(error).__name__}: {said.partition('. This is')[0]}"[:200]


def _agreed_attempt(size: int) -> str:
    """A name for this group of workers that none before it had."""
    name = [uuid.uuid4().hex[:8]]
    if size > 1:
        dist.broadcast_object_list(name)
    return name[0]
