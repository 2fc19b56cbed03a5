"""Writes checkpoints in the background."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from job.distributed.context import World
from job.nn.state import map_state
from job.training.checkpoint import (
    checkpoint_name,
    serialize_lane_state,
    serialize_model,
    write_part,
)
from job.training.events import EventSink, PartWritten
from job.training.loop import TrainState
from job.training.optimizer import state_tensors
from job.training.run_spec import RunSpec


class CheckpointWriter:
    """Writes this worker's parts in the background; the loop waits for a copy in memory only."""

    def __init__(self, spec: RunSpec, world: World, post: EventSink, precision: str) -> None:
        self.spec, self.world, self.post = spec, world, post
        self.metadata = {"precision": precision, "corpus": spec.dataset.metadata}
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        self.last = -1  # the step of the last save

    def save(self, train_state: TrainState) -> None:
        """Copies what is to be saved and has it written; waits for the save before, if it still runs."""
        self.finish()
        weights = {name: weight.detach().clone() for name, weight in train_state.model.state_dict().items()}
        if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
            return  # the next step's loss ends the run, which keeps the checkpoint before
        state = map_state(lambda part: part.to("cpu", copy=True), train_state.state)
        moments = state_tensors(train_state.optimizer, train_state.model)
        moments = {name: tensor.to("cpu", copy=True) for name, tensor in moments.items()}
        progress = copy.deepcopy(train_state.progress)
        self.last = progress.step

        def write() -> None:
            files = serialize_lane_state(train_state.share.lanes, state)
            if self.world.rank == 0:
                on_cpu = {name: weight.cpu() for name, weight in weights.items()}
                files |= serialize_model(
                    self.spec.config, self.spec.dataset.vocabulary, on_cpu, moments, progress, self.metadata
                )
            name = checkpoint_name(progress.step, self.world.attempt)
            receipt = write_part(
                self.spec.checkpoints, name, files, self.world.size, None if self.world.rank else progress
            )
            self.post(PartWritten(self.world.attempt, receipt))

        self.pending = self.thread.submit(write)

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return bool(self.pending and not self.pending.done())

    def finish(self) -> None:
        """Waits for the save that runs; OSError if it failed."""
        if self.pending:
            self.pending.result()
            self.pending = None
