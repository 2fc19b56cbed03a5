"""A run in the caller's own process, without a cluster: one worker that holds all lanes."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from job.config.schema import Config
from job.console import Console
from job.distributed.context import World, available_cpus
from job.distributed.gradient_sync import ControlFlags
from job.errors import RunFailed, UserError
from job.run.driver import RunWorkers
from job.run.recorder import Recorder
from job.run.signals import StopRequest
from job.training.events import Event
from job.training.run_spec import RunSpec
from job.training.trainer import train


@contextmanager
def launch_local(config: Config, _: Console) -> Iterator[RunWorkers]:
    """A launcher for ``scale.workers = 0``."""
    has_gpu = torch.cuda.is_available()
    if config.scale.gpu_requirement and not has_gpu:
        raise UserError(f"{config.scale.gpu_requirement}: this machine has no GPU that torch can use; leave it out")
    device = torch.device("cuda" if has_gpu and config.scale.accelerator != "cpu" else "cpu")
    world = World(0, 1, device, config.scale.cpus_per_worker or available_cpus(), uuid.uuid4().hex[:8])

    def follow(spec: RunSpec, recorder: Recorder, stop_request: StopRequest) -> None:
        try:
            train(spec, world, _Link(recorder, stop_request))
        except RunFailed:
            raise
        except Exception as error:
            raise RunFailed(f"{type(error).__name__}: {error}") from error

    yield follow


class _Link:
    """Worker and driver are one process: events go straight to the recorder.

    They come from the loop and from the thread that writes checkpoints.
    """

    def __init__(self, recorder: Recorder, stop_request: StopRequest) -> None:
        self.recorder, self.stop_request = recorder, stop_request
        self.lock = threading.Lock()

    def post(self, event: Event) -> None:
        with self.lock:
            self.recorder.handle(event)

    def signals(self) -> ControlFlags:
        save, self.stop_request.save = self.stop_request.save, False
        return ControlFlags(checkpoint=save, stop=bool(self.stop_request.status))

    def preemption_pending(self) -> bool:
        return False
