"""Which checkpoint a worker group resumes from."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from job.distributed.context import World, resolve_precision
from job.errors import UserError
from job.training.checkpoint import Checkpoint, CorruptCheckpoint, LoadedCheckpoint, find_latest_valid, load_checkpoint
from job.training.run_spec import RunSpec

CHECKPOINT_SCAN_TIMEOUT_S = 1800.0  # seconds for rank 0 to verify checkpoints, which may be many parts in a slow store


@dataclass(frozen=True)
class ResumePoint:
    """Where a worker group starts."""

    checkpoint: Checkpoint | None  # None: a new run
    skipped_checkpoints: tuple[CorruptCheckpoint, ...]  # later than ``checkpoint``
    precision: str


def agree_on_resume_point(spec: RunSpec, world: World) -> tuple[ResumePoint, LoadedCheckpoint | None]:
    """Lets rank 0 decide where all workers start; all must call it. Also returns the checkpoint's content.

    Rank 0 decides because the workers may see the storage at different times and run on different hardware.

    Raises:
        UserError: all checkpoints are corrupt, and only a person may decide to start over
        OSError: the checkpoints cannot be read now
    """
    loaded = None
    decision: list[ResumePoint | None] = [None]
    if world.rank == 0:
        loaded, skipped = find_latest_valid(spec.checkpoints)
        if skipped and not loaded:
            raise UserError(f"{spec.checkpoints}: no valid checkpoint: {skipped[0]}", "remove the folder to start over")
        precision = loaded.metadata["precision"] if loaded else spec.config.train.precision
        precision = resolve_precision(precision, world.device).name
        decision = [ResumePoint(loaded.checkpoint if loaded else None, skipped, precision)]
    if world.size > 1:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=CHECKPOINT_SCAN_TIMEOUT_S))
        dist.broadcast_object_list(decision, group=group)
        dist.destroy_process_group(group)
    [resume_point] = decision
    assert resume_point
    if resume_point.checkpoint and not loaded:
        loaded = load_checkpoint(resume_point.checkpoint)
    return resume_point, loaded
