"""What is made of the rows of ``metrics.jsonl``: the curve and TensorBoard's events."""

import struct
import time
from pathlib import Path

import pytest
from conftest import job, rows
from tensorboardX.proto.event_pb2 import Event

from job.config.config_file import load_config
from job.config.search_space import SearchConfig
from job.run.metrics import MetricsLog, plot_perplexity
from job.storage import Folder
from job.tuning.results import _write_tensorboard
from job.tuning.trials import Trial, Trials


def row(split, epoch, step, **more):
    return {
        "split": split, "epoch": epoch, "step": step, "tokens": step, "nats": 1.0, "perplexity": 9.0 - step / 100,
        "learning_rate": 0.1, "tokens_per_second": 1.0, "workers": 1, **more,
    }  # fmt: skip


def read_events(folder: Path) -> list[Event]:
    """The events with a step, from the only file of a folder: records of length, checksum, data, checksum."""
    (file,) = folder.iterdir()
    data, events = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return [event for event in events if event.step]


def drawn_lines(monkeypatch, all_rows):
    """The axis and the points of each line of the curve."""
    monkeypatch.setattr("job.run.metrics.to_png", lambda figure: figure)
    (axes,) = plot_perplexity(all_rows, "run").axes
    return axes.get_xlabel(), [list(line.get_xdata()) for line in axes.lines]


@pytest.mark.parametrize(
    ("all_rows", "axis", "lines"),
    [
        ([row("train", 1, 5), row("train", 1, 10), row("epoch", 1, 12)], "step", [[5, 10]]),
        ([row("train", 1, 1), row("train", 1, 2), row("epoch", 1, 2), row("validation", 1, 2)], "step", [[1, 2], [2]]),
        ([row("train", 1, 5), row("train", 1, 9)], "step", [[5, 9]]),  # stopped inside the first epoch
        ([row("epoch", 1, 9), row("validation", 1, 9)], "epoch", [[1], [1]]),  # log_every is longer than the run
        ([row("train", 1, 9), row("epoch", 1, 9), row("train", 2, 18), row("epoch", 2, 18)], "epoch", [[1, 2]]),
    ],
)
def test_plot_perplexity_of_one_epoch_draws_the_rows_of_train(monkeypatch, all_rows, axis, lines):
    assert drawn_lines(monkeypatch, all_rows) == (axis, lines)


@pytest.mark.parametrize("times", [[1000.25, 1060.5], [1000.25, None], [7.0, 7.0]])
def test_metrics_log_after_resume_keeps_the_time_of_each_row(tmp_path, times):
    log = MetricsLog(Folder(str(tmp_path)))
    log.truncate(0)
    for step, seconds in enumerate(times, 1):
        log.append(row("train", 1, step, **({"time": seconds} if seconds else {})))
    log.close()
    started_at = time.time()
    for _ in range(2):  # a row without a time, of an earlier version, gets that of the resume
        log = MetricsLog(Folder(str(tmp_path)))
        log.truncate(9)
        log.append(row("train", 1, 10, time=2000.0))
        log.close()
        events = read_events(tmp_path / "tensorboard")
        assert {event.wall_time for event in events if event.step == 1} == {times[0]}
        assert {event.wall_time for event in events if event.step == 10} == {2000.0}
        assert all(event.wall_time == times[1] or event.wall_time >= started_at for event in events if event.step == 2)
        assert len(events) == 12


def test_train_resumed_keeps_the_times_of_rows_in_tensorboard(prose, tmp_path):
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


def test_write_tensorboard_of_a_search_keeps_the_time_of_each_score(tmp_path):
    search = SearchConfig(space={"model.dropout": {"grid": [0.1]}}, metric="perplexity")
    trial = Trial(0, {"model.dropout": 0.1}, scores=[(1, 8.9), (2, 8.8)])
    log = MetricsLog(Folder(str(tmp_path / "trials" / "00000")))
    log.truncate(0)
    log.append(row("epoch", 1, 10, time=1000.25))
    log.append(row("epoch", 2, 20, time=1060.5))
    log.close()
    _write_tensorboard(Trials(Folder(str(tmp_path)), load_config(None, {}), search, {0: trial}, {}), trial)
    events = read_events(tmp_path / "tensorboard" / "00000")
    assert [(event.step, event.wall_time) for event in events] == [(1, 1000.25), (2, 1060.5)]
