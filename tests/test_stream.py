"""Windows of a stream: equal to the d2l book's, for any division of the lanes."""

import numpy as np
import pytest

from job.config.schema import StreamConfig, TrainConfig
from job.data.lanes import split_evenly
from job.data.stream import Stream
from job.errors import UserError


def book_windows(corpus, batch_size, num_steps, offset):
    """The windows of the d2l book's sequential partitioning, in plain numpy."""
    used = (len(corpus) - offset - 1) // batch_size * batch_size
    xs = corpus[offset : offset + used].reshape(batch_size, -1)
    ys = corpus[offset + 1 : offset + 1 + used].reshape(batch_size, -1)
    for start in range(0, xs.shape[1] // num_steps * num_steps, num_steps):
        yield xs[:, start : start + num_steps], ys[:, start : start + num_steps]


@pytest.mark.parametrize(("num_tokens", "batch", "steps", "offset"), [(35, 2, 5, 0), (1000, 7, 11, 3), (26, 3, 3, 1)])
def test_read_window_matches_the_book(num_tokens, batch, steps, offset):
    corpus = np.arange(num_tokens, dtype=np.int32)
    stream = Stream(corpus, StreamConfig(batch_size=batch, num_steps=steps, offset=offset), seed=0)
    windows = list(book_windows(corpus, batch, steps, offset))
    assert stream.partition(0).num_windows == len(windows)
    for index, expected in enumerate(windows):
        lane_ranges = [stream.read_window(0, index, lanes) for lanes in split_evenly(batch, 2)]
        for tensors, array in zip(zip(*lane_ranges, strict=True), expected, strict=True):
            np.testing.assert_array_equal(np.concatenate(tensors, 1).T, array)


def test_random_offset_is_a_function_of_seed_and_epoch():
    def offsets(seed):
        stream = Stream(np.zeros(9, np.int32), StreamConfig(num_steps=40), seed)
        return [stream.offset(epoch) for epoch in range(500)]

    assert offsets(1) == offsets(1) != offsets(2)
    assert set(offsets(1)) == set(range(41))


@pytest.mark.parametrize(("offset", "num_required"), [("random", 17), (2, 15), ((0, 3), 16)])
def test_check_enough_tokens_raises_if_an_epoch_may_have_no_window(offset, num_required):
    stream_config, train_config = StreamConfig(batch_size=3, num_steps=4, offset=offset), TrainConfig(epochs=2)
    Stream(np.zeros(num_required, np.int32), stream_config, 0).check_enough_tokens(train_config)
    with pytest.raises(UserError, match=f"need {num_required} tokens"):
        Stream(np.zeros(num_required - 1, np.int32), stream_config, 0).check_enough_tokens(train_config)
