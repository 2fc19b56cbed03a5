"""A captured training step, replayed, equals the eager one; tested with a stand-in for CUDA's graphs on the CPU."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import disable_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from job.config.model import BUILTIN_CELLS, SCAN_CELLS, ModelConfig
from job.config.schema import Config
from job.config.text import StreamConfig
from job.config.training import OptimizerConfig, TrainConfig
from job.data.dataset import Dataset
from job.data.vocabulary import Vocabulary
from job.distributed.context import World
from job.distributed.gradient_sync import AllReduceGradients, ControlFlags
from job.nn.state import map_state
from job.storage import Folder
from job.training.cuda_graph import GRAPH_ENV_VAR, WARMUP_STEPS, CudaGraphTrainStep, capture_graph, supports_cuda_graph
from job.training.loop import end_epoch, train_steps
from job.training.run_spec import RunSpec
from job.training.train_state import TrainState, build_train_state
from job.training.train_step import EagerTrainStep

LANES, STEPS = 5, 5
SIZES: dict[str, Any] = {"rnn": 8, "gru": (8, 6), "lstm": 8, "mingru": (8, 6), "mlstm": 8, "mogrifier": 8}
REGULARIZATION: dict[str, Any] = {
    "dropout_locked": True,
    "input_dropout": 0.1,
    "embedding_dropout": 0.1,
    "weight_drop": 0.2,
    "activation_regularization": 2.0,
    "temporal_regularization": 1.0,
}


class RecordedOperations(TorchDispatchMode):
    """Does on the CPU what a CUDA graph does: repeats each operation on the same memory, without Python.

    Like a graph, it cannot capture an operation that waits for a number or copies one from the host.
    """

    FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "is_nonzero", "equal", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in operation.name() for name in self.FORBIDDEN):
            raise RuntimeError(f"{operation.name()} cannot be captured")
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, captured in self.operations:
            result = operation(*args, **kwargs)
            for destination, source in zip(tree_leaves(captured), tree_leaves(result), strict=True):
                if isinstance(source, torch.Tensor) and destination.data_ptr() != source.data_ptr():
                    destination.copy_(source)


class FakeCapture:
    """Captures as a GPU does: weights, their average and the optimizer's state do not change by it."""

    def __init__(self, train_state: TrainState) -> None:
        self.models = [train_state.model, *([train_state.average.averaged] if train_state.average else [])]
        self.optimizer = train_state.optimizer
        self.num_captures = 0

    def __call__(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        weights = [weight for model in self.models for weight in model.parameters()]
        tensors = [value for value in (*weights, *moments) if isinstance(value, torch.Tensor)]
        before = [tensor.detach().clone() for tensor in tensors]
        with RecordedOperations() as recorded:
            result = step()
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        self.num_captures += 1
        return result, recorded.replay


@pytest.fixture(autouse=True)
def torch_operations_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels and oneDNN are invisible to the recording, or allocate memory of their own."""
    disable_kernel(monkeypatch)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


def small_config(**train: Any) -> Config:
    stream = StreamConfig(batch_size=LANES, num_steps=STEPS, offset=0)
    return Config(stream=stream, train=TrainConfig(**train))


def new_train_state(config: Config) -> TrainState:
    tokens = torch.randint(0, 9, (190,), generator=torch.Generator().manual_seed(1)).numpy().astype("uint8")
    dataset = Dataset(tokens, tokens[:0], Vocabulary("char", tuple("abcdefghi")), {})
    world = World(0, 1, torch.device("cpu"), 1, "")
    return build_train_state(RunSpec(config, dataset, Folder(""), None), world, "fp32")


def train(config: Config, use_graph: bool) -> tuple[list[Any], list[Any], list[dict[str, torch.Tensor]], int]:
    """Statistics and lane states of all steps, the final weights and their average, and the number of captures."""
    train_state = new_train_state(config)
    capture = FakeCapture(train_state)
    if use_graph:
        train_state.train_step = CudaGraphTrainStep(cast(EagerTrainStep, train_state.train_step), capture)
    stats, states = [], []
    for _ in range(config.train.epochs):
        for step in train_steps(
            train_state, config, lambda: ControlFlags(check_preemption=train_state.progress.step % 2 == 0)
        ):
            stats.append(step.stats)
            lane_states: Any = map_state(lambda tensor: tensor[None], train_state.lane_state)
            states.append([tensor.clone() for tensor in lane_states])
        end_epoch(train_state)
    return stats, states, [model.state_dict() for model in capture.models], capture.num_captures


@pytest.mark.parametrize(
    ("cell", "reproducible", "name"),
    [
        ("lstm", False, "adamw"),
        ("lstm", True, "sgd"),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [("lstm", False, "sgd"), ("lstm", True, "adamw")]
            + [(cell, False, "adamw") for cell in SIZES if cell != "lstm"]  # the cell has no part in the other two
        ),
    ],
)
def test_cuda_graph_train_step_equals_eager_step(cell: str, reproducible: bool, name: str) -> None:
    config = dataclasses.replace(
        small_config(epochs=3, reproducible=reproducible, lane_groups=2, accumulate=1 if reproducible else 2),
        model=ModelConfig(
            cell=cell,
            hidden_size=SIZES[cell],
            num_layers=2,
            embedding_size=4,
            dropout=0.3,
            **{**REGULARIZATION, "weight_drop": 0.0 if cell in SCAN_CELLS else 0.2},
        ),
        optimizer=OptimizerConfig(
            name=name,
            learning_rate=0.5,
            grad_clip_norm=0.1,
            schedule="cosine",
            warmup_steps=2,
            averaging="ema",
            momentum=0.9,
        ),
    )
    eager_stats, eager_states, eager_weights, eager_captures = train(config, use_graph=False)
    graph_stats, graph_states, graph_weights, graph_captures = train(config, use_graph=True)
    assert (eager_captures, graph_captures) == (0, 1)
    assert len(eager_stats) > WARMUP_STEPS + 10
    assert graph_stats == eager_stats
    assert [stats.flags.check_preemption for stats in graph_stats] == [
        step % 2 == 0 for step in range(len(graph_stats))
    ]
    torch.testing.assert_close(graph_states, eager_states, rtol=0, atol=0)
    torch.testing.assert_close(graph_weights, eager_weights, rtol=0, atol=0)


def test_cuda_graph_train_step_with_logits_in_chunks_equals_eager_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(epochs=2)
    monkeypatch.setattr("job.nn.cross_entropy.CHUNK_LOGITS", 60)
    eager_stats, _, eager_weights, _ = train(config, use_graph=False)
    graph_stats, _, graph_weights, num_captures = train(config, use_graph=True)
    assert (num_captures, graph_stats) == (1, eager_stats)
    torch.testing.assert_close(graph_weights, eager_weights, rtol=0, atol=0)


def test_cuda_graph_train_step_runs_eagerly_if_capture_fails() -> None:
    config = small_config(epochs=2)
    eager_stats, *_ = train(config, use_graph=False)
    train_state = new_train_state(config)
    eager_step = cast(EagerTrainStep, train_state.train_step)

    def gradients_that_wait(batch: Any, state: Any) -> Any:
        stats, state = eager_step.gradients(batch, state)
        assert float(stats[0]) > 0
        return stats, state

    step_that_waits = dataclasses.replace(eager_step, gradients=cast(AllReduceGradients, gradients_that_wait))
    train_state.train_step = CudaGraphTrainStep(step_that_waits, FakeCapture(train_state))
    nats = []
    with pytest.warns(UserWarning, match="no CUDA graph.*cannot be captured") as warnings:
        for _ in range(config.train.epochs):
            nats += [step.stats.nats for step in train_steps(train_state, config, ControlFlags)]
            end_epoch(train_state)
    assert len(warnings) == 1
    assert nats == [stats.nats for stats in eager_stats]


def fake_model(cell: str = "rnn", reset_token: int | None = None, tails: Sequence[object] = (), **weight: Any) -> Any:
    weight = {"is_cuda": True, "dtype": torch.float32} | weight
    return SimpleNamespace(
        linear=SimpleNamespace(weight=SimpleNamespace(**weight)),
        has_custom_cell=cell not in BUILTIN_CELLS,
        reset_token=reset_token,
        tails=tails,
    )


def test_supports_cuda_graph_only_for_uniform_steps_of_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert supports_cuda_graph(fake_model(), 1)
    assert not supports_cuda_graph(fake_model(), 2)
    assert not supports_cuda_graph(fake_model("torch.nn:GRU"), 1)
    assert not supports_cuda_graph(fake_model(reset_token=3), 1)
    assert not supports_cuda_graph(fake_model(dtype=torch.float64), 1)
    assert not supports_cuda_graph(fake_model(is_cuda=False), 1)
    with pytest.warns(UserWarning, match="no CUDA graph.*model.softmax = adaptive"):
        assert not supports_cuda_graph(fake_model(tails=["tail"]), 1)
    monkeypatch.setenv(GRAPH_ENV_VAR, "off")
    assert not supports_cuda_graph(fake_model(), 1)
    assert not supports_cuda_graph(fake_model(tails=["tail"]), 1)  # without a warning


def test_capture_graph_restores_stream_if_capture_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["current"]
    result, replay = torch.zeros(1), streams.clear

    @contextlib.contextmanager
    def graph(cuda_graph: object, **_: Any) -> Iterator[None]:
        streams.append("capture")
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    assert capture_graph(lambda: result) == (result, replay)
    with pytest.raises(ZeroDivisionError):
        capture_graph(lambda: result / (1 // 0))
    assert streams[-1] == "current"
