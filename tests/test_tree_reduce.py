"""The fixed-order sum over lane groups: the same for any number of workers."""

import pytest
import torch

from job.data.lanes import split_evenly
from job.distributed.tree_reduce import owned_subtrees, reduce_adjacent, transfers, tree_sum


def sum_pairwise(values: list[torch.Tensor]) -> torch.Tensor:
    while len(values) > 1:
        values = [sum(values[i + 1 : i + 2], start=values[i]) for i in range(0, len(values), 2)]
    return values[0]


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 7, 8, 13])
def test_reduce_adjacent_on_any_number_of_workers_equals_pairwise_sum(num_groups: int) -> None:
    scale = torch.logspace(-6, 6, num_groups)
    values = torch.randn(num_groups, generator=torch.Generator().manual_seed(num_groups)) * scale
    leaves = [(range(i, i + 1), value) for i, value in enumerate(values)]
    for num_workers in range(1, num_groups + 1):
        partial_sums: list[tuple[range, torch.Tensor]] = []
        for groups in split_evenly(num_groups, num_workers):
            subtrees: list[tuple[range, torch.Tensor]] = []
            for span, value in leaves[groups.start : groups.stop]:
                subtrees = reduce_adjacent([*subtrees, (span, value.clone())], num_groups)
            assert [span for span, _ in subtrees] == owned_subtrees(groups, num_groups)
            partial_sums += subtrees
        [(span, total)] = reduce_adjacent(partial_sums, num_groups)
        assert span == range(num_groups)
        assert torch.equal(total, sum_pairwise(list(values)))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 7, 8, 13])
def test_tree_sum_equals_pairwise_sum(num_groups: int) -> None:
    values = torch.randn(num_groups, generator=torch.Generator().manual_seed(num_groups)).double()
    assert tree_sum(values.tolist()) == float(sum_pairwise(list(values)))


def test_owned_subtrees_are_the_largest_that_the_groups_cover() -> None:
    assert owned_subtrees(range(4), 8) == [range(4)]
    assert owned_subtrees(range(3, 8), 8) == [range(3, 4), range(4, 8)]
    assert owned_subtrees(range(4, 6), 6) == [range(4, 6)]


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 8, 13, 64])
def test_transfers_bring_each_node_to_its_sibling_in_log_rounds(num_groups: int) -> None:
    """A worker sends and receives at most one partial sum per round, whatever the number of workers."""
    leaves = torch.logspace(-6, 6, num_groups) * torch.randn(num_groups, generator=torch.Generator().manual_seed(1))
    for num_workers in range(1, num_groups + 1):
        groups = split_evenly(num_groups, num_workers)
        rounds = transfers(groups)
        assert len(rounds) == (num_groups - 1).bit_length()
        held = [reduce_adjacent([(range(i, i + 1), leaves[i].clone()) for i in own], num_groups) for own in groups]
        for messages in rounds:
            for ranks in ([message.source for message in messages], [message.target for message in messages]):
                assert len(set(ranks)) == len(ranks)
            sent = [held[message.source].pop(0) for message in messages]
            assert [span for span, _ in sent] == [message.span for message in messages]
            for message, partial_sum in zip(messages, sent, strict=True):
                held[message.target] = reduce_adjacent([*held[message.target], partial_sum], num_groups)
        assert [len(partial_sums) for partial_sums in held] == [1] + [0] * (num_workers - 1)
        assert torch.equal(held[0][0][1], sum_pairwise(list(leaves)))
