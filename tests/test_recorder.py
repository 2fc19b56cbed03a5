"""What the driver records: metrics, committed checkpoints, and the status of the workers."""

import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import not_none

from job.config.run import RunConfig
from job.config.schema import Config
from job.console import Console
from job.errors import RunFailed, UnrecoverableError
from job.run import checkpoint_committer
from job.run.checkpoint_committer import CheckpointCommitter
from job.run.lease import Lease, acquire_lease
from job.run.metrics import METRICS_FILE, MetricsLog, read_rows
from job.run.recorder import Recorder
from job.run.run_status import MAX_CONSECUTIVE_FAILURES, RunStatus
from job.storage import Folder
from job.training.checkpoint import (
    Checkpoint,
    CorruptCheckpoint,
    PartReceipt,
    checkpoint_name,
    commit_checkpoint,
    list_checkpoints,
    write_part,
)
from job.training.events import (
    CheckpointCommitted,
    Crashed,
    Finished,
    MetricsRow,
    PartWritten,
    ProgressUpdate,
    Started,
    WorkerGroupEnded,
)
from job.training.progress import Progress

CONFIG = Config(run=RunConfig(name="run"))


def started(attempt: str, step: int = 0, workers: int = 1) -> Started:
    return Started(attempt, step, 0, workers, "cpu", "fp32", 1, 100, ())


def row(step: int, split: str = "train") -> dict[str, object]:
    numbers = {"nats": 1.0, "perplexity": 2.7, "learning_rate": 0.1, "tokens_per_second": 9.0}
    return {"split": split, "epoch": 1, "step": step, **numbers}


def written_part(
    checkpoints: Folder, step: int, attempt: str, nats: float | None = None, workers: int = 1
) -> PartReceipt:
    progress = Progress(step=step, last_validation_nats=nats, validated_step=step)
    return write_part(checkpoints, checkpoint_name(step, attempt), {"model.safetensors": [b"w"]}, workers, progress)


def committed(committer: CheckpointCommitter, *steps: int) -> list[str]:
    """Commits a checkpoint of one part at each step. Returns their names."""
    receipts = [written_part(committer.folder, step, "abcdef") for step in steps]
    for receipt in receipts:
        assert committer.add(receipt)
        committer.commit(receipt.checkpoint)
    return [receipt.checkpoint for receipt in receipts]


class RecordedRun(Recorder):
    """A recorder that keeps its events and the text of its console."""

    def __init__(self, lease: Lease) -> None:
        self.output = io.StringIO()
        self.events: list[Any] = []
        super().__init__(CONFIG, lease, Console(self.output), self.events.append)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[RecordedRun]:
    """A recorder of a new run."""
    lease = acquire_lease(Folder(str(tmp_path / "run")))
    recorder = RecordedRun(lease)
    yield recorder
    recorder.close()
    lease.release()


def test_metrics_log_truncate_removes_rows_after_step(tmp_path: Path) -> None:
    log = MetricsLog(Folder(str(tmp_path)))
    log.truncate(0)
    for step in (1, 2, 3):
        log.append(row(step))
    log.truncate(2)
    log.append(row(3, "epoch"))
    log.sync()
    log.close()
    assert [(row["split"], row["step"]) for row in read_rows(log.folder)] == [("train", 1), ("train", 2), ("epoch", 3)]


def test_read_rows_ignores_a_line_cut_off_by_a_crash(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:20])
    assert [row["step"] for row in read_rows(Folder(str(tmp_path)))] == [1]


