"""A run's metrics: their rows on disks and object stores, TensorBoard's events, and the curve."""

import itertools
import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import job, rows, search_config
from pyarrow import fs
from tensorboardX.proto.event_pb2 import Event, SessionLog

from job.config.config_file import load_config
from job.run.metrics import METRICS_FILE, SEGMENTS, MetricsLog, read_rows
from job.run.plot import plot_perplexity
from job.run.row_file import TAIL_BYTES
from job.storage import Folder
from job.tuning.results import _write_tensorboard
from job.tuning.trials import Trial, Trials, read_score_rows


def row(split: str, epoch: int, step: int, **more: Any) -> dict[str, float | str]:
    return {
        "split": split, "epoch": epoch, "step": step, "tokens": step, "nats": 1.0, "perplexity": 9.0 - step / 100,
        "learning_rate": 0.1, "tokens_per_second": 1.0, "workers": 1, **more,
    }  # fmt: skip


def read_events(folder: Path) -> list[Event]:
    """The scalars that TensorBoard shows: files in order; a start hides what is before it from its step on."""
    events: list[Event] = []
    for event in itertools.chain.from_iterable(parse_events(file.read_bytes()) for file in sorted(folder.iterdir())):
        if event.session_log.status == SessionLog.START:
            events = [shown for shown in events if shown.step < event.step]
        elif event.HasField("summary") and event.step:
            events.append(event)
    return events


def parse_events(data: bytes) -> list[Event]:
    """The events of a file: records of length, checksum, data, checksum."""
    events: list[Event] = []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def drawn_lines(all_rows: list[dict[str, float | str]]) -> tuple[str, list[list[float]]]:
    """The axis and the points of each line of the curve."""
    (axes,) = plot_perplexity(all_rows, "run").axes
    return axes.get_xlabel(), [np.asarray(line.get_xdata()).tolist() for line in axes.lines]


@pytest.mark.parametrize(
    ("all_rows", "axis", "lines"),
    [
        ([row("train", 1, 5), row("train", 1, 10), row("epoch", 1, 12)], "step", [[5, 10]]),
        ([row("train", 1, 1), row("train", 1, 2), row("epoch", 1, 2), row("validation", 1, 2)], "step", [[1, 2], [2]]),
        ([row("train", 1, 5), row("train", 1, 9)], "step", [[5, 9]]),  # stopped inside the first epoch
        ([row("epoch", 1, 9), row("validation", 1, 9)], "epoch", [[1], [1]]),  # log_every is longer than the run
        ([row("validation", 1, 5), row("epoch", 1, 9), row("validation", 1, 9)], "step", [[9], [5, 9]]),
        ([row("train", 1, 9), row("epoch", 1, 9), row("train", 2, 18), row("epoch", 2, 18)], "epoch", [[1, 2]]),
    ],
)
def test_plot_perplexity_of_one_epoch_draws_the_rows_of_train(
    all_rows: list[dict[str, float | str]], axis: str, lines: list[list[float]]
) -> None:
    assert drawn_lines(all_rows) == (axis, lines)


def test_metrics_log_of_diverged_run_shows_finite_values_and_prints_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(Folder(str(tmp_path)))
    log.truncate(0)
    log.append(row("train", 1, 1, nats=math.nan, learning_rate=math.inf))
    log.close()
    tags = [event.summary.value[0].tag for event in read_events(tmp_path / "tensorboard")]
    assert tags == ["perplexity/train", "tokens_per_second/train"]
    assert not caplog.records


@pytest.mark.parametrize("times", [[1000.25, 1060.5], [1000.25, None], [7.0, 7.0]])
def test_metrics_log_after_resume_keeps_the_time_of_each_row(tmp_path: Path, times: list[float | None]) -> None:
    log = MetricsLog(Folder(str(tmp_path)))
    log.truncate(0)
    for step, seconds in enumerate(times, 1):
        log.append(row("train", 1, step, **({"time": seconds} if seconds else {})))
    log.close()
    (no_time,) = {event.wall_time for event in read_events(tmp_path / "tensorboard") if event.step == 2}
    for _ in range(2):
        log = MetricsLog(Folder(str(tmp_path)))
        log.truncate(9)
        log.append(row("train", 1, 10, time=2000.0))
        log.close()
        events = read_events(tmp_path / "tensorboard")
        assert {event.wall_time for event in events if event.step == 1} == {times[0]}
        assert {event.wall_time for event in events if event.step == 10} == {2000.0}
        assert {event.wall_time for event in events if event.step == 2} == {times[1] or no_time}
        assert len(events) == 12


