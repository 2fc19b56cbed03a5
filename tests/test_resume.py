"""All workers resume from the same checkpoint, which rank 0 reads and of which each verifies a share."""

import multiprocessing
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import not_none
from test_shared_memory import free_port
from test_survival import GOLDEN
from torch.multiprocessing.spawn import spawn

from job.config.schema import Config
from job.data.lanes import split_evenly
from job.distributed.context import World
from job.storage import Folder
from job.training.checkpoint import (
    Checkpoint,
    FileContents,
    checkpoint_name,
    commit_checkpoint,
    load_lane_state,
    read_manifest,
    serialize_lane_state,
    write_part,
)
from job.training.progress import Progress
from job.training.resume import agree_on_resume_point

WORKERS = 3


def write_checkpoint(folder: Folder, step: int) -> Checkpoint:
    """The golden checkpoint as another number of workers would have written it."""
    state: Any = load_lane_state(read_manifest(Folder(str(GOLDEN.parent)), GOLDEN.name), range(8))
    files: FileContents = {
        path.name: [path.read_bytes()] for path in GOLDEN.iterdir() if not path.name.startswith(("lanes", "mani"))
    }
    for lanes in split_evenly(8, 5):
        files |= serialize_lane_state(lanes, tuple(part[:, lanes.start : lanes.stop] for part in state))
    name = checkpoint_name(step, "abcdef")
    return commit_checkpoint(folder, name, [write_part(folder, name, files, 1, Progress(step=step))])


def resume(rank: int, port: int, folder: str, results: SimpleQueue[Any]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    files_read = []
    read_with = Folder.read_with

    def recorded(self: Folder, name: str, *more: Any) -> Any:
        files_read.append(name)
        return read_with(self, name, *more)

    mock.patch.object(Folder, "read_with", recorded).start()
    spec: Any = SimpleNamespace(config=Config(), checkpoints=Folder(folder))
    try:
        point, skipped, precision = agree_on_resume_point(spec, World(rank, WORKERS, torch.device("cpu"), 1, "a"))
        point = not_none(point)
        tensors = [*point.weights.values(), *point.optimizer.values()]
        total = sum(float(tensor.double().sum()) for tensor in tensors)
        reasons = [(error.name, error.reason) for error in skipped]
        results.put((rank, files_read, point.checkpoint.name, len(tensors), total, reasons, precision))
    except Exception as error:
        results.put((rank, type(error).__name__, str(error)))
    finally:
        dist.destroy_process_group()


def resume_on_workers(folder: Path) -> list[tuple[Any, ...]]:
    results = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(resume, (free_port(), str(folder), results), nprocs=WORKERS)
    return sorted(results.get() for _ in range(WORKERS))


@pytest.mark.slow
def test_workers_load_checkpoint_that_rank_0_reads_and_skip_one_with_a_damaged_part(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_checkpoint(folder, 10)
    last = write_checkpoint(folder, 20)
    damaged = sorted(file for file in last.files if file.startswith("lanes"))[4]  # the share of worker 1
    path = tmp_path / last.name / damaged
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    results = resume_on_workers(tmp_path)
    assert len({str(result[2:]) for result in results}) == 1
    reason = f"{damaged} is damaged: its checksum differs from the manifest's"
    _, _, name, num_tensors, _, skipped, precision = results[0]
    assert (name, skipped, precision) == ("step-000010-abcdef", [("step-000020-abcdef", reason)], "fp32")
    assert num_tensors > 4
    files_read = [result[1] for result in results]
    assert ["model.safetensors" in files for files in files_read] == [True, False, False]
    lanes = [[file for file in files if file.startswith("lanes")] for files in files_read]
    assert [len(files) for files in lanes] == [4, 4, 2]  # of two checkpoints with five parts each


def test_worker_that_does_not_see_a_checkpoint_fails_without_calling_it_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(Folder(str(tmp_path)), 10)
    seen_by_rank_0 = [checkpoint.name, checkpoint.step, checkpoint.files, None]
    monkeypatch.setattr("job.training.resume.broadcast_json", lambda *_: ([seen_by_rank_0], []))
    spec: Any = SimpleNamespace(config=Config(), checkpoints=Folder(str(tmp_path / "not mounted")))
    with pytest.raises(RuntimeError, match="worker 1 does not see it"):
        agree_on_resume_point(spec, World(1, 2, torch.device("cpu"), 1, "a"))
