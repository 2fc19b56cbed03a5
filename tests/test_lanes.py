"""Lane arithmetic: every lane and every token exactly once, for any number of workers."""

import itertools

import pytest

from job.data.lanes import lane_groups_of_worker, sequential_partition, split_evenly


@pytest.mark.parametrize(("total", "num_ranges"), [(1, 1), (8, 3), (32, 3), (64, 7), (5, 5)])
def test_split_evenly_gives_contiguous_ranges_of_similar_size(total: int, num_ranges: int) -> None:
    ranges = split_evenly(total, num_ranges)
    assert [number for numbers in ranges for number in numbers] == list(range(total))
    sizes = [len(numbers) for numbers in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("num_groups", "num_workers"),
    [(groups, workers) for groups in (0, 1, 3, 8, 50) for workers in (1, 2, 3) if groups != 1 or workers == 1],
)
def test_lane_groups_of_all_workers_contain_every_lane_once_in_order(num_groups: int, num_workers: int) -> None:
    workers = [lane_groups_of_worker(32, num_groups, rank, num_workers) for rank in range(num_workers)]
    for groups in workers:
        assert groups
        assert all(a.stop == b.start for a, b in itertools.pairwise(groups))
    assert [lane for groups in workers for group in groups for lane in group] == list(range(32))


def test_lane_groups_do_not_depend_on_number_of_workers() -> None:
    expected = lane_groups_of_worker(30, 8, 0, 1)
    for num_workers in range(2, 9):
        workers = [lane_groups_of_worker(30, 8, rank, num_workers) for rank in range(num_workers)]
        assert [group for groups in workers for group in groups] == expected


def test_sequential_partition_never_reads_past_the_end() -> None:
    for num_tokens, offset, lanes, steps in itertools.product(range(60), range(4), range(1, 6), range(1, 6)):
        partition = sequential_partition(num_tokens, offset, lanes, steps)
        if partition.num_windows:
            assert partition.offset + lanes * partition.lane_length + 1 <= num_tokens
