"""Weights & Biases: a run of a project, online or in offline files that ``wandb sync`` uploads."""

import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb import Artifact, Settings, init
from wandb.proto.wandb_internal_pb2 import Record

from job.run.tracker import StepRecord, TrackedRun

_BLOCK_BYTES, _FILE_HEADER, _CHUNK_HEADER = 1 << 15, 7, struct.Struct("<IHB")  # checksum, length, type
_FULL, _FIRST, _LAST = 1, 2, 4  # types of a chunk; others are in the middle of a record
_SETTINGS = Settings(
    silent=True, console="off", init_timeout=30, disable_git=True, save_code=False, x_disable_meta=True,
    x_disable_stats=True, x_disable_machine_info=True,
)  # fmt: skip


class WandbTracker:
    """A run of W&B. Its files are in ``WANDB_DIR``, or in the run's folder if that is on a disk."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # without a key it would ask for one on the run's terminal
        self.run = run
        self.client: Any = None
        self.last_step = -1
        local = run.folder.local_path or Path(tempfile.gettempdir()) / "lanes-wandb"
        self.folder = Path(os.environ.get("WANDB_DIR", local))

    def open(self, run_id: str, key: str) -> tuple[str, int | None]:
        """Continues the run, or creates one with the configuration, whose identifier is the key.

        The process that writes offline files loses what it has not written if this one is killed; so the files, where
        they exist, decide which step is the last.
        """
        files = sorted(self.folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")) if run_id else []
        is_new, run_id = not run_id, run_id or key
        self.folder.mkdir(parents=True, exist_ok=True)
        config = {name: list(value) if isinstance(value, tuple) else value for name, value in self.run.config.items()}
        self.client = init(
            project=self.run.target, name=self.run.name, id=run_id, resume="allow", config=config,
            dir=str(self.folder), settings=_SETTINGS, allow_val_change=True,
        )  # fmt: skip
        if self.client.offline and not is_new and not files:  # they were uploaded and removed, or are elsewhere
            return run_id, None
        self.last_step = max(self.client.step - 1, *(_last_step(file) for file in files), -1)
        return run_id, self.last_step

    def describe(self) -> None:
        """Does nothing: ``open`` has passed the configuration on."""

    def log(self, records: list[StepRecord]) -> None:
        """Logs all that was reported of a step at once. W&B accepts nothing more of it later but in the summary."""
        for record in records:
            values = record.metrics | {f"samples/{kind}": text for kind, text in record.texts.items()}
            if record.step > self.last_step:
                self.client.log(values, step=record.step, commit=True)
                self.last_step = record.step
            else:
                self.client.summary.update(values)

    def upload(self, checkpoint: Path) -> None:
        """Logs the checkpoint as an artifact."""
        artifact = Artifact(f"checkpoint-{self.client.id}", "model")
        for file in checkpoint.iterdir():  # add_dir prints lines
            artifact.add_file(str(file))
        self.client.log_artifact(artifact)

    def close(self, *, finished: bool) -> None:
        """Ends the run and waits until all is written or sent."""
        self.client.finish(exit_code=0 if finished else 1)


def _last_step(file: Path) -> int:
    """Returns the last step of a ``.wandb`` file, or -1."""
    records = map(Record.FromString, read_records(file.read_bytes()))
    return max((record.history.step.num for record in records if record.HasField("history")), default=-1)


def read_records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a ``.wandb`` file up to one that is cut off. Source: LevelDB's log format."""
    position, parts = _FILE_HEADER, list[bytes]()
    while position + _CHUNK_HEADER.size <= len(data):
        if _BLOCK_BYTES - position % _BLOCK_BYTES < _CHUNK_HEADER.size:  # too short for a chunk: zeros
            position += _BLOCK_BYTES - position % _BLOCK_BYTES
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(data, position)
        position += _CHUNK_HEADER.size
        chunk = data[position : position + length]
        if len(chunk) < length or not kind:
            return
        position += length
        parts = [chunk] if kind in (_FULL, _FIRST) else [*parts, chunk]
        if kind in (_FULL, _LAST):
            yield b"".join(parts)


create_tracker = WandbTracker
