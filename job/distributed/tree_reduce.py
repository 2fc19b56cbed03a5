"""Sums over lane groups in one fixed order, independent of which worker holds which groups.

Floating-point addition is not associative. The lane groups are therefore always added along the same binary
tree over their numbers (EasyScale, SC'23). A node of the tree is the sum of a range of groups that starts at
a multiple of a power of two and has that length, or ends at the last group. A worker that holds all groups
of a node can compute the node by itself.
"""

from collections.abc import Sequence
from operator import iadd
from typing import Any, NamedTuple, Protocol, TypeVar


class _Addable(Protocol):
    def __add__(self, other: Any, /) -> Any: ...


Value = TypeVar("Value", bound=_Addable)
PartialSum = tuple[range, Value]  # the groups that a sum covers, and the sum


def reduce_adjacent(partial_sums: Sequence[PartialSum[Value]], num_groups: int) -> list[PartialSum[Value]]:
    """Merges adjacent partial sums as far as the tree allows.

    Args:
        partial_sums: nodes of the tree, in the order of their groups; tensors are overwritten
        num_groups: number of lane groups in the whole tree

    Returns:
        The merged nodes in the same order: a single one if the inputs cover all groups.
    """
    merged, size = list(partial_sums), 1
    while size < num_groups:
        nodes, merged = merged, []
        for span, value in nodes:
            if merged and _are_siblings(merged[-1][0], span, size, num_groups):
                left_span, left_value = merged[-1]
                merged[-1] = range(left_span.start, span.stop), iadd(left_value, value)
            else:
                merged.append((span, value))
        size *= 2
    return merged


def owned_subtrees(groups: range, num_groups: int) -> list[range]:
    """Returns the largest subtrees that a worker can sum by itself, given the groups that it holds.

    >>> owned_subtrees(range(1, 5), 5)
    [range(1, 2), range(2, 4), range(4, 5)]
    """
    return [span for span, _ in reduce_adjacent([(range(i, i + 1), 0) for i in groups], num_groups)]


class Transfer(NamedTuple):
    """A partial sum that travels to the worker that holds its left sibling."""

    span: range
    source: int  # ranks
    target: int


def transfers(groups: Sequence[range]) -> list[list[Transfer]]:
    """Returns the transfers after which rank 0 holds the whole sum, in rounds; each needs the sums of those before.

    In a round a worker sends at most one partial sum, the first that it holds, and receives at most one.

    Args:
        groups: the lane groups of each worker, by their numbers

    >>> transfers([range(2), range(2, 3)])
    [[], [Transfer(span=range(2, 3), source=1, target=0)]]
    """
    num_groups, rounds, size = groups[-1].stop, [], 1
    holders = [rank for rank, numbers in enumerate(groups) for _ in numbers]
    while size < num_groups:
        rights = range(size, num_groups, 2 * size)
        sent = [Transfer(range(i, min(i + size, num_groups)), holders[i], holders[i - size]) for i in rights]
        rounds.append([transfer for transfer in sent if transfer.source != transfer.target])
        size *= 2
    return rounds


def tree_sum(values: Sequence[float]) -> float:
    """Returns the sum of one number per lane group, in the order of the tree."""
    return reduce_adjacent([(range(i, i + 1), value) for i, value in enumerate(values)], len(values))[0][1]


def _are_siblings(left: range, right: range, size: int, num_groups: int) -> bool:
    """Whether two nodes of ``size`` lane groups are children of the same node; only the last node may be shorter."""
    adjacent = left.stop == right.start and left.start % (2 * size) == 0
    return adjacent and len(left) == size and right.stop == min(right.start + size, num_groups)
