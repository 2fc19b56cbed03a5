"""Which checkpoint a worker group resumes from, and its content."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from job.distributed.collectives import broadcast_json, broadcast_tensors, gather_json
from job.distributed.context import World, resolve_precision
from job.errors import UserError
from job.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    CorruptCheckpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    read_checkpoint_file,
    read_progress,
    verify_checkpoint,
)
from job.training.progress import Progress
from job.training.run_spec import RunSpec
from job.training.tensor_file import read_tensors

CHECKPOINT_SCAN_TIMEOUT_S = 1800.0  # seconds to verify a checkpoint, which may be large and in a slow store


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint's content, except for the lanes' state."""

    checkpoint: Checkpoint
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]  # empty without an average, or if it is not of the kind of the run
    progress: Progress
    precision: str


def agree_on_resume_point(spec: RunSpec, world: World) -> tuple[ResumePoint | None, tuple[CorruptCheckpoint, ...], str]:
    """Finds the last checkpoint of which every byte is valid; all workers must call it.

    Rank 0 lists the checkpoints, since the workers may see the storage at different times, reads the weights and the
    optimizer's state, and sends them to all. Each worker verifies some of the files with the state of lanes.

    Returns:
        the checkpoint's content, or None for a new run; the later checkpoints, which are corrupt; and the precision

    Raises:
        UserError: all checkpoints are corrupt, and only a person may decide to start over
        OSError: the checkpoints cannot be read now
        RuntimeError: this worker does not see a checkpoint that rank 0 sees
    """
    timeout = timedelta(seconds=CHECKPOINT_SCAN_TIMEOUT_S)
    group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
    checkpoints, corrupt = _list_on_rank_0(spec, world, group)
    resume_point, skipped = load_latest(checkpoints, corrupt, lambda checkpoint: _load(checkpoint, spec, world, group))
    if skipped and not resume_point:
        raise UserError(f"{spec.checkpoints}: no valid checkpoint: {skipped[0]}", "remove the folder to start over")
    precision = resume_point.precision if resume_point else spec.config.train.precision
    precision = broadcast_json(resolve_precision(precision, world.device).name, group)  # the hardware may differ
    if group:
        dist.destroy_process_group(group)
    return resume_point, skipped, precision


def _list_on_rank_0(
    spec: RunSpec, world: World, group: dist.ProcessGroup | None
) -> tuple[list[Checkpoint], list[CorruptCheckpoint]]:
    folder = spec.checkpoints
    checkpoints, corrupt = list_checkpoints(folder) if world.rank == 0 else ([], [])
    fields = [(valid.name, valid.step, valid.files, valid.validation_nats) for valid in checkpoints]
    reasons = [(error.name, error.reason) for error in corrupt]
    fields, reasons = broadcast_json((fields, reasons), group)
    return [Checkpoint(folder, *values) for values in fields], [
        CorruptCheckpoint(folder / name, reason) for name, reason in reasons
    ]


def _load(checkpoint: Checkpoint, spec: RunSpec, world: World, group: dist.ProcessGroup | None) -> ResumePoint:
    """Loads a checkpoint on all workers; raises CorruptCheckpoint on all if a file is not valid."""
    if world.rank and not checkpoint.path.has(MANIFEST):
        raise RuntimeError(f"{checkpoint.path}: worker {world.rank} does not see it; do all nodes mount this storage?")
    lanes_files = sorted(file for file in checkpoint.files if file.startswith("lanes-"))
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}
    reason = ""
    try:
        progress, metadata = read_progress(checkpoint)
        verify_checkpoint(checkpoint, lanes_files[world.rank :: world.size])
        if world.rank == 0:
            loaded = load_checkpoint(checkpoint)
            weights = loaded.weights
            if loaded.config.optimizer.averaging == spec.config.optimizer.averaging:
                average = loaded.average
            optimizer, _ = read_checkpoint_file(checkpoint, "optimizer.safetensors", read_tensors)
    except CorruptCheckpoint as error:
        reason = error.reason
    if reasons := [*filter(None, gather_json(reason, group))]:
        raise CorruptCheckpoint(checkpoint.path, reasons[0])
    weights, optimizer, average = (broadcast_tensors(tensors, group) for tensors in (weights, optimizer, average))
    return ResumePoint(checkpoint, weights, optimizer, average, progress, metadata["precision"])
