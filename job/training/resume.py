"""Which checkpoint a worker group resumes from."""

from datetime import timedelta

import torch.distributed as dist

from job.distributed.collectives import broadcast_json
from job.distributed.context import World, resolve_precision
from job.errors import UserError
from job.training.checkpoint import (
    CorruptCheckpoint,
    LoadedCheckpoint,
    find_latest_valid,
    load_checkpoint,
    read_manifest,
)
from job.training.run_spec import RunSpec

CHECKPOINT_SCAN_TIMEOUT_S = 1800.0  # seconds for rank 0 to verify checkpoints, which may be many parts in a slow store


def agree_on_resume_point(
    spec: RunSpec, world: World
) -> tuple[LoadedCheckpoint | None, tuple[CorruptCheckpoint, ...], str]:
    """Lets rank 0 decide where all workers start; all must call it.

    Rank 0 decides because the workers may see the storage at different times and run on different hardware.

    Returns:
        the checkpoint's content, or None for a new run; the later checkpoints, which are corrupt; and the precision

    Raises:
        UserError: all checkpoints are corrupt, and only a person may decide to start over
        OSError: the checkpoints cannot be read now
    """
    loaded, decision = None, None
    if world.rank == 0:
        loaded, skipped = find_latest_valid(spec.checkpoints)
        if skipped and not loaded:
            raise UserError(f"{spec.checkpoints}: no valid checkpoint: {skipped[0]}", "remove the folder to start over")
        precision = loaded.metadata["precision"] if loaded else spec.config.train.precision
        reasons = [(corrupt.name, corrupt.reason) for corrupt in skipped]
        name = loaded.checkpoint.name if loaded else None
        decision = name, reasons, resolve_precision(precision, world.device).name
    if world.size > 1:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=CHECKPOINT_SCAN_TIMEOUT_S))
        decision = broadcast_json(decision, group)
        dist.destroy_process_group(group)
    assert decision
    name, reasons, precision = decision
    if name and not loaded:
        loaded = load_checkpoint(read_manifest(spec.checkpoints, name))
    return loaded, tuple(CorruptCheckpoint(spec.checkpoints / name, reason) for name, reason in reasons), precision