def test_committer_keeps_the_last_and_the_best_checkpoint(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    committer = CheckpointCommitter(folder, 1)
    for step, nats in ((10, 2.0), (20, 1.0), (30, 3.0), (40, 2.0)):
        receipt = written_part(folder, step, "abcdef", nats)
        assert committer.add(receipt)
        committer.commit(receipt.checkpoint)
    assert [checkpoint.step for checkpoint in committer.checkpoints] == [20, 40]
    assert committer.checkpoints == list_checkpoints(folder)[0]
    assert committer.best and committer.best.step == 20


@pytest.mark.parametrize("fault", ["written elsewhere", "truncated", "removed"])
def test_committer_without_a_part_in_its_storage_fails_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """After the folder was unmounted on a node, its files went to the disk below, without an error."""
    monkeypatch.setattr(checkpoint_committer, "VISIBILITY_DELAYS_S", (0.0, 0.0))
    folder, elsewhere = Folder(str(tmp_path / "shared")), Folder(str(tmp_path / "below"))
    committer = CheckpointCommitter(folder, 2)
    names = committed(committer, 10, 20)
    committer.add(written_part(folder, 30, "abcdef", workers=2))
    name, lanes = checkpoint_name(30, "abcdef"), "lanes-00016-00031.safetensors"
    receipt = write_part(elsewhere if fault == "written elsewhere" else folder, name, {lanes: [b"state"]}, 2, None)
    if fault == "truncated":
        (folder / name).write(lanes, b"st")
    if fault == "removed":
        (folder / name).remove(lanes)
    assert committer.add(replace(receipt, host="node-2"))
    with pytest.raises(UnrecoverableError, match=f"{lanes} is not there as it was written; node-2 writes elsewhere"):
        committer.commit(name)
    assert [checkpoint.name for checkpoint in list_checkpoints(folder)[0]] == names


def test_committer_waits_for_a_part_that_the_storage_shows_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path))
    receipt = written_part(folder, 10, "abcdef")
    (folder / receipt.checkpoint).remove("model.safetensors")
    monkeypatch.setattr("time.sleep", lambda delay: delay > 1 and written_part(folder, 10, "abcdef"))
    committer = CheckpointCommitter(folder, 1)
    committer.add(receipt)
    assert committer.commit(receipt.checkpoint).step == 10


def test_committer_stores_nothing_about_removed_checkpoints_and_replaced_workers(tmp_path: Path) -> None:
    committer = CheckpointCommitter(Folder(str(tmp_path)), 2)
    committed(committer, *range(10, 100, 10))
    committer.add(written_part(committer.folder, 100, "abcdef", workers=2))
    committer.add(written_part(committer.folder, 110, "fedcba", workers=2))
    committer.resume(90, "fedcba")
    assert list(committer.committed_at) == ["step-000080-abcdef", "step-000090-abcdef"]
    assert list(committer.receipts) == ["step-000110-fedcba"]


