"""Workers on GPUs of a machine: one on each, or several that share one; what ``doctor`` shows of them."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from conftest import job, result, start_job

from job.cluster.resources import Placement, local_placement
from job.cluster.train_worker import worker_device
from job.cluster.tune import _connected
from job.config.run import ScaleConfig
from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.console import Console
from job.distributed.context import local_device
from job.errors import UserError

pytestmark = pytest.mark.gpu


def place(gpus: int, **scale: str | int) -> Placement:
    return local_placement(ScaleConfig(**scale), cores=8, gpus=gpus)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "workers", "share", "notice"),
    [
        (1, 1, 1, ""),
        (4, 4, 1, ""),
        (1, 2, 0.5, "this machine has 1 GPU: up to 2 workers share one"),
        (1, 3, 0.3333, "this machine has 1 GPU: up to 3 workers share one"),
        (2, 3, 0.5, "this machine has 2 GPUs: up to 2 workers share one"),
    ],
)
def test_local_placement_with_required_gpu_shares_gpus_that_are_too_few(
    gpus: int, workers: int, share: float, notice: str
) -> None:
    placement = place(gpus, workers=workers, accelerator="gpu")
    assert (placement.min_workers, placement.max_workers, placement.notice) == (workers, workers, notice)
    assert placement.resources["GPU"] == share
    assert placement.capacity([{"CPU": 8.0, "GPU": float(gpus)}]) >= workers


def test_local_placement_without_required_gpu_uses_fewer_workers_instead() -> None:
    placement = place(1, workers=3)
    assert (placement.max_workers, placement.resources["GPU"]) == (1, 1)
    assert placement.notice == "this machine has 1 GPU: using 1 instead of 3 workers"
    assert "GPU" not in place(1, workers=3, accelerator="cpu").resources
    assert "GPU" not in place(0, workers=3).resources


def test_local_placement_of_elastic_run_with_required_gpu_uses_each_gpu_once() -> None:
    placement = place(2, workers="1-4", accelerator="gpu")
    assert (placement.min_workers, placement.max_workers, placement.resources["GPU"]) == (1, 2, 1)


def test_local_placement_with_required_gpu_and_none_raises() -> None:
    with pytest.raises(UserError, match="accelerator = gpu: this machine has 0 GPUs for 2 workers"):
        place(0, workers=2, accelerator="gpu")


def test_search_whose_trials_would_share_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial places its workers itself, each on a GPU of its own, and would wait for it forever."""
    scale = ScaleConfig(workers=2, accelerator="gpu")
    placement = local_placement(scale, cores=8, gpus=1)
    monkeypatch.setattr("job.cluster.tune.connect", lambda *_: (placement, 1))
    monkeypatch.setattr("job.cluster.tune.disconnect", lambda: None)
    context = _connected(Config(scale=scale), SearchConfig(trials=2), Console(io.StringIO()))
    with pytest.raises(UserError, match="the workers of a trial do not share a GPU"), context:
        pass


def test_placement_describes_share_of_gpu() -> None:
    assert place(1, workers=2, accelerator="gpu").describe() == "4 CPUs and 1/2 of a GPU each"
    assert place(2, workers=2, accelerator="gpu").describe() == "4 CPUs and a GPU each"


@pytest.mark.parametrize(
    ("is_available", "accelerator", "device"),
    [
        (True, "auto", "cuda"),
        (True, "gpu", "cuda"),
        (True, "cpu", "cpu"),
        (False, "auto", "cpu"),
        (False, "cpu", "cpu"),
    ],
)
def test_local_device_is_the_gpu_unless_there_is_none_or_the_cpu_is_configured(
    monkeypatch: pytest.MonkeyPatch, is_available: bool, accelerator: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    assert local_device(ScaleConfig(accelerator=accelerator)) == torch.device(device)


@pytest.mark.parametrize(("is_available", "device"), [(True, "cuda:1"), (False, "cpu")])
def test_worker_device_without_usable_gpu_is_cpu(
    is_available: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray assigns a GPU that it counts also where torch has no CUDA; ``check_devices`` then refuses the run."""
    monkeypatch.setattr("job.cluster.train_worker.get_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    assert worker_device() == torch.device(device)


def flags(prose: Path, storage: Path, name: str, *more: object) -> list[object]:
    return [
        "--corpus.source", prose, "--corpus.max_tokens", 4200, "--run.storage", storage, "--run.name", name,
        "--model.cell", "lstm", "--model.hidden_size", 40, "--stream.batch_size", 8, "--train.epochs", 2,
        "--train.reproducible", "true", "--generate.prefix", "the", *more,
    ]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.cluster
@pytest.mark.parametrize("num_shares", [1, 2])
def test_train_on_ray_with_gpu_equals_run_without_cluster(num_shares: int, prose: Path, tmp_path: Path) -> None:
    """One worker has a GPU of its own; then each GPU is shared by two workers."""
    workers = 1 if num_shares == 1 else 2 * torch.cuda.device_count()
    more = ["--scale.workers", workers, "--scale.accelerator", "gpu"]
    process = start_job("train", *flags(prose, tmp_path, "ray", *more), env={"RAY_ADDRESS": ""})
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert f"{workers} worker{'s' * (workers > 1)} on {torch.cuda.get_device_name()}" in out
    assert ("up to 2 workers share one" in out) == (num_shares == 2)
    assert job("train", *flags(prose, tmp_path, "alone", "--scale.workers", 0)).status == 0
    ray, alone = (result(tmp_path / name) for name in ("ray", "alone"))
    assert ray["weights_sha256"] == alone["weights_sha256"]


@pytest.mark.cuda
def test_doctor_shows_gpus_and_their_workers(prose: Path, tmp_path: Path) -> None:
    more = ["--scale.workers", torch.cuda.device_count() + 1, "--scale.accelerator", "gpu"]
    ended = job("doctor", *flags(prose, tmp_path, "run", *more))
    assert "of a GPU each; this machine has" in ended.out
    if shutil.which("nvidia-smi"):
        assert f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, driver " in ended.out


def test_doctor_with_model_larger_than_memory_of_gpu_fails(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_train_state(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("job.run.estimate.build_train_state", build_train_state)
    ended = job("doctor", *flags(prose, tmp_path, "run", "--scale.workers", 0))
    assert ended.status == 1
    assert "model: a training step does not fit into the memory of" in ended.out
    assert "lower stream.batch_size" in ended.out
