"""Starts a new run from a checkpoint of another run, which ``run.resume_from`` names.

The checkpoint is copied into the new run's folder, which then resumes from it as from one of its own. So the other run
is only read, and it may be removed afterwards.
"""

import json
from dataclasses import dataclass
from typing import Any

from job.config.compatibility import changed_fields, may_change
from job.config.field import format_value
from job.config.schema import Config
from job.data.dataset import Dataset
from job.documents import parse_record
from job.errors import UserError, error_origin
from job.run.run_dir import SEARCH_FILE, check_same_text, find_checkpoint
from job.storage import Folder
from job.training.checkpoint import (
    Checkpoint,
    copy_checkpoint,
    list_checkpoints,
    read_progress,
    read_stored_config,
    verify_checkpoint,
)
from job.training.loop import is_done

RECORD_FILE = "resumed_from.json"
_MAX_RECORD_BYTES = 1 << 20
_RECORD_TYPES = {"checkpoint": str, "step": int, "changed": dict}


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint that a new run starts from, and the configuration that is stored with it."""

    checkpoint: Checkpoint
    config: Config

    def check(self, config: Config) -> None:
        """Raises UserError if a run of this configuration cannot start from the checkpoint."""
        changed = changed_fields(self.config, config)
        fixed = {name: values for name, values in changed.items() if not may_change(name, self.config, config)}
        with error_origin(f"run.resume_from = {config.run.resume_from}"):
            if fixed:
                raise UserError(
                    f"a run from it cannot have another {describe_changes(fixed)}", "leave out what differs"
                )
            progress, _ = read_progress(self.checkpoint)
            if is_done(progress, config.train):
                problem = f"nothing is left to train after epoch {progress.epoch:,}, step {progress.step:,}"
                raise UserError(problem, "raise train.epochs, train.max_steps or train.patience")

    def record(self, config: Config) -> dict[str, Any]:
        """Returns what is stored about the start of a run of this configuration."""
        changed = {name: list(values) for name, values in changed_fields(self.config, config).items()}
        return {"checkpoint": self.checkpoint.path.address, "step": self.checkpoint.step, "changed": changed}


def open_source_checkpoint(config: Config, dataset: Dataset, folder: Folder) -> SourceCheckpoint | None:
    """Returns the checkpoint that a new run starts from, of which every byte is verified.

    Args:
        config: of the new run
        dataset: of the new run
        folder: of the new run; nothing is written to it

    Returns:
        None if ``run.resume_from`` is empty, or not needed any more because the run has a checkpoint of its own

    Raises:
        UserError: there is no valid checkpoint, or the new run cannot start from it
    """
    if not config.run.resume_from or any(list_checkpoints(folder / "checkpoints")):
        return None
    path = Folder.resolve(config.run.resume_from)
    with error_origin(f"run.resume_from = {config.run.resume_from}"):
        if path.has(SEARCH_FILE):
            raise UserError("is a search and not a run", "give one of the runs in its folder trials")
        checkpoint = find_checkpoint(path, verify_checkpoint)
        source = SourceCheckpoint(checkpoint, read_stored_config(checkpoint))
        check_same_text([checkpoint], dataset)
    source.check(config)
    return source


def import_source_checkpoint(source: SourceCheckpoint, config: Config, folder: Folder) -> None:
    """Copies the checkpoint into the folder of the new run, and stores where it came from."""
    folder.write(RECORD_FILE, json.dumps(source.record(config), indent=1).encode())
    copy_checkpoint(source.checkpoint, folder / "checkpoints")


def read_record(folder: Folder) -> dict[str, Any] | None:
    """Returns what ``import_source_checkpoint`` stored. None if there is nothing, or if it is damaged."""
    try:
        return parse_record(folder.read(RECORD_FILE, _MAX_RECORD_BYTES), _RECORD_TYPES)
    except (OSError, ValueError):
        return None


def describe_changes(changed: dict[str, Any]) -> str:
    """Returns changed fields as ``field (old → new), …``."""
    return ", ".join(f"{name} ({format_value(old)} → {format_value(new)})" for name, (old, new) in changed.items())
