"""Workers wait for a save of one of them that is retried."""

import time
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from test_shared_memory import free_port
from torch import multiprocessing

from job.distributed.context import World
from job.training.checkpoint_writer import CheckpointWriter

HANG_TIMEOUT = timedelta(seconds=1)


def save_and_exchange(rank: int, port: int) -> None:
    """The second worker's save takes longer than the others wait for an exchange."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=HANG_TIMEOUT
    )
    scale = SimpleNamespace(hang_timeout=HANG_TIMEOUT.total_seconds())
    spec = SimpleNamespace(config=SimpleNamespace(scale=scale))
    writer = CheckpointWriter(spec, World(rank, 2, torch.device("cpu"), 1, "abcdef"), lambda _: None)
    writer.pending = writer.thread.submit(time.sleep, 3 * rank)
    writer.wait_for_all()
    gradient = torch.ones(1)
    dist.all_reduce(gradient)
    assert gradient == 2
    dist.destroy_process_group()


def test_worker_whose_save_is_retried_for_longer_than_hang_timeout_is_waited_for():
    """The other workers gave up."""
    multiprocessing.spawn(save_and_exchange, (free_port(),), nprocs=2)
