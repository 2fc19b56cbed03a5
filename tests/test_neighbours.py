"""Sums in shared memory: the numbers, their order, and what happens where a worker does not come."""

import mmap
import os
import socket
import threading

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from job import compiled, neighbours
from job.neighbours import LINE, ROOM, Neighbours

pytestmark = pytest.mark.skipif(compiled.library() is None, reason=f"no kernel: {compiled.why_not()}")


def group(workers, patience=30.0):
    memory = mmap.mmap(-1, LINE + workers * LINE + (workers + 1) * ROOM)
    return [Neighbours(memory, rank, workers, patience) for rank in range(workers)]


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
    for count in (1, 2, 1000, ROOM // dtype.itemsize, 3 * ROOM // dtype.itemsize + 5):
        given = [torch.randn(count, dtype=dtype) for _ in members]
        expected = sum(given[1:], start=given[0])
        found = [numbers.clone() for numbers in given]
        at_once([lambda m=m, x=x: m.add_up(x) for m, x in zip(members, found, strict=True)])
        assert all(torch.equal(numbers, expected) for numbers in found)


def test_many_turns_in_a_row():
    members, turns = group(3), 2000

    def work(member, failures):
        for turn in range(turns):
            numbers = torch.full((50,), float(turn + member.group.rank))
            member.add_up(numbers)
            if not torch.equal(numbers, torch.full((50,), 3.0 * turn + 3)):
                failures.append(turn)

    failures = []
    at_once([lambda m=m: work(m, failures) for m in members])
    assert failures == []


def test_who_does_not_come_is_named():
    first, second = group(3, patience=0.2)[:2]
    found = []

    def work(member):
        with pytest.raises(RuntimeError, match=r"worker 2 was silent for 0\.2 seconds"):
            member.add_up(torch.ones(3))
        found.append(member)

    at_once([lambda: work(first), lambda: work(second)])
    assert len(found) == 2


def met(rank, port, without, answers):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    if rank == without:
        neighbours.compiled.library = lambda: None
    near = neighbours.meet(30)
    numbers = torch.tensor([1.0 + rank])
    if near:
        near.add_up(numbers)
    answers.put((near is not None, float(numbers)))
    dist.destroy_process_group()


@pytest.mark.parametrize("without", [None, 1])
def test_processes_meet_where_all_can(without):
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(met, (port, without, answers), nprocs=2)
    found = sorted(answers.get() for _ in range(2))
    assert found == ([(True, 3.0)] * 2 if without is None else [(False, 1.0), (False, 2.0)])


def test_another_machines_memory_is_not_taken(tmp_path, monkeypatch):
    mine = tmp_path / "memory"
    mine.write_bytes(b"x" * 200)
    here = os.getpid()
    with mine.open("r+b") as opened:
        file = opened.fileno()
        assert neighbours._opened(here, file, b"x" * LINE, 200) is not None
        assert neighbours._opened(here, file, b"y" * LINE, 200) is None
        assert neighbours._opened(here, file, b"x" * LINE, 100) is None
        monkeypatch.setattr(os.path, "samefile", lambda *places: False)
        assert neighbours._opened(here, file, b"x" * LINE, 200) is None
    monkeypatch.undo()
    assert neighbours._opened(here, file, b"x" * LINE, 200) is None
    assert neighbours._opened(1 << 30, 0, b"x" * LINE, 200) is None
