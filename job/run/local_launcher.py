"""Runs the training in the caller's own process, without a cluster: one worker that holds all lanes."""

import threading
import uuid

from job.console import Console
from job.distributed.context import World, available_cpus, local_device, release_freed_memory
from job.distributed.gradient_sync import ControlFlags
from job.errors import RunFailed
from job.inference.training_samples import generate_samples
from job.kernels.memory import release_memory
from job.run.estimate import check_workers
from job.run.recorder import Recorder
from job.run.signals import StopRequest
from job.training.events import Event
from job.training.run_spec import RunSpec
from job.training.trainer import train


class LocalLauncher:
    """The launcher for ``scale.workers = 0``."""

    is_local = True

    def connect(self, spec: RunSpec, console: Console) -> None:
        """Raises UserError if this machine lacks the cores or the memory, or a GPU that the configuration requires."""
        config = spec.config
        check_workers(spec)
        local_device(config.scale)

    def run(self, spec: RunSpec, recorder: Recorder, stop_request: StopRequest) -> None:
        """Trains until the run is over. Raises RunFailed if the training raises."""
        scale = spec.config.scale
        world = World(0, 1, local_device(scale), scale.cpus_per_worker or available_cpus(), uuid.uuid4().hex[:8])
        try:
            train(spec, world, _LocalLink(recorder, stop_request), generate_samples)
        except RunFailed:
            raise
        except Exception as error:
            raise RunFailed(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Returns the memory of the training to the system."""
        release_memory()
        release_freed_memory()


class _LocalLink:
    """Passes events straight to the recorder, since worker and driver are one process.

    They come from two threads, the training loop and the checkpoint writer; hence the lock.
    """

    def __init__(self, recorder: Recorder, stop_request: StopRequest) -> None:
        self.recorder, self.stop_request = recorder, stop_request
        self.lock = threading.Lock()

    def post(self, event: Event) -> None:
        with self.lock:
            self.recorder.handle(event)

    def control_flags(self) -> ControlFlags:
        return ControlFlags(
            checkpoint=self.stop_request.pop_checkpoint_request(), stop=bool(self.stop_request.exit_code)
        )

    def preemption_pending(self) -> bool:
        return False
