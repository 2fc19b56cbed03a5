"""The exchange in shared memory: the numbers, their order, and what happens where a worker does not come."""

import mmap
import os
import socket
import threading

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from job.config.schema import ModelConfig
from job.data.lanes import lane_groups_of_worker
from job.distributed import shared_memory
from job.distributed.gradient_sync import Batch, DeterministicGradients, LaneAssignment
from job.distributed.shared_memory import CACHE_LINE, SLOT_BYTES, SharedMemoryGroup, _attach, create_group, group_bytes
from job.kernels.build import load_library, unavailable_reason
from job.nn.language_model import build_model

pytestmark = pytest.mark.skipif(load_library() is None, reason=f"no kernel: {unavailable_reason()}")


def group(workers, timeout_s=30.0):
    memory = mmap.mmap(-1, group_bytes(workers))
    return [SharedMemoryGroup(memory, rank, workers, timeout_s) for rank in range(workers)]


def at_once(calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_get_the_sum_in_the_order_of_the_ranks(workers, dtype):
    members = group(workers)
    for count in (1, 2, 1000, SLOT_BYTES // dtype.itemsize, 3 * SLOT_BYTES // dtype.itemsize + 5):
        given = [torch.randn(count, dtype=dtype) for _ in members]
        expected = sum(given[1:], start=given[0])
        found = [numbers.clone() for numbers in given]
        at_once([lambda m=m, x=x: m.all_reduce_(x) for m, x in zip(members, found, strict=True)])
        assert all(torch.equal(numbers, expected) for numbers in found)


@pytest.mark.parametrize("workers", [2, 3])
def test_all_get_the_numbers_of_all(workers):
    members = group(workers)
    for count in (1, 1000, 2 * SLOT_BYTES + 5):
        given = [torch.randint(0, 100, (count,), dtype=torch.uint8) for _ in members]
        found = [[torch.zeros_like(numbers) for numbers in given] for _ in members]
        at_once([lambda m=m, x=x, to=to: m.all_gather(x, to) for m, x, to in zip(members, given, found, strict=True)])
        assert all(torch.equal(torch.stack(places), torch.stack(given)) for places in found)


def test_many_turns_in_a_row():
    members, turns = group(3), 2000

    def work(member, failures):
        places = [torch.zeros(50) for _ in members]
        for turn in range(turns):
            numbers = torch.full((50,), float(turn + member.group.rank))
            member.all_gather(numbers, places)
            member.all_reduce_(numbers)
            good = torch.equal(torch.stack(places)[:, 7], turn + torch.arange(3.0))
            if not good or not torch.equal(numbers, torch.full((50,), 3.0 * turn + 3)):
                failures.append(turn)

    failures = []
    at_once([lambda m=m: work(m, failures) for m in members])
    assert failures == []


@pytest.mark.parametrize("is_sum", [True, False])
def test_who_does_not_come_is_named(is_sum):
    first, second = group(3, timeout_s=0.2)[:2]
    found = []

    def work(member):
        with pytest.raises(RuntimeError, match=r"worker 2 did not respond for 0\.2 seconds"):
            member.all_reduce_(torch.ones(3)) if is_sum else member.all_gather(torch.ones(3), list(torch.ones(3, 3)))
        found.append(member)

    at_once([lambda: work(first), lambda: work(second)])
    assert len(found) == 2


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def met(rank, port, without, answers):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    if rank == without:
        shared_memory.load_library = lambda: None
    near = create_group(30)
    numbers = torch.tensor([1.0 + rank])
    if near:
        near.all_reduce_(numbers)
    answers.put((near is not None, float(numbers)))
    dist.destroy_process_group()


@pytest.mark.parametrize("without", [None, 1])
def test_processes_meet_where_all_can(without):
    port = free_port()
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(met, (port, without, answers), nprocs=2)
    found = sorted(answers.get() for _ in range(2))
    assert found == ([(True, 3.0)] * 2 if without is None else [(False, 1.0), (False, 2.0)])


def gradients(rank, near, workers):
    net = build_model(ModelConfig(hidden_size=32), 9, seed=1)
    lanes = lane_groups_of_worker(
        9, 8, rank, workers
    )  # of three workers two have two nodes of the tree, and one has one
    held = slice(lanes[0].start, lanes[-1].stop)
    tokens = torch.randint(0, 9, (6, 9), generator=torch.Generator().manual_seed(0))
    signals = torch.tensor([0.0, rank == workers - 1, 0.0])
    window = Batch(tokens[:-1, held], tokens[1:, held], signals, torch.zeros(0, 9, dtype=torch.int32)[:, held])
    found, _ = DeterministicGradients(net, LaneAssignment(lanes, workers, 45, near=near))(window, None)
    return [found] + [weight.grad for weight in net.parameters()]


def ordered(rank, port, workers):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    near = create_group(30)
    assert near
    alone, together, by_gloo = gradients(0, None, 1), gradients(rank, near, workers), gradients(rank, None, workers)
    for one, two, three in zip(alone, together, by_gloo, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    dist.destroy_process_group()


def test_ordered_gradients_are_the_same_bits_alone_in_one_memory_and_by_gloo():
    multiprocessing.spawn(ordered, (free_port(), 3), nprocs=3)


def test_another_machines_memory_is_not_taken(tmp_path, monkeypatch):
    mine = tmp_path / "memory"
    mine.write_bytes(b"x" * 200)
    here = os.getpid()
    with mine.open("r+b") as opened:
        file = opened.fileno()
        assert _attach(here, file, b"x" * CACHE_LINE, 200) is not None
        assert _attach(here, file, b"y" * CACHE_LINE, 200) is None
        assert _attach(here, file, b"x" * CACHE_LINE, 100) is None
        monkeypatch.setattr(os.path, "samefile", lambda *places: False)
        assert _attach(here, file, b"x" * CACHE_LINE, 200) is None
    monkeypatch.undo()
    assert _attach(here, file, b"x" * CACHE_LINE, 200) is None
    assert _attach(1 << 30, 0, b"x" * CACHE_LINE, 200) is None