def test_committer_resume_discards_later_checkpoints(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    committer = CheckpointCommitter(folder, 3)
    committed(committer, 10, 20)
    committer.resume(10, "fedcba")
    assert [checkpoint.step for checkpoint in committer.checkpoints] == [10]


def test_status_fails_after_consecutive_failures_without_checkpoint() -> None:
    status = RunStatus(CONFIG, Console(io.StringIO()))
    for _ in range(MAX_CONSECUTIVE_FAILURES - 1):
        status.end_attempt("worker 0: it died")
    assert not status.failed
    status.end_attempt("worker 0: it died")
    assert "without reaching a checkpoint; last: worker 0: it died" in not_none(status.failed).problem


def test_status_shows_failure_of_group_once() -> None:
    """By the worker that failed, or, if it was killed, by Ray."""
    output = io.StringIO()
    status = RunStatus(CONFIG, Console(output))
    status.report_crash("worker 1 of 2 ended: an error")
    status.end_attempt("worker 1: what Ray reports")
    status.end_attempt("worker 0: it died")
    status.end_attempt("")
    assert output.getvalue() == "warning: worker 1 of 2 ended: an error\nwarning: worker 0: it died\n"


def test_recorder_dispatches_crash_and_end_of_group(recorder: RecordedRun) -> None:
    recorder.handle(Crashed("one", "worker 1 of 2 ended: an error"))
    recorder.handle(WorkerGroupEnded("", "worker 1: what Ray reports"))
    assert recorder.output.getvalue() == "warning: worker 1 of 2 ended: an error\n"
    assert recorder.status.consecutive_failures == 1


def test_recorder_ignores_events_of_replaced_workers(recorder: RecordedRun) -> None:
    recorder.handle(started("aaaaaa"))
    recorder.handle(MetricsRow("aaaaaa", row(1)))
    recorder.handle(started("bbbbbb", 1))
    recorder.handle(MetricsRow("aaaaaa", row(2)))
    recorder.handle(ProgressUpdate("aaaaaa", 1, 2, 1.0, 9.0))
    assert [row["step"] for row in read_rows(recorder.folder)] == [1]
    assert [event.attempt for event in recorder.events] == ["aaaaaa", "aaaaaa", "bbbbbb"]


def test_recorder_commit_posts_event_and_clears_failures(recorder: RecordedRun) -> None:
    recorder.handle(started("abcdef"))
    recorder.handle(WorkerGroupEnded("", "worker 0: it died"))
    recorder.handle(PartWritten("abcdef", written_part(recorder.committer.folder, 10, "abcdef")))
    committed = [event.checkpoint.step for event in recorder.events if isinstance(event, CheckpointCommitted)]
    assert committed == [10]
    assert recorder.status.consecutive_failures == 0


@pytest.mark.parametrize("after", ["metrics", "manifest"])
def test_recorder_after_takeover_commits_and_removes_nothing(
    recorder: RecordedRun, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """The lease was checked before the upload of the metrics only, which may take longer than the lease lasts."""
    folder, checkpoints = recorder.folder, recorder.committer.folder
    recorder.handle(started("abcdef"))
    for step in (10, 20, 30):
        recorder.handle(PartWritten("abcdef", written_part(checkpoints, step, "abcdef")))

    def take_over(*_: Any) -> None:
        owner = {**json.loads(folder.read("owner.json")), "token": "of the new owner"}
        Folder(folder.address).write("owner.json", json.dumps(owner).encode())

    def commit_and_take_over(*args: Any) -> Checkpoint:
        checkpoint = commit_checkpoint(*args)
        take_over()
        return checkpoint

    if after == "metrics":
        monkeypatch.setattr(recorder.metrics, "sync", take_over)
    else:
        monkeypatch.setattr(checkpoint_committer, "commit_checkpoint", commit_and_take_over)
    part = written_part(checkpoints, 40, "abcdef")
    with pytest.raises(RunFailed, match="another driver has taken this run over"):
        recorder.handle(PartWritten("abcdef", part))
    steps = [checkpoint.step for checkpoint in list_checkpoints(checkpoints)[0]]
    assert steps == [10, 20, 30] + [40] * (after == "manifest")


def test_recorder_when_workers_see_another_storage_fails_and_removes_nothing(recorder: RecordedRun) -> None:
    """On a node without the mount the folder is empty, and the workers would start over."""
    committed(recorder.committer, 10)
    recorder.committer.committed_at.clear()  # by an earlier driver
    with pytest.raises(UnrecoverableError, match="do not see step-000010-abcdef"):
        recorder.handle(started("bbbbbb"))
    assert [checkpoint.step for checkpoint in list_checkpoints(recorder.committer.folder)[0]] == [10]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_recorder_when_workers_skip_a_checkpoint_removes_it_only_if_it_is_damaged(
    recorder: RecordedRun, is_damaged: bool
) -> None:
    """A node that sees an incomplete copy of the folder reported a complete checkpoint as corrupt, and it was lost."""
    (name,) = committed(recorder.committer, 10)
    path = recorder.committer.folder / name
    if is_damaged:
        path.write("model.safetensors", b"x")
    skipping = replace(started("bbbbbb"), skipped_checkpoints=(CorruptCheckpoint(path, "a file is missing"),))
    with nullcontext() if is_damaged else pytest.raises(UnrecoverableError, match="do not see step-000010-abcdef"):
        recorder.handle(skipping)
    assert recorder.committer.folder.names() == ([] if is_damaged else [name])


def test_recorder_commits_part_that_arrived_before_its_group_started(recorder: RecordedRun) -> None:
    """A group that has nothing left to do saves at once, and its second worker's event may be the first."""
    name, progress = "step-000030-abcdef", Progress(step=30)
    recorder.handle(PartWritten("abcdef", PartReceipt(name, 2, {}, None)))
    recorder.handle(started("abcdef", 30, workers=2))
    recorder.handle(PartWritten("abcdef", written_part(recorder.committer.folder, 30, "abcdef", workers=2)))
    recorder.handle(Finished("abcdef", False, progress, name, 2))
    assert recorder.is_done
    assert not recorder.status.failed
