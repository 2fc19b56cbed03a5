"""The function that Ray Train runs on each worker, and the worker's connection to its driver."""

import itertools
import re
import threading
import uuid
from collections import deque
from typing import Any

import ray
import ray.train
import torch
from ray.cloudpickle import dumps
from ray.train.torch import get_device

from job.distributed.collectives import broadcast_json
from job.distributed.context import World
from job.distributed.gradient_sync import ControlFlags
from job.inference.training_samples import generate_samples
from job.training.events import Crashed, Event
from job.training.run_spec import RunSpec
from job.training.trainer import train

MAX_CALLS_IN_FLIGHT = 100  # calls to the channel that may not have arrived yet


class _RayDriverLink:
    """A worker's connection to its driver through the event channel."""

    def __init__(self, event_channel: Any) -> None:
        self.event_channel = event_channel
        self.sender = uuid.uuid4().hex
        self.calls: deque[Any] = deque(maxlen=MAX_CALLS_IN_FLIGHT)
        self.sequence = itertools.count()
        self.lock = threading.Lock()
        self.flags = ControlFlags()

    def receive_requests(self) -> None:
        """Runs in a thread until the driver, and with it the channel, has ended."""
        known = (0, 0)
        while True:
            try:
                requests = ray.get(self.event_channel.wait_for_requests.remote(known))
            except Exception:
                return
            checkpoint, stop = (new > old for new, old in zip(requests, known, strict=True))
            known = requests
            with self.lock:
                self.flags = ControlFlags(self.flags.checkpoint or checkpoint, self.flags.stop or stop)

    def post(self, event: Event) -> None:
        with self.lock:  # the training loop posts, and the thread that writes checkpoints
            call = self.event_channel.post.remote(self.sender, next(self.sequence), dumps(event))
            self.calls.append(call)

    def flush(self) -> None:
        """Waits until all events have arrived."""
        ray.get([*self.calls])

    def control_flags(self) -> ControlFlags:
        with self.lock:
            flags, self.flags = self.flags, self.flags._replace(checkpoint=False)
        return flags

    def preemption_pending(self) -> bool:
        return ray.train.get_preemption_info() is not None


def train_worker(task: dict[str, Any]) -> None:
    """Trains on one worker of the group. Called by Ray Train, again after each restart; ``train`` then resumes.

    Args:
        task: ``spec`` (a reference to the RunSpec in the object store), ``event_channel`` (the actor) and
            ``threads`` (per worker)
    """
    event_channel = task["event_channel"]
    if ray.get(event_channel.is_closed.remote()):
        return
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    link = _RayDriverLink(event_channel)
    if rank == 0:  # control flags are summed over workers, so one worker is enough
        threading.Thread(target=link.receive_requests, daemon=True).start()
    attempt = ""
    try:
        attempt = broadcast_json(uuid.uuid4().hex[:8])  # drawn by rank 0
        world = World(rank, world_size, worker_device(), task["threads"], attempt)
        spec: RunSpec = ray.get(task["spec"])
        train(spec, world, link, generate_samples)
    except Exception as error:
        link.post(Crashed(attempt, f"worker {rank} of {world_size} failed: {one_line(error)}"))
        raise
    finally:
        link.flush()


def worker_device() -> torch.device:
    """Returns the GPU that Ray has assigned to this worker, or the CPU if there is none or torch cannot use it."""
    return get_device() if torch.cuda.is_available() else torch.device("cpu")


def one_line(error: BaseException) -> str:
    """The class and the first line of an error, without the source locations that torch puts in front."""
    first_line = str(error).partition("\n")[0]
    message = re.sub(r"\[\S+/\S+:\d+\] ", "", first_line.rpartition("RuntimeError: ")[2])
    return f"{type(error).__name__}: {message.partition('. This is')[0]}"[:200]
