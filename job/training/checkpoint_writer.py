"""Writes checkpoints in the background."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from job.distributed.context import World
from job.kernels.memory import release_memory
from job.nn.state import map_state
from job.storage import MAX_RETRY_S
from job.training.checkpoint import checkpoint_name, serialize_lane_state, serialize_model, write_part
from job.training.events import EventSink, PartWritten
from job.training.optimizer import optimizer_tensors
from job.training.run_spec import RunSpec
from job.training.train_state import TrainState


@dataclass
class CheckpointWriter:
    """Writes this worker's parts of checkpoints in a thread, so that training only waits for a copy in memory."""

    spec: RunSpec
    world: World
    post: EventSink
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    pending: Future[None] | None = None
    last_step: int = -1  # of the last save
    group: dist.ProcessGroup | None = None  # of all workers, if there are several

    def __post_init__(self) -> None:
        if self.world.size > 1:
            timeout = timedelta(seconds=self.spec.config.scale.hang_timeout + 2 * MAX_RETRY_S)
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def save(self, train_state: TrainState) -> None:
        """Copies the training state and starts writing it, after all workers have finished the previous save.

        Does nothing if a weight is not finite: the loss of the next step will end the run, and the checkpoint before
        must remain the last one.

        Raises:
            OSError: the previous save failed
        """
        self.wait_for_all()
        model, progress = train_state.model, copy.deepcopy(train_state.progress)
        if not all(bool(torch.isfinite(weight).all()) for weight in model.state_dict().values()):
            return
        self.last_step = progress.step
        release_memory()  # for the copies
        lanes, precision = train_state.assignment.lanes, train_state.precision.name
        lane_state = map_state(_copy_to_cpu, train_state.lane_state)
        parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(train_state.optimizer, model)}
        if train_state.average:
            parts["average"] = train_state.average.averaged.state_dict()
        tensors = {
            part: {name: _copy_to_cpu(tensor) for name, tensor in parts[part].items()}
            for part in (parts if self.world.rank == 0 else ())
        }

        def write() -> None:
            files = serialize_lane_state(lanes, lane_state)
            if tensors:
                files |= serialize_model(self.spec, precision, progress, tensors)
            name = checkpoint_name(progress.step, self.world.attempt)
            rank_0_progress = None if self.world.rank else progress
            receipt = write_part(self.spec.checkpoints, name, files, self.world.size, rank_0_progress)
            self.post(PartWritten(self.world.attempt, receipt))

        self.pending = self.thread.submit(write)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return bool(self.pending and not self.pending.done())

    def wait_for_all(self) -> None:
        """Waits for the current saves of all workers, which must all call it; raises OSError if this one's failed.

        A save that is retried may take longer than ``scale.hang_timeout``, after which workers that wait for an
        exchange of gradients give up.
        """
        self.finish()
        if self.group:
            dist.barrier(self.group)

    def finish(self) -> None:
        """Waits for the current save; raises OSError if it failed."""
        if self.pending:
            self.pending.result()
            self.pending = None


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
