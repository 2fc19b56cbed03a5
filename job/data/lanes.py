"""Which tokens each lane owns, and which lanes each worker owns; pure integers.

A stream of 26 tokens, from offset 1, in 3 lanes of 8 tokens; windows of 3 steps::

    a│b c d│e f g│h i│      lane 0: b … i        a window is a column of blocks; the last,
     │j k l│m n o│p q│      lane 1: j … q        narrower one is left out, as in the d2l book
     │r s t│u v w│x y│z     lane 2: r … y        (section "Sequential Partitioning")

The target of a token is its successor in the stream, so lane 0's last target is j. A lane is
known by its number alone: no result depends on which worker holds it.
"""

from dataclasses import dataclass
from itertools import pairwise


def split_evenly(total: int, parts: int) -> list[range]:
    """``range(total)`` in contiguous parts whose sizes differ by one at most, larger ones first.

    >>> split(8, 3)
    [range(0, 3), range(3, 6), range(6, 8)]
    """
    size, larger = divmod(total, parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def lane_groups_of_worker(lanes: int, groups: int, worker: int, workers: int) -> list[range]:
    """The lane groups that a worker holds, each the range of its lanes.

    With ``groups = 0`` a worker's lanes are one group, cut to the number of workers. Else there
    are so many groups (at most one a lane) whatever the number of workers, and a worker holds
    whole ones.
    """
    if not groups:
        return [split_evenly(lanes, workers)[worker]]
    parts = split_evenly(lanes, min(groups, lanes))
    return [parts[group] for group in split_evenly(len(parts), workers)[worker]]


@dataclass(frozen=True)
class Partition:
    """How a stream is cut in one epoch."""

    offset: int
    lane_length: int
    num_windows: int


def sequential_partition(tokens: int, offset: int, lanes: int, num_steps: int) -> Partition:
    """The book's sequential partition of ``tokens`` tokens, of which the last is only a target."""
    lane_length = max(0, tokens - offset - 1) // lanes
    return Partition(offset, lane_length, lane_length // num_steps)
