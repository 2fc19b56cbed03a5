"""A run in the caller's own process, without a cluster: one worker that holds all lanes."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from job.config import Config
from job.driver import Follow, Wishes
from job.errors import RunFailed, UserError
from job.events import Event
from job.gradients import Signals
from job.record import Recorder
from job.screen import Screen
from job.trainer import Plan, train
from job.world import World, cores


@contextmanager
def launch(options: Config, _: Screen) -> Iterator[Follow]:
    """A launcher for ``scale.workers = 0``."""
    has_gpu = torch.cuda.is_available()
    if options.scale.gpu_wish and not has_gpu:
        raise UserError(f"{options.scale.gpu_wish}: this machine has no GPU that torch can use; leave it out")
    device = torch.device("cuda" if has_gpu and options.scale.accelerator != "cpu" else "cpu")
    world = World(0, 1, device, options.scale.cpus_per_worker or cores(), uuid.uuid4().hex[:8])

    def follow(plan: Plan, tokens: np.ndarray, recorder: Recorder, wishes: Wishes) -> None:
        try:
            train(plan, tokens, world, _Link(recorder, wishes))
        except RunFailed:
            raise
        except Exception as error:
            raise RunFailed(f"{type(error).__name__}: {error}") from error

    yield follow


class _Link:
    """Worker and driver are one process: events go straight to the recorder.

    They come from the loop and from the thread that writes checkpoints.
    """

    def __init__(self, recorder: Recorder, wishes: Wishes) -> None:
        self.recorder, self.wishes = recorder, wishes
        self.lock = threading.Lock()

    def post(self, event: Event) -> None:
        with self.lock:
            self.recorder.handle(event)

    def signals(self) -> Signals:
        save, self.wishes.save = self.wishes.save, False
        return Signals(checkpoint=save, stop=bool(self.wishes.status))

    def leaving(self) -> bool:
        return False
