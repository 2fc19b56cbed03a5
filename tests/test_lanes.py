"""Lane arithmetic: every token once, whoever holds it."""

import itertools
import sys

import numpy as np
import pytest
import torch

from job.config.schema import StreamConfig
from job.data.lanes import lane_groups_of_worker, sequential_partition, split_evenly
from job.data.stream import Stream
from job.distributed.context import _cgroup_cpu_limit
from job.distributed.tree_reduce import owned_subtrees, reduce_adjacent, tree_sum


@pytest.mark.parametrize(("total", "parts"), [(1, 1), (8, 3), (32, 3), (64, 7), (5, 5)])
def test_split_is_contiguous_and_even(total, parts):
    ranges = split_evenly(total, parts)
    assert [number for part in ranges for number in part] == list(range(total))
    sizes = [len(part) for part in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("groups", [0, 1, 3, 8, 50])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_hold_every_lane_once_in_order(groups, workers):
    held = (
        [lane_groups_of_worker(32, groups, worker, workers) for worker in range(workers)]
        if groups != 1 or workers == 1
        else []
    )
    for worker in held:
        assert worker
        assert all(a.stop == b.start for a, b in itertools.pairwise(worker))
    lanes = [lane for worker in held for group in worker for lane in group]
    assert not held or lanes == list(range(32))


def test_groups_are_the_same_on_any_number_of_workers():
    alone = lane_groups_of_worker(30, 8, 0, 1)
    for workers in range(2, 9):
        assert [group for worker in range(workers) for group in lane_groups_of_worker(30, 8, worker, workers)] == alone


def by_pairs(parts):
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + 2], start=parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 8, 13])
def test_the_tree_over_groups_is_one_however_they_are_held(groups):
    values = torch.randn(groups, generator=torch.Generator().manual_seed(groups)) * torch.logspace(-6, 6, groups)
    leaves = [(range(i, i + 1), value) for i, value in enumerate(values)]
    for workers in range(1, groups + 1):
        owned = split_evenly(groups, workers)
        nodes = [[] for own in owned]
        for place, own in enumerate(owned):
            for leaf in leaves[own.start : own.stop]:
                nodes[place] = reduce_adjacent([*nodes[place], leaf], groups)
        assert [[span for span, _ in held] for held in nodes] == [owned_subtrees(own, groups) for own in owned]
        [(span, found)] = reduce_adjacent([node for held in nodes for node in held], groups)
        assert span == range(groups)
        assert torch.equal(found, by_pairs(list(values)))
    assert tree_sum(values.tolist()) == float(by_pairs(list(values.double())))


def test_who_holds_half_of_the_groups_has_one_node():
    assert owned_subtrees(range(4), 8) == [range(4)]
    assert owned_subtrees(range(3, 8), 8) == [range(3, 4), range(4, 8)]
    assert owned_subtrees(range(4, 6), 6) == [range(4, 6)]


def books_partition(corpus, batch_size, num_steps, offset):
    """The sequential partition as the d2l book describes it, in plain numpy."""
    used = (len(corpus) - offset - 1) // batch_size * batch_size
    xs = corpus[offset : offset + used].reshape(batch_size, -1)
    ys = corpus[offset + 1 : offset + 1 + used].reshape(batch_size, -1)
    for start in range(0, xs.shape[1] // num_steps * num_steps, num_steps):
        yield xs[:, start : start + num_steps], ys[:, start : start + num_steps]


@pytest.mark.parametrize(("tokens", "batch", "steps", "offset"), [(35, 2, 5, 0), (1000, 7, 11, 3), (26, 3, 3, 1)])
def test_windows_are_the_books(tokens, batch, steps, offset):
    corpus = np.arange(tokens, dtype=np.int32)
    stream = Stream(corpus, StreamConfig(batch_size=batch, num_steps=steps, offset=offset), seed=0)
    windows = list(books_partition(corpus, batch, steps, offset))
    assert stream.partition(0).num_windows == len(windows)
    for index, (xs, ys) in enumerate(windows):
        parts = [stream.read_window(0, index, lanes) for lanes in split_evenly(batch, 2)]
        np.testing.assert_array_equal(np.concatenate([x.numpy() for x, _ in parts], 1).T, xs)
        np.testing.assert_array_equal(np.concatenate([y.numpy() for _, y in parts], 1).T, ys)


def test_random_offsets_are_a_function_of_seed_and_epoch():
    def offsets(seed):
        stream = Stream(np.zeros(9, np.int32), StreamConfig(num_steps=40), seed)
        return [stream.offset(epoch) for epoch in range(500)]

    assert offsets(1) == offsets(1) != offsets(2)
    assert set(offsets(1)) == set(range(41))


def test_a_cut_never_reads_past_the_end():
    for tokens, offset, lanes, steps in itertools.product(range(60), range(4), range(1, 6), range(1, 6)):
        found = sequential_partition(tokens, offset, lanes, steps)
        if found.num_windows:
            assert found.offset + lanes * found.lane_length + 1 <= tokens


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, sys.maxsize),
        ({"cpu.max": "max 100000"}, sys.maxsize),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, sys.maxsize),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_a_containers_quota_bounds_the_cores(tmp_path, files, granted):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert _cgroup_cpu_limit(tmp_path) == granted
