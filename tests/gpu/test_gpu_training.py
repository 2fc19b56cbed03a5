"""Runs on a GPU: reference traces, resuming, CUDA graphs, several workers, memory. On the CPU where there is none."""

import dataclasses
import multiprocessing
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import Trace, job, result, rows
from test_cuda_graph import fake_model
from test_reference import PORTABLE, assert_reproduces
from torch.multiprocessing.spawn import spawn

from job.config.model import ModelConfig
from job.config.schema import Config
from job.config.text import StreamConfig
from job.config.training import OptimizerConfig, TrainConfig
from job.data.dataset import Dataset
from job.data.vocabulary import Vocabulary
from job.distributed.collectives import broadcast_json, gather_json
from job.distributed.context import World, device_name
from job.distributed.gradient_sync import (
    AllReduceGradients,
    Batch,
    ControlFlags,
    LaneAssignment,
    LossModule,
    assign_lanes,
)
from job.nn.language_model import build_model
from job.storage import Folder
from job.training import loop
from job.training.cuda_graph import GRAPH_ENV_VAR, CudaGraphTrainStep, supports_cuda_graph
from job.training.loop import _next_batch as read_batch
from job.training.loop import train_steps
from job.training.run_spec import RunSpec
from job.training.train_state import TrainState, build_train_state
from job.training.trainer import configure_process

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.filterwarnings("error:no CUDA graph")]


def flags(prose: Path, storage: Path, name: str, *more: object) -> list[object]:
    """The command line of a run of 52 steps in two epochs."""
    return [
        "train", "--corpus.source", prose, "--corpus.max_tokens", 4200, "--run.storage", storage, "--run.name", name,
        "--stream.batch_size", 8, "--stream.num_steps", 20, "--model.hidden_size", 33, "--model.num_layers", 2,
        "--model.dropout", 0.2, "--optimizer.name", "adamw", "--optimizer.learning_rate", 0.01,
        "--optimizer.grad_clip_norm", 1, "--train.epochs", 2, "--train.log_every", 5, "--train.checkpoint_every", 7,
        "--generate.prefix", "the", "--scale.workers", 0, *more,
    ]  # fmt: skip


def losses(run: Path) -> list[float]:
    return [row["nats"] for row in rows(run, "train")]


@pytest.mark.cuda
@pytest.mark.parametrize("trace", PORTABLE, indirect=True)
def test_train_on_gpu_reproduces_reference_trace(trace: Trace, tmp_path: Path) -> None:
    """The CPU's are in test_reference.py."""
    ended = job("train", *trace.arguments, "--scale.workers", 0, "--run.storage", tmp_path, "--run.name", "run")
    assert ended.status == 0, ended.err
    assert_reproduces(trace, tmp_path / "run", 1e-8)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "cells:LinearCell"])
