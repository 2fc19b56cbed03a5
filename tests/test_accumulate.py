"""Gradients that are accumulated over groups of lanes are those of the complete batch."""

import multiprocessing
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import disable_kernel, job, result
from test_shared_memory import free_port
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from job.config.model import ModelConfig
from job.distributed.gradient_sync import AllReduceGradients, Batch, LossModule, StepStats, assign_lanes
from job.nn.language_model import build_model
from job.nn.regularization import mask_keys

LANES, STEPS, TOKENS = 7, 6, 11
CONFIG = ModelConfig(
    cell="lstm", hidden_size=32, num_layers=2, embedding_size=8, dropout=0.3, dropout_locked=True,
    activation_regularization=2.0, temporal_regularization=1.0,
)  # fmt: skip


def gradients(num_groups: int, rank: int = 0, world_size: int = 1) -> tuple[list[Tensor], list[Tensor], StepStats]:
    """The gradient of a window that follows another one, the state after it, and the statistics."""
    model = build_model(CONFIG, TOKENS, 1).double()
    assignment = assign_lanes(LANES, 0, rank, world_size)
    window = torch.randint(0, TOKENS, (STEPS + 1, LANES), generator=torch.Generator().manual_seed(2))
    window_TB = window[:, assignment.lanes.start : assignment.lanes.stop]
    loss_module = LossModule(model, LANES * STEPS, CONFIG)
    sizes = []
    loss_module.register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].inputs_TB.shape[1]))
    sync = AllReduceGradients(loss_module, assignment, num_groups=num_groups)
    state: Any = None
    for step in (0, 1):
        flags = torch.tensor([1.0, 0.0, 1.0])
        batch = Batch(window_TB[:-1], window_TB[1:], flags, mask_keys(CONFIG, 3, step, assignment.lanes))
        stats, state = sync(batch, state)
    assert max(sizes) == -(-len(assignment.lanes) // num_groups)  # lanes that are in memory at a time
    assert sum(sizes) == 2 * len(assignment.lanes)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return found, list(state), StepStats.from_tensor(stats)


@pytest.mark.parametrize("num_groups", [2, 3, 7, 9])
@pytest.mark.parametrize("kernel", [True, False])
def test_accumulated_gradient_equals_that_of_the_complete_batch(
    num_groups: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        disable_kernel(monkeypatch)
    whole, accumulated = gradients(1), gradients(num_groups)
    torch.testing.assert_close(accumulated[:2], whole[:2], rtol=1e-12, atol=1e-14)
    assert accumulated[2].nats == pytest.approx(whole[2].nats, rel=1e-12)
    assert accumulated[2].flags == whole[2].flags


def accumulate(rank: int, port: int, results: SimpleQueue[Any]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found, _, stats = gradients(2, rank, 2)
    results.put((rank, [gradient.tolist() for gradient in found], stats.nats))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_that_accumulate_have_the_gradient_of_one_that_does_not() -> None:
    results = multiprocessing.get_context("spawn").SimpleQueue()
    context = spawn(accumulate, (free_port(), results), nprocs=2, join=False)
    found = sorted(results.get() for _ in range(2))
    context.join()
    expected, _, stats = gradients(1)
    for _, worker_gradients, nats in found:
        own = [torch.tensor(gradient, dtype=torch.float64) for gradient in worker_gradients]
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)
        assert nats == pytest.approx(stats.nats, rel=1e-12)


@pytest.mark.slow
def test_train_that_accumulates_and_is_resumed_without_it_equals_a_run_of_complete_batches(
    prose: Path, tmp_path: Path
) -> None:
    flags = [
        "train", "--corpus.source", prose, "--corpus.max_tokens", 4000, "--run.storage", tmp_path, "--train.epochs", 2,
        "--train.precision", "fp64", "--model.hidden_size", 16, "--generate.prefix", "the", "--scale.workers", 0,
        "--optimizer.learning_rate", 2, "--stream.num_steps", 20,
    ]  # fmt: skip
    parts = [*flags, "--run.name", "parts"]
    assert job(*parts, "--train.accumulate", 5, "--train.max_steps", 8).status == 0
    assert job(*parts).status == 0
    assert job(*flags, "--run.name", "whole").status == 0
    assert result(tmp_path / "parts")["nats"] == pytest.approx(result(tmp_path / "whole")["nats"], rel=1e-12)


def test_accumulate_with_a_reproducible_run_is_refused(prose: Path) -> None:
    ended = job("train", "--corpus.source", prose, "--train.reproducible", "true", "--train.accumulate", 2)
    assert ended.status == 2
    assert ended.err == (
        "error: train.accumulate = 2: a reproducible run accumulates its lane groups; leave it out, or raise "
        "train.lane_groups\n"
    )