def test_train_resumed_keeps_the_times_of_rows_in_tensorboard(prose: Path, tmp_path: Path) -> None:
    arguments = [
        "--corpus.source", prose, "--corpus.max_tokens", 4000, "--corpus.validation_fraction", 0.2,
        "--run.storage", tmp_path, "--run.name", "run", "--scale.workers", 0, "--model.hidden_size", 16,
        "--generate.prefix", "the", "--train.epochs", 2, "--train.log_every", 1,
    ]  # fmt: skip
    assert job("train", *arguments, "--train.max_steps", 2).status == 0
    resumed_at = time.time()
    assert job("train", *arguments).status == 0
    events = read_events(tmp_path / "run" / "tensorboard")
    for split in ("train", "epoch", "validation"):
        stored = [row["time"] for row in rows(tmp_path / "run", split)]
        shown = [event.wall_time for event in events if event.summary.value[0].tag == f"nats/{split}"]
        assert shown == stored == sorted(stored)
        assert stored[0] < resumed_at < stored[-1]


def test_write_tensorboard_of_a_search_keeps_the_time_of_each_score(tmp_path: Path) -> None:
    search = search_config(space={"model.dropout": {"grid": [0.1]}}, metric="perplexity")
    trial = Trial(0, {"model.dropout": 0.1}, scores=[(1, 8.9), (2, 8.8)])
    log = MetricsLog(Folder(str(tmp_path / "trials" / "00000")))
    log.truncate(0)
    log.append(row("epoch", 1, 10, time=1000.25))
    log.append(row("epoch", 2, 20, time=1060.5))
    log.close()
    _write_tensorboard(Trials(Folder(str(tmp_path)), load_config(None, {}), search, {}), trial)
    events = read_events(tmp_path / "tensorboard" / "00000")
    assert [(event.step, event.wall_time) for event in events] == [(1, 1000.25), (2, 1060.5)]


# --- work in proportion to what is new ---


class ObjectStore(fs.FSSpecHandler):
    """An object store in memory: lists the objects that are written; fails after ``fails_at`` writes and removals."""

    def __init__(self) -> None:
        super().__init__(fsspec.filesystem("memory"))
        self.written: list[str] = []
        self.num_changes, self.fails_at = 0, -1

    def change(self) -> None:
        self.num_changes += 1
        if self.num_changes > self.fails_at >= 0:
            raise OSError("the connection is lost")

    def open_output_stream(self, path: str, metadata: object) -> Any:
        self.change()
        self.written.append(path)
        return super().open_output_stream(path, metadata)

    def delete_file(self, path: Path) -> None:
        self.change()
        super().delete_file(path)

    def delete_dir(self, path: Path) -> None:
        for info in self.get_file_info_selector(fs.FileSelector(path)):
            self.delete_file(info.path)
        super().delete_dir(path)

    def folder(self) -> Folder:
        return Folder("s3://bucket/run", location=(fs.PyFileSystem(self), "/bucket/run"))

    def uploaded_bytes(self) -> int:
        """The size of what was written since the last call."""
        sizes = [info.size for info in self.get_file_info(self.written)]
        self.written.clear()
        return sum(sizes)


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.fs.store.clear()
    store.fs.pseudo_dirs[:] = [""]


def expected_steps(last: int) -> list[tuple[str, int]]:
    """Split and step of the rows that ``report`` appends."""
    return [(split, step) for step in range(1, last + 1) for split in ("train", *["epoch"] * (step % 5 == 0))]


