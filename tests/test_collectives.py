"""Workers exchange plain data; nothing that arrives from another worker is unpickled."""

import math
import re

import pytest
import torch.distributed as dist
from conftest import ROOT
from test_shared_memory import free_port
from torch.multiprocessing.spawn import spawn

from job.distributed.collectives import broadcast_json, gather_json

VALUES = [None, 0.1 + 0.2, "é", {"name": [1, -0.0, math.inf]}, list(range(10_000))]


def exchange(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    for value in VALUES:
        assert broadcast_json(value if rank == 0 else "another") == value
        assert gather_json([rank] * rank) == [[], [1], [2, 2]]
        assert gather_json(value) == [value] * 3
    dist.destroy_process_group()


@pytest.mark.slow
def test_json_exchanged_between_workers_is_equal_to_what_was_sent() -> None:
    spawn(exchange, (free_port(),), nprocs=3)


@pytest.mark.parametrize("value", VALUES)
def test_json_without_process_group_is_returned(value: object) -> None:
    assert broadcast_json(value) == value
    assert gather_json(value) == [value]


def test_no_object_collective_is_left() -> None:
    """They unpickle what arrives through the network."""
    pattern = re.compile(r"object_list\(|all_gather_object|gather_object|scatter_object|\b(send|recv)_object")
    assert pattern.search("dist.broadcast_object_list([1])")
    assert not [path for path in (ROOT / "job").rglob("*.py") if pattern.search(path.read_text())]
