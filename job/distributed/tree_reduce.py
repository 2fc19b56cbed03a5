"""Sums over the lane groups in one order, whoever holds which groups.

Floating-point addition is not associative. Groups are added as a binary tree over their numbers (EasyScale,
SC'23): a node of it is the sum of a range of groups that begins at a multiple of a power of two and is so
long, or goes to the last group. Who holds all groups of a node can add it by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PartialSum = tuple[range, Tensor]


def reduce_adjacent(nodes: Sequence[PartialSum], groups: int) -> list[PartialSum]:
    """Nodes, in the groups' order, added as far as neighbours are at hand: to one where they cover all groups."""
    found, size = list(nodes), 1
    while size < groups:
        below, found = found, []
        for right, value in below:
            if found and _have_common_parent(found[-1][0], right, size, groups):
                left, other = found[-1]
                found[-1] = range(left.start, right.stop), other + value
            else:
                found.append((right, value))
        size *= 2
    return found


def owned_subtrees(held: range, groups: int) -> list[range]:
    """The nodes as far as who holds those groups can add them.

    >>> nodes_of(range(1, 5), 5)
    [range(1, 2), range(2, 4), range(4, 5)]
    """
    nothing = torch.zeros(())
    return [node for node, _ in reduce_adjacent([(range(i, i + 1), nothing) for i in held], groups)]


def _have_common_parent(left: range, right: range, size: int, groups: int) -> bool:
    """Whether both are nodes of that size with one above them; the last node may be shorter."""
    follow = left.stop == right.start and left.start % (2 * size) == 0
    return follow and len(left) == size and right.stop == min(right.start + size, groups)


def tree_sum(values: Sequence[float]) -> float:
    """The sum of the groups' numbers."""
    leaves = [(range(i, i + 1), torch.tensor(value, dtype=torch.float64)) for i, value in enumerate(values)]
    return float(reduce_adjacent(leaves, len(leaves))[0][1])