def test_reproducible_run_that_is_resumed_equals_uninterrupted_run_without_graph(
    cell: str, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--model.cell", cell, "--train.reproducible", "true"]
    assert job(*flags(prose, tmp_path, "resumed", *more, "--train.max_steps", 31)).status == 0
    ended = job(*flags(prose, tmp_path, "resumed", *more))
    assert "resuming from step 31" in ended.out
    monkeypatch.setenv(GRAPH_ENV_VAR, "off")
    assert job(*flags(prose, tmp_path, "eager", *more)).status == 0
    resumed, eager = (result(tmp_path / name) for name in ("resumed", "eager"))
    assert resumed["steps"] == 52
    assert resumed["weights_sha256"] == eager["weights_sha256"]
    assert resumed["generated"] == eager["generated"]
    assert losses(tmp_path / "resumed") == losses(tmp_path / "eager")


@pytest.mark.cuda
@pytest.mark.parametrize(("cell", "precision"), [("rnn", "bf16"), ("gru", "fp32"), ("lstm", "bf16")])
def test_fast_run_with_graph_has_losses_of_run_without(
    cell: str, precision: str, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--model.cell", cell, "--train.precision", precision]
    assert job(*flags(prose, tmp_path, "graph", *more)).status == 0
    monkeypatch.setenv(GRAPH_ENV_VAR, "off")
    assert job(*flags(prose, tmp_path, "eager", *more)).status == 0
    found, expected = (losses(tmp_path / name) for name in ("graph", "eager"))
    np.testing.assert_allclose(found, expected, rtol=1e-3 if precision == "fp32" else 2e-2)


def test_configure_process_turns_off_tf32_of_cudnn() -> None:
    """And in a way that torch's other functions can read: its newer setting makes the older one raise."""
    torch.backends.cudnn.allow_tf32 = True
    configure_process(Config(), World(0, 1, torch.device("cpu"), 1, "a"))
    assert not torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert not torch.backends.cudnn.allow_tf32


# --- memory ---


def exhaust_memory(device: torch.device) -> None:
    """Raises the error of a GPU that has no memory left."""
    if device.type == "cuda":
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.\nSee the documentation.")


def test_run_out_of_memory_ends_with_one_line_and_resumes_from_last_checkpoint(
    prose: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--train.reproducible", "true"]
    with monkeypatch.context() as patch:

        def exhaust_or_read(train_state: TrainState, config: Config, control_flags: ControlFlags) -> Batch:
            if train_state.progress.step == 20:
                exhaust_memory(device)
            return read_batch(train_state, config, control_flags)

        patch.setattr(loop, "_next_batch", exhaust_or_read)
        ended = job(*flags(prose, tmp_path, "run", *more))
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert f"worker 0 of 1 has run out of memory on {device_name(device)}" in ended.err
    assert "smaller stream.batch_size" in ended.err
    assert "saved at step 14" in ended.err
    smaller = job(*flags(prose, tmp_path, "run", *more, "--stream.batch_size", 4))
    assert (smaller.status, smaller.err.count("\n")) == (2, 1)
    assert "stream.batch_size" in smaller.err
    ended = job(*flags(prose, tmp_path, "run", *more))
    assert "resuming from step 14" in ended.out
    assert job(*flags(prose, tmp_path, "undisturbed", *more)).status == 0
    run, undisturbed = (result(tmp_path / name) for name in ("run", "undisturbed"))
    assert run["weights_sha256"] == undisturbed["weights_sha256"]
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


@pytest.mark.cuda
def test_model_larger_than_memory_ends_with_one_line(prose: Path, tmp_path: Path) -> None:
    try:
        torch.cuda.set_per_process_memory_fraction(0.005)
        ended = job(
            *flags(prose, tmp_path, "run", "--model.hidden_size", 4096, "--model.cell", "lstm", "--model.num_layers", 1)
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "has run out of memory on" in ended.err


# --- several workers ---


def small_config(reproducible: bool) -> Config:
    return Config(
        stream=StreamConfig(batch_size=7, num_steps=6, offset=0),
        model=ModelConfig(cell="lstm", hidden_size=20, num_layers=2, embedding_size=5, dropout=0.3),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.01, grad_clip_norm=0.5),
        train=TrainConfig(epochs=1, reproducible=reproducible, lane_groups=4, log_every=1),
    )


OF_GROUP = LaneAssignment([range(4)], 2, 0, 2)  # as if the group had two workers


def new_train_state(world: World, config: Config) -> TrainState:
    tokens = torch.randint(0, 9, (600,), generator=torch.Generator().manual_seed(1)).numpy().astype("uint8")
    dataset = Dataset(tokens, tokens[:0], Vocabulary("char", tuple("abcdefghi")), {})
    return build_train_state(RunSpec(config, dataset, Folder(""), None), world, "fp32")


def train_on(world: World, config: Config) -> tuple[list[float], dict[str, np.ndarray]]:
    """The losses of an epoch and the final weights."""
    configure_process(config, world)
    train_state = new_train_state(world, config)
    nats = [step.stats.nats for step in train_steps(train_state, config, ControlFlags)]
    return nats, {name: weight.cpu().numpy() for name, weight in train_state.model.state_dict().items()}


def train_as_worker(rank: int, port: int, device: torch.device, results: Any) -> None:
    """A worker of two, which share a GPU."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = World(rank, 2, device, 1, "a")
    trained = [train_on(world, small_config(reproducible)) for reproducible in (True, False)]
    patch, in_one_call = pytest.MonkeyPatch(), partial(AllReduceGradients, in_one_call=True)
    patch.setattr("job.training.train_state.AllReduceGradients", lambda *arguments: in_one_call(*arguments[:3]))
    trained.append(train_on(world, small_config(False)))
    if rank == 0:
        results.put(trained)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_workers_that_share_a_device_equal_one(device: torch.device) -> None:
    """Bit for bit with ``train.reproducible``; else up to the order of sums."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    context = spawn(train_as_worker, (free_port(), device, results), nprocs=2, join=False)
    while results.empty():
        context.join(timeout=1)  # raises if a worker has failed, which then sends nothing
    (bits, bit_weights), (fast, _), (in_one_call, _) = results.get()
    while not context.join():
        pass
    one = World(0, 1, device, 1, "a")
    np.testing.assert_allclose(in_one_call, fast, rtol=1e-5)
    nats, weights = train_on(one, small_config(True))
    assert (len(nats), nats) == (14, bits)
    assert all(np.array_equal(weight, bit_weights[name]) for name, weight in weights.items())
    assert train_on(one, small_config(True))[0] == nats
    np.testing.assert_allclose(train_on(one, small_config(False))[0], fast, rtol=1e-5 if device.type == "cpu" else 1e-4)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_gradient_of_group_of_one_process_equals_gradient_without_group(cell: str, device: torch.device) -> None:
    """By NCCL on a GPU: messages between workers, and the exchange of gradients."""
    config = ModelConfig(cell=cell, hidden_size=20, embedding_size=5)
    tokens_TB = torch.randint(0, 9, (7, 4), generator=torch.Generator().manual_seed(1))
    flags = torch.tensor(ControlFlags(stop=True), dtype=torch.float32)
    batch = Batch(tokens_TB[:-1], tokens_TB[1:], flags, torch.zeros(0, 4, dtype=torch.int32)).to(device)
    torch.use_deterministic_algorithms(True)
    results = []
    backend, address = "nccl" if device.type == "cuda" else "gloo", f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    try:
        assert broadcast_json({"a": [1, "b"]}) == {"a": [1, "b"]}
        assert gather_json(2.5) == [2.5]
        for assignment, in_one_call in ((assign_lanes(4), False), (OF_GROUP, False), (OF_GROUP, True)):
            model = build_model(config, 9, seed=1).to(device)
            stats, state = AllReduceGradients(LossModule(model, 24), assignment, None, in_one_call)(batch, None)
            gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
            results.append([stats, *gradients, *(state if isinstance(state, tuple) else [state])])
    finally:
        dist.destroy_process_group()
    assert results[0][0].tolist()[1:] == [0, 1, 0]
    torch.testing.assert_close(results[1:], [results[0]] * 2, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("setting", "backend", "expected"), [("", "nccl", False), ("workers", "nccl", True), ("workers", "gloo", False)]
)
def test_supports_cuda_graph_of_several_workers_only_if_set_and_by_nccl(
    setting: str, backend: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setenv(GRAPH_ENV_VAR, setting)
    assert supports_cuda_graph(fake_model(), 2) == expected
    assert supports_cuda_graph(fake_model(), 1)
    assert not supports_cuda_graph(fake_model("torch.nn:GRU"), 2)


@pytest.mark.cuda
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_graph_with_exchange_of_gradients_equals_steps_without(cell: str, device: torch.device) -> None:
    """The exchange of several workers, by NCCL, in a CUDA graph; the group has one process."""
    config = small_config(False)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, cell=cell))
    world = World(0, 1, device, 1, "a")
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        results = []
        for with_exchange in (True, False):
            train_state = new_train_state(world, config)
            graph_step = train_state.train_step
            assert isinstance(graph_step, CudaGraphTrainStep)
            train_state.train_step = graph_step.eager_step
            if with_exchange:
                loss_module = graph_step.eager_step.gradients.loss_module
                gradients = AllReduceGradients(loss_module, OF_GROUP, None, in_one_call=True)
                eager_step = dataclasses.replace(graph_step.eager_step, gradients=gradients)
                train_state.train_step = CudaGraphTrainStep(eager_step)
                del eager_step, gradients
            nats = [result.stats.nats for result in train_steps(train_state, config, ControlFlags)]
            results.append([nats, [weight.detach().clone() for weight in train_state.model.parameters()]])
            del train_state, graph_step  # NCCL's group cannot end before graphs that use it
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
