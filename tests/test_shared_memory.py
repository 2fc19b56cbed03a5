"""Collectives in shared memory: results, order of summation, timeouts, and which processes can form a group."""

import mmap
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import not_none
from torch.multiprocessing.spawn import spawn

from job.config.model import ModelConfig
from job.distributed import shared_memory
from job.distributed.gradient_sync import Batch, DeterministicGradients, LossModule, assign_lanes
from job.distributed.shared_memory import CACHE_LINE, SLOT_BYTES, SharedMemoryGroup, _attach, create_group, group_bytes
from job.kernels.build import load_library, unavailable_reason
from job.nn.language_model import build_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(load_library() is None, reason=f"no kernel: {unavailable_reason()}"),
]


def make_group(workers: int, timeout_s: float = 30.0) -> list[SharedMemoryGroup]:
    memory = mmap.mmap(-1, group_bytes(workers))
    return [SharedMemoryGroup(memory, rank, workers, timeout_s) for rank in range(workers)]


def run_concurrently(calls: list[Callable[..., Any]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_reduce_adds_in_order_of_ranks(workers: int, dtype: torch.dtype) -> None:
    members = make_group(workers)
    for count in (1, 2, 1000, SLOT_BYTES // dtype.itemsize, 3 * SLOT_BYTES // dtype.itemsize + 5):
        inputs = [torch.randn(count, dtype=dtype) for _ in members]
        expected = sum(inputs[1:], start=inputs[0])
        data = [tensor.clone() for tensor in inputs]
        run_concurrently([lambda m=m, x=x: m.all_reduce_(x) for m, x in zip(members, data, strict=True)])
        assert all(torch.equal(tensor, expected) for tensor in data)


@pytest.mark.parametrize("workers", [2, 3])
def test_all_gather_copies_all_ranks_data(workers: int) -> None:
    members = make_group(workers)
    for count in (1, 1000, 2 * SLOT_BYTES + 5):
        inputs = [torch.randint(0, 100, (count,), dtype=torch.uint8) for _ in members]
        outputs = [[torch.zeros_like(tensor) for tensor in inputs] for _ in members]
        calls = zip(members, inputs, outputs, strict=True)
        run_concurrently([lambda m=m, x=x, y=y: m.all_gather(x, y) for m, x, y in calls])
        assert all(torch.equal(torch.stack(gathered), torch.stack(inputs)) for gathered in outputs)


def test_alternating_collectives_are_correct_in_every_round() -> None:
    members, rounds = make_group(3), 2000

    def work(member: SharedMemoryGroup, failures: list[Any]) -> None:
        outputs = [torch.zeros(50) for _ in members]
        for number in range(rounds):
            data = torch.full((50,), float(number + member.group.rank))
            member.all_gather(data, outputs)
            member.all_reduce_(data)
            gathered = torch.equal(torch.stack(outputs)[:, 7], number + torch.arange(3.0))
            if not gathered or not torch.equal(data, torch.full((50,), 3.0 * number + 3)):
                failures.append(number)

    failures: list[Any] = []
    run_concurrently([lambda m=m: work(m, failures) for m in members])
    assert failures == []


@pytest.mark.parametrize("is_sum", [True, False])
def test_collective_without_one_rank_raises_after_timeout(is_sum: bool) -> None:
    first, second = make_group(3, timeout_s=0.2)[:2]
    raised = []

    def work(member: SharedMemoryGroup) -> None:
        with pytest.raises(RuntimeError, match=r"worker 2 did not respond for 0\.2 seconds"):
            member.all_reduce_(torch.ones(3)) if is_sum else member.all_gather(torch.ones(3), list(torch.ones(3, 3)))
        raised.append(member)

    run_concurrently([lambda: work(first), lambda: work(second)])
    assert len(raised) == 2


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def create_and_reduce(rank: int, port: int, rank_without_kernel: int | None, results: SimpleQueue[Any]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    if rank == rank_without_kernel:
        mock.patch.object(shared_memory, "load_library", lambda: None).start()
    group = create_group(30)
    data = torch.tensor([1.0 + rank])
    if group:
        group.all_reduce_(data)
    results.put((group is not None, float(data)))
    dist.destroy_process_group()


@pytest.mark.parametrize("rank_without_kernel", [None, 1])
def test_create_group_needs_the_kernel_on_all_ranks(rank_without_kernel: int | None) -> None:
    results = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(create_and_reduce, (free_port(), rank_without_kernel, results), nprocs=2)
    expected = [(True, 3.0)] * 2 if rank_without_kernel is None else [(False, 1.0), (False, 2.0)]
    assert sorted(results.get() for _ in range(2)) == expected


def gradients(rank: int, shared_memory: SharedMemoryGroup | None, world_size: int) -> list[torch.Tensor]:
    model = build_model(ModelConfig(hidden_size=32), 9, seed=1)
    assignment = assign_lanes(9, 8, rank, world_size)  # of three workers, two hold two subtrees and one holds one
    lanes = slice(assignment.lanes.start, assignment.lanes.stop)
    tokens = torch.randint(0, 9, (6, 9), generator=torch.Generator().manual_seed(0))
    flags = torch.tensor([0.0, rank == world_size - 1, 0.0])
    batch = Batch(tokens[:-1, lanes], tokens[1:, lanes], flags, torch.zeros(0, 9, dtype=torch.int32)[:, lanes])
    stats, _ = DeterministicGradients(LossModule(model, 45), assignment, shared_memory)(batch, None)
    return [stats] + [not_none(weight.grad) for weight in model.parameters()]


def compare_gradients(rank: int, port: int, workers: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    group = create_group(30)
    assert group
    alone = gradients(0, None, 1)
    for together in (gradients(rank, group, workers), gradients(rank, None, workers)):
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    dist.destroy_process_group()


def test_deterministic_gradients_are_bitwise_equal_alone_in_shared_memory_and_with_gloo() -> None:
    spawn(compare_gradients, (free_port(), 3), nprocs=3)


def test_attach_rejects_other_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"x" * 200)
    process = os.getpid()
    with path.open("r+b") as opened:
        file = opened.fileno()
        assert _attach(process, file, (b"x" * CACHE_LINE).hex(), 200) is not None
        assert _attach(process, file, (b"y" * CACHE_LINE).hex(), 200) is None
        assert _attach(process, file, (b"x" * CACHE_LINE).hex(), 100) is None
        monkeypatch.setattr(os.path, "samefile", lambda *paths: False)
        assert _attach(process, file, (b"x" * CACHE_LINE).hex(), 200) is None
    monkeypatch.undo()
    assert _attach(process, file, (b"x" * CACHE_LINE).hex(), 200) is None
    assert _attach(1 << 30, 0, (b"x" * CACHE_LINE).hex(), 200) is None
