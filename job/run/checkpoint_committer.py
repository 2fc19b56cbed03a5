"""Commits checkpoints whose parts are complete, and removes old ones."""

import time

from job.errors import UnrecoverableError
from job.storage import Folder
from job.training.checkpoint import (
    Checkpoint,
    CorruptCheckpoint,
    PartReceipt,
    commit_checkpoint,
    discard_after,
    list_checkpoints,
    remove_checkpoint,
    verify_checkpoint,
)
from job.training.events import Started

REMEDY = "make sure that all nodes mount the same storage"
VISIBILITY_DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # a network file system may show files of other nodes late
COMMIT_VISIBILITY_S = 60.0  # longest time between a worker group's search for checkpoints and its Started event


class CheckpointCommitter:
    """Collects the receipts of written parts, commits complete checkpoints, and keeps the last few and the best.

    Args:
        folder: the run's ``checkpoints``
        num_kept: how many of the last checkpoints to keep
    """

    def __init__(self, folder: Folder, num_kept: int) -> None:
        self.folder = folder
        self.num_kept = num_kept
        self.checkpoints: list[Checkpoint] = []  # committed and not removed, in the order of their steps
        self.committed_at: dict[str, float] = {}  # by time.monotonic
        self.receipts: dict[str, list[PartReceipt]] = {}  # of incomplete checkpoints, by name

    def check_seen(self, event: Started) -> None:
        """Raises UnrecoverableError if a new worker group did not see a checkpoint that it should have loaded.

        A group may miss what was committed while it was searching. What it skipped must be corrupt here, too.
        """
        skipped = {corrupt.name for corrupt in event.skipped_checkpoints}
        checkpoints, _ = list_checkpoints(self.folder)
        for checkpoint in checkpoints:
            age_s = time.monotonic() - self.committed_at.get(checkpoint.name, 0.0)
            is_missed = _is_intact(checkpoint) if checkpoint.name in skipped else age_s > COMMIT_VISIBILITY_S
            if checkpoint.step > event.step and is_missed:
                raise UnrecoverableError(
                    f"{self.folder}: the workers start at step {event.step:,} and do not see {checkpoint.name}", REMEDY
                )

    def resume(self, step: int, attempt: str) -> None:
        """Discards what earlier attempts wrote after the step at which a new one starts."""
        discard_after(self.folder, step, attempt)
        self.checkpoints, _ = list_checkpoints(self.folder)
        self.receipts = {name: parts for name, parts in self.receipts.items() if name.endswith(attempt)}

    def add(self, receipt: PartReceipt) -> bool:
        """Adds a part's receipt. Returns whether the checkpoint is now complete.

        A part may arrive before its group's Started event, since each worker has its own connection. The checkpoint
        cannot be complete by then: rank 0 sends both that event and a part, in this order.
        """
        receipts = self.receipts.setdefault(receipt.checkpoint, [])
        receipts.append(receipt)
        return len(receipts) == receipt.workers

    def commit(self, name: str) -> Checkpoint:
        """Commits a complete checkpoint and removes those that are no longer to be kept.

        Raises:
            UnrecoverableError: the driver does not see all its files in the storage; nothing is removed
        """
        receipts = self.receipts.pop(name)
        self._check_stored(name, receipts)
        checkpoint = commit_checkpoint(self.folder, name, receipts)
        self.committed_at[name] = time.monotonic()
        self.checkpoints.append(checkpoint)
        kept = [*self.checkpoints[-self.num_kept :], self.best]
        for old in self.checkpoints:
            if old not in kept:
                remove_checkpoint(self.folder, old.name)
        self.checkpoints = [old for old in self.checkpoints if old in kept]
        names = {old.name for old in self.checkpoints}
        self.committed_at = {name: at for name, at in self.committed_at.items() if name in names}
        return checkpoint

    def _check_stored(self, name: str, receipts: list[PartReceipt]) -> None:
        """Compares the files in the storage with the receipts of the workers, one of which may write elsewhere."""
        written = [(file, size, receipt.host) for receipt in receipts for file, (size, _) in receipt.files.items()]
        for delay_s in VISIBILITY_DELAYS_S:
            time.sleep(delay_s)
            sizes = (self.folder / name).sizes()
            differing = [(file, host) for file, size, host in written if sizes.get(file) != size]
            if not differing:
                return
        hosts = ", ".join(sorted({host for _, host in differing}))
        problem = f"{self.folder / name}: {differing[0][0]} is not there as it was written; {hosts} writes elsewhere"
        raise UnrecoverableError(problem, REMEDY)

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation loss, or None if none has one."""
        scored = [checkpoint for checkpoint in self.checkpoints if checkpoint.validation_nats is not None]
        return min(scored, key=lambda checkpoint: checkpoint.validation_nats or 0.0, default=None)


def _is_intact(checkpoint: Checkpoint) -> bool:
    """Whether every byte of a checkpoint agrees with its manifest."""
    try:
        verify_checkpoint(checkpoint)
    except CorruptCheckpoint:
        return False
    return True
