"""The sum over all workers' lane groups: the same bits in shared memory and over a network, in bounded memory."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_shared_memory import free_port, make_group, run_concurrently
from torch.multiprocessing.spawn import spawn

from job.data.lanes import split_evenly
from job.distributed.shared_memory import SLOT_BYTES, SharedMemoryGroup
from job.distributed.tree_exchange import TreeExchange
from job.distributed.tree_reduce import reduce_adjacent
from job.kernels.build import load_library, unavailable_reason


def partial_sums(numbers: range, num_groups: int, length: int) -> list[tuple[range, torch.Tensor]]:
    """The subtrees of these lane groups, whose gradients are random, and of very different sizes."""
    vectors = []
    for number in numbers:
        values = torch.randn(length, generator=torch.Generator().manual_seed(number)) * 10.0 ** (number % 7)
        vectors.append((range(number, number + 1), values))
    return reduce_adjacent(vectors, num_groups)


def expected_sum(num_groups: int, length: int) -> torch.Tensor:
    return partial_sums(range(num_groups), num_groups, length)[0][1]


@pytest.mark.skipif(load_library() is None, reason=f"no kernel: {unavailable_reason()}")
@pytest.mark.parametrize(("workers", "num_groups"), [(2, 2), (3, 8), (7, 13)])
def test_exchange_in_shared_memory_gathers_at_most_one_slot_per_worker(
    workers: int, num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, gathered = 700_000, []
    groups, members = split_evenly(num_groups, workers), make_group(workers)
    results = [torch.empty(0)] * workers
    all_gather = type(members[0]).all_gather

    def recorded(self: SharedMemoryGroup, data: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        gathered.append(sum(output.nbytes for output in outputs))
        all_gather(self, data, outputs)

    def work(rank: int) -> None:
        exchange = TreeExchange(groups, rank, members[rank])
        results[rank] = exchange.sum(partial_sums(groups[rank], num_groups, length))

    monkeypatch.setattr(type(members[0]), "all_gather", recorded)
    run_concurrently([lambda rank=rank: work(rank) for rank in range(workers)])
    assert all(torch.equal(found, expected_sum(num_groups, length)) for found in results)
    assert 0 < max(gathered) <= workers * SLOT_BYTES


def exchange_over_network(rank: int, port: int, workers: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    mock.patch.object(dist, "all_gather", None).start()  # would take memory in proportion to the number of workers
    for num_groups in range(workers, 14):
        groups = split_evenly(num_groups, workers)
        found = TreeExchange(groups, rank, None).sum(partial_sums(groups[rank], num_groups, 1000))
        assert torch.equal(found, expected_sum(num_groups, 1000))
    dist.destroy_process_group()


@pytest.mark.slow
def test_exchange_over_network_is_bitwise_equal_to_one_worker() -> None:
    spawn(exchange_over_network, (free_port(), 4), nprocs=4)
