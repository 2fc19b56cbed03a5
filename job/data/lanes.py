"""Which tokens each lane reads, and which lanes each worker holds; pure integers.

A stream of 26 tokens, from offset 1, in 3 lanes of 8 tokens, with windows of 3 steps::

    a│b c d│e f g│h i│      lane 0: b … i        A window is a column of blocks. The last, narrower
     │j k l│m n o│p q│      lane 1: j … q        column is dropped, as in the d2l book (section
     │r s t│u v w│x y│z     lane 2: r … y        "Sequential Partitioning").

The target of a token is its successor in the stream, so the last target of lane 0 is j. A lane is identified by its
global number only; no result depends on which worker holds it.
"""

from dataclasses import dataclass
from itertools import pairwise


def split_evenly(total: int, num_ranges: int) -> list[range]:
    """Splits ``range(total)`` into contiguous ranges whose sizes differ by at most one, larger ones first.

    >>> split_evenly(8, 3)
    [range(0, 3), range(3, 6), range(6, 8)]
    """
    size, num_larger = divmod(total, num_ranges)
    starts = [index * size + min(index, num_larger) for index in range(num_ranges + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def lane_groups_of_worker(num_lanes: int, num_groups: int, rank: int, num_workers: int) -> list[range]:
    """Returns the lanes of each lane group that a worker holds.

    Args:
        num_lanes: lanes of all workers
        num_groups: lane groups of all workers (at most one per lane), each held by a single worker, so that the groups
            do not depend on the number of workers; 0: one group per worker
        rank: rank of the worker
        num_workers: number of workers
    """
    if not num_groups:
        return [split_evenly(num_lanes, num_workers)[rank]]
    groups = split_evenly(num_lanes, min(num_groups, num_lanes))
    return [groups[index] for index in split_evenly(len(groups), num_workers)[rank]]


@dataclass(frozen=True)
class Partition:
    """How one epoch divides the stream: lane ``n`` starts at ``offset + n * lane_length``."""

    offset: int
    lane_length: int
    num_windows: int


def sequential_partition(num_tokens: int, offset: int, num_lanes: int, num_steps: int) -> Partition:
    """Returns the d2l book's sequential partition of a stream, whose last token is only a target."""
    lane_length = max(0, num_tokens - offset - 1) // num_lanes
    return Partition(offset, lane_length, lane_length // num_steps)
