"""Workers wait for a save of one of them that is retried."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_shared_memory import free_port
from torch.multiprocessing.spawn import spawn

from job.distributed.context import World
from job.training.checkpoint_writer import CheckpointWriter

HANG_TIMEOUT_S = 1.0


def save_and_wait(rank: int, port: int, saved: Path) -> None:
    """The second worker's save takes longer than the others wait for an exchange."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    spec: Any = SimpleNamespace(config=SimpleNamespace(scale=SimpleNamespace(hang_timeout=HANG_TIMEOUT_S)))
    writer = CheckpointWriter(spec, World(rank, 2, torch.device("cpu"), 1, "abcdef"), lambda _: None)

    def save() -> None:
        time.sleep(3 * HANG_TIMEOUT_S)
        saved.touch()

    if rank == 1:
        writer.pending = writer.thread.submit(save)
    writer.wait_for_all()
    assert saved.exists()
    dist.destroy_process_group()


@pytest.mark.slow
def test_worker_whose_save_is_retried_for_longer_than_hang_timeout_is_waited_for(tmp_path: Path) -> None:
    """The other workers gave up."""
    spawn(save_and_wait, (free_port(), tmp_path / "saved"), nprocs=2)