def report(log: MetricsLog, start: int, stop: int, **more: Any) -> None:
    """Appends the rows of the steps after one; an epoch has five steps."""
    for split, step in expected_steps(stop):
        if step > start:
            log.append(row(split, 1 + step // 5, step, **more))


def steps_of(folder: Folder) -> list[tuple[str, int]]:
    return [(row["split"], row["step"]) for row in read_rows(folder)]


def write_rows(path: Path, count: int) -> bytes:
    data = "".join(f"{json.dumps(row('train', 1, step, time=1.0))}\n" for step in range(1, count + 1)).encode()
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("count", [3, 300, 30_000])
@pytest.mark.parametrize("num_later", [0, 1, 3, 1000])
def test_metrics_log_truncate_reads_no_more_than_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, num_later: int
) -> None:
    data = write_rows(tmp_path / METRICS_FILE, count)
    step = max(0, count - num_later)
    sizes, read_block = [], Folder.read_block

    def recorded(*args: Any) -> bytes:
        sizes.append(len(block := read_block(*args)))
        return block

    monkeypatch.setattr(Folder, "read_block", recorded)
    monkeypatch.setattr(Folder, "read", None)
    log = MetricsLog(Folder(str(tmp_path)))
    log.truncate(step)
    kept = (tmp_path / METRICS_FILE).read_bytes()
    assert kept == b"".join(data.splitlines(keepends=True)[:step])
    assert sum(sizes) <= 6 * max(TAIL_BYTES, len(data) - len(kept))
    log.append(row("train", 1, step + 1))
    log.close()
    assert (tmp_path / METRICS_FILE).read_bytes().startswith(kept)
    assert [event.step for event in read_events(tmp_path / "tensorboard")] == [step + 1] * 4


@pytest.mark.parametrize(
    "end", [b"", b"\n", b'\n{"split": "train", "epo', b"\n\x00\x00\x00", b"\n[]\n7\n{}\n" + b"[" * 9999]
)
def test_metrics_log_truncate_removes_what_is_no_row_and_keeps_the_last_row(tmp_path: Path, end: bytes) -> None:
    data = write_rows(tmp_path / METRICS_FILE, 3)
    (tmp_path / METRICS_FILE).write_bytes(data[:-1] + end)
    log = MetricsLog(Folder(str(tmp_path)))
    log.truncate(3)
    assert (tmp_path / METRICS_FILE).read_bytes() == data
    log.close()


@pytest.mark.parametrize(
    "line", ["[]", "7", '{"step": 2}', '{"split": 1, "epoch": 1, "step": 2, "perplexity": "x"}', "[" * 9999]
)
def test_train_resumed_with_foreign_lines_in_metrics_ignores_them(prose: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "run" / METRICS_FILE
    arguments = [
        "--corpus.source", prose, "--corpus.max_tokens", 4000, "--run.storage", tmp_path, "--run.name", "run",
        "--scale.workers", 0, "--model.hidden_size", 16, "--generate.prefix", "the", "--train.log_every", 1,
    ]  # fmt: skip
    assert job("train", *arguments, "--train.max_steps", 1).status == 0
    path.write_text(f"{line}\n{path.read_text()}{line}\n")
    ended = job("train", *arguments, "--train.max_steps", 2)
    assert (ended.status, ended.err) == (0, "")
    assert [row["step"] for row in read_rows(Folder(str(tmp_path / "run"))) if row["split"] == "train"] == [1, 2]


def test_metrics_log_on_object_store_uploads_what_is_new(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.run.metrics.SEGMENT_BYTES", 2000)
    log, sizes = MetricsLog(store.folder()), []
    log.truncate(0)
    for step in range(0, 1000, 10):
        report(log, step, step + 10)
        log.sync()
        sizes.append(store.uploaded_bytes())
    assert max(sizes[50:]) < 1.1 * max(sizes[:50])
    assert steps_of(store.folder()) == expected_steps(1000)
    log.truncate(990)
    assert store.uploaded_bytes() < 4000
    report(log, 990, 1000)
    log.merge()
    log.close()
    assert steps_of(store.folder()) == expected_steps(1000)
    assert not store.folder().has(SEGMENTS)
    assert store.folder().read(METRICS_FILE).count(b"\n") == 1200


@pytest.mark.parametrize("resumed", [0, 4, 5, 12, 20])
def test_metrics_log_on_object_store_resumes_a_run_with_complete_metrics(store: ObjectStore, resumed: int) -> None:
    """As versions without segments wrote it, or as the end of a run leaves it."""
    lines = [json.dumps(row(split, 1 + step // 5, step, time=1.0)) for split, step in expected_steps(20)]
    store.folder().write(METRICS_FILE, "".join(f"{line}\n" for line in lines).encode())
    log = MetricsLog(store.folder())
    log.truncate(resumed)
    report(log, resumed, 25, time=2.0)
    log.merge()
    log.close()
    assert steps_of(store.folder()) == expected_steps(25)
    assert [row["time"] for row in read_rows(store.folder())].count(1.0) == len(expected_steps(resumed))


def run_until_failure(store: ObjectStore, saved: int, fails_at: int) -> int:
    """Reports and saves from a checkpoint to the end, with restarts of workers. Returns the last checkpoint's step."""
    store.num_changes, store.fails_at = 0, fails_at
    log = MetricsLog(store.folder())
    try:
        log.truncate(saved)
        reported = saved
        for step in range(saved, 30, 3):
            report(log, reported, step + 5)  # rows after the checkpoint may arrive before all its parts
            log.sync()
            saved, reported = step + 3, step + 5
            if step % 2:  # the workers are restarted
                log.truncate(saved)
                reported = saved
        log.merge()
    except OSError:
        pass
    finally:
        log.close()
        store.fails_at = -1
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("segment_bytes", [1, 800, 10**6])
def test_metrics_log_on_object_store_after_a_crash_at_any_write_has_each_row_once(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, segment_bytes: int
) -> None:
    monkeypatch.setattr("job.run.metrics.SEGMENT_BYTES", segment_bytes)
    for fails_at in itertools.count():
        store.fs.store.clear()
        saved = run_until_failure(store, 0, fails_at)
        has_failed = store.num_changes > fails_at
        saved = run_until_failure(store, saved, 1 + fails_at % 5)
        found = steps_of(store.folder())
        assert [entry for entry in found if entry[1] <= saved] == expected_steps(saved), fails_at
        assert len(found) == len(set(found))
        assert run_until_failure(store, saved, 10**6) == 30
        assert steps_of(store.folder()) == expected_steps(30), fails_at
        assert store.folder().names() == [METRICS_FILE, "tensorboard"]
        if not has_failed:
            break
    assert fails_at > 20


def test_read_score_rows_of_a_running_trial_on_an_object_store_reads_its_segments(store: ObjectStore) -> None:
    log = MetricsLog(store.folder())
    log.truncate(0)
    report(log, 0, 12)
    log.sync()
    assert [row["step"] for row in read_score_rows(store.folder(), "perplexity")] == [5, 10]
    log.close()
