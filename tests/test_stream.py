"""Windows of a stream: equal to the d2l book's, for any division of the lanes."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import job

from job.config.text import StreamConfig
from job.config.training import TrainConfig
from job.data.lanes import split_evenly
from job.data.stream import Stream
from job.errors import UserError


def book_windows(
    corpus: np.ndarray, batch_size: int, num_steps: int, offset: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The windows of the d2l book's sequential partitioning, in plain numpy."""
    used = (len(corpus) - offset - 1) // batch_size * batch_size
    xs = corpus[offset : offset + used].reshape(batch_size, -1)
    ys = corpus[offset + 1 : offset + 1 + used].reshape(batch_size, -1)
    for start in range(0, xs.shape[1] // num_steps * num_steps, num_steps):
        yield xs[:, start : start + num_steps], ys[:, start : start + num_steps]


@pytest.mark.parametrize(("num_tokens", "batch", "steps", "offset"), [(35, 2, 5, 0), (1000, 7, 11, 3), (26, 3, 3, 1)])
def test_read_window_matches_the_book(num_tokens: int, batch: int, steps: int, offset: int) -> None:
    corpus = np.arange(num_tokens, dtype=np.int32)
    stream = Stream(corpus, StreamConfig(batch_size=batch, num_steps=steps, offset=offset), seed=0)
    windows = list(book_windows(corpus, batch, steps, offset))
    assert stream.partition(0).num_windows == len(windows)
    for index, expected in enumerate(windows):
        lane_ranges = [stream.read_window(0, index, lanes) for lanes in split_evenly(batch, 2)]
        for tensors, array in zip(zip(*lane_ranges, strict=True), expected, strict=True):
            np.testing.assert_array_equal(np.concatenate(tensors, 1).T, array)


def test_random_offset_is_a_function_of_seed_and_epoch() -> None:
    def offsets(seed: int) -> list[int]:
        stream = Stream(np.zeros(9, np.int32), StreamConfig(num_steps=40), seed)
        return [stream.offset(epoch) for epoch in range(500)]

    assert offsets(1) == offsets(1) != offsets(2)
    assert set(offsets(1)) == set(range(41))


@pytest.mark.parametrize(("offset", "num_required"), [("random", 17), (2, 15), ((0, 3), 16)])
def test_check_enough_tokens_raises_if_an_epoch_may_have_no_window(
    offset: int | str | tuple[int, int], num_required: int
) -> None:
    stream_config, train_config = StreamConfig(batch_size=3, num_steps=4, offset=offset), TrainConfig(epochs=2)
    Stream(np.zeros(num_required, np.int32), stream_config, 0).check_enough_tokens(train_config)
    with pytest.raises(UserError, match=f"need {num_required} tokens"):
        Stream(np.zeros(num_required - 1, np.int32), stream_config, 0).check_enough_tokens(train_config)


@pytest.mark.parametrize("offset", ["random", 3, (0, 5, 2)])
@pytest.mark.parametrize("max_steps", [0, 7])
def test_total_steps_equals_sum_over_epochs(offset: int | str | tuple[int, int, int], max_steps: int) -> None:
    stream = Stream(np.zeros(103, np.int32), StreamConfig(batch_size=2, num_steps=5, offset=offset), 0)
    num_windows = [stream.partition(epoch).num_windows for epoch in range(3)]
    total = stream.total_steps(TrainConfig(epochs=3, max_steps=max_steps))
    assert total == min(sum(num_windows), max_steps or math.inf)


@pytest.mark.parametrize(("epochs", "offset"), [(10**8, "random"), (10**8, 3), (10**30, "random")])
def test_stream_of_any_number_of_epochs_is_checked_and_counted_within_a_second(epochs: int, offset: int | str) -> None:
    stream = Stream(np.zeros(103, np.int32), StreamConfig(batch_size=2, num_steps=5, offset=offset), 0)
    started_at = time.process_time()
    stream.check_enough_tokens(TrainConfig(epochs=epochs))
    total = stream.total_steps(TrainConfig(epochs=epochs))
    assert time.process_time() - started_at < 1
    assert total / epochs == pytest.approx(9.5, abs=0.5)
    assert stream.total_steps(TrainConfig(epochs=epochs, max_steps=12)) == 12


def test_total_steps_beyond_the_counted_epochs_is_near_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(np.zeros(103, np.int32), StreamConfig(batch_size=2, num_steps=5), 0)
    exact = stream.total_steps(TrainConfig(epochs=15_000))
    monkeypatch.setattr("job.data.stream.MAX_COUNTED_EPOCHS", 5000)
    assert stream.total_steps(TrainConfig(epochs=15_000)) == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(("num_tokens", "batch", "steps", "offset"), [(35, 2, 5, 0), (1000, 7, 11, 3), (26, 3, 3, 1)])
def test_dropped_share_is_that_of_the_targets_in_no_window(
    num_tokens: int, batch: int, steps: int, offset: int
) -> None:
    stream = Stream(np.arange(num_tokens), StreamConfig(batch_size=batch, num_steps=steps, offset=offset), 0)
    windows = (stream.read_window(0, window, range(batch))[1] for window in range(stream.partition(0).num_windows))
    used = {target for targets in windows for target in targets.flatten().tolist()}
    assert stream.dropped_share == pytest.approx(1 - len(used) / (num_tokens - 1))


@pytest.mark.parametrize(("num_characters", "share"), [(641, ""), (680, ", 5.7% not used in an epoch")])
def test_run_reports_the_dropped_share_if_it_is_above_one_percent(
    tmp_path: Path, num_characters: int, share: str
) -> None:
    (tmp_path / "text").write_text("abcd" * (num_characters // 4) + "a" * (num_characters % 4))
    flags = [
        "--corpus.source", tmp_path / "text", "--stream.batch_size", 8, "--stream.num_steps", 20, "--stream.offset", 0,
        "--model.hidden_size", 4, "--train.max_steps", 1, "--run.storage", tmp_path, "--scale.workers", 0,
    ]  # fmt: skip
    ended = job("train", *flags)
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[0].endswith(f"{num_characters} tokens, 5 distinct{share}")
