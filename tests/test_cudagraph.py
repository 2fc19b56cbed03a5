"""A captured update, replayed, is the update itself. The graph is not a GPU's, which that does not need."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import disable_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from job.config.schema import BUILTIN_CELLS, Config, ModelConfig, OptimizerConfig, StreamConfig, TrainConfig
from job.data.stream import Stream
from job.distributed.gradient_sync import AllReduceGradients, ControlFlags, DeterministicGradients, LaneAssignment
from job.nn.language_model import build_model
from job.nn.state import map_state
from job.training.cuda_graph import GRAPH_ENV_VAR, WARMUP_STEPS, CudaGraphTrainStep, capture_graph, supports_cuda_graph
from job.training.loop import TrainState, end_epoch, train_steps
from job.training.optimizer import build_optimizer
from job.training.progress import Progress
from job.training.train_step import EagerTrainStep

LANES, STEPS = 6, 5


class Tape(TorchDispatchMode):
    """What a CUDA graph does, for a processor: each operation again, on the same memory, without Python.

    As there, what waits for a number or takes one from elsewhere cannot be captured.
    """

    FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "is_nonzero", "equal", "nonzero")

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(name in operation.name() for name in self.FORBIDDEN):
            raise RuntimeError(f"{operation.name()} cannot be captured")
        found = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, first in self.operations:
            found = operation(*args, **kwargs)
            for place, tensor in zip(tree_leaves(first), tree_leaves(found), strict=True):
                if isinstance(tensor, torch.Tensor) and place.data_ptr() != tensor.data_ptr():
                    place.copy_(tensor)


class Tapes:
    """Captures as a GPU does: nothing that is kept changes by it."""

    def __init__(self, net, updates):
        self.net, self.updates = net, updates
        self.made = []

    def __call__(self, step):
        moments = [value for state in self.updates.state.values() for value in state.values()]
        kept = [value for value in (*self.net.parameters(), *moments) if isinstance(value, torch.Tensor)]
        before = [value.detach().clone() for value in kept]
        with Tape() as tape:
            found = step()
        with torch.no_grad():
            for value, old in zip(kept, before, strict=True):
                value.copy_(old)
        self.made.append(tape)
        return found, tape.replay


@pytest.fixture(autouse=True)
def small_operations(monkeypatch):
    """The tape sees torch's operations alone, and no memory that they keep to themselves."""
    disable_kernel(monkeypatch)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


def learner_of(options, kind, graphed):
    text = torch.randint(0, 9, (190,), generator=torch.Generator().manual_seed(1)).numpy().astype("uint8")
    stream = Stream(text, options.stream, 0)
    net = build_model(options.model, 9, seed=1)
    updates = build_optimizer(options.optimizer, net)
    groups = [range(LANES)] if kind is AllReduceGradients else [range(2), range(2, LANES)]
    share = LaneAssignment(groups, 1, stream.tokens_per_step, None, options.model.dropout)
    direct = EagerTrainStep(kind(net, share), updates, options.optimizer.grad_clip_norm, torch.device("cpu"))
    tapes = Tapes(net, updates)
    update = CudaGraphTrainStep(direct, tapes) if graphed else direct
    return TrainState(net, updates, update, stream, stream.total_steps(options.train), share, Progress()), tapes


def trained(options, kind, graphed):
    train_state, tapes = learner_of(options, kind, graphed)
    losses, states = [], []
    for _ in range(options.train.epochs):
        for step in train_steps(train_state, options, lambda: ControlFlags(look=train_state.progress.step % 2 == 0)):
            losses.append(step.tally)
            states.append([part.clone() for part in map_state(lambda part: part[None], train_state.state)])
        end_epoch(train_state)
    return losses, states, train_state.model.state_dict(), tapes.made


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("kind", [AllReduceGradients, DeterministicGradients])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_replayed_update_is_the_update(cell, kind, name):
    options = Config(
        stream=StreamConfig(batch_size=LANES, num_steps=STEPS, offset=0),
        model=ModelConfig(cell=cell, hidden_size=8, num_layers=2, embedding_size=4, dropout=0.3),
        optimizer=OptimizerConfig(name=name, learning_rate=0.5, grad_clip_norm=0.1, schedule="cosine", warmup_steps=2),
        train=TrainConfig(epochs=3),
    )
    losses, states, weights, none = trained(options, kind, graphed=False)
    again, states_again, weights_again, made = trained(options, kind, graphed=True)
    assert (len(none), len(made)) == (0, 1)
    assert len(losses) > WARMUP_STEPS + 10
    assert losses == again
    assert [tally.signals.look for tally in losses] == [step % 2 == 0 for step in range(len(losses))]
    torch.testing.assert_close(states_again, states, rtol=0, atol=0)
    torch.testing.assert_close(weights_again, weights, rtol=0, atol=0)


def test_what_cannot_be_captured_is_launched_operation_by_operation():
    options = Config(stream=StreamConfig(batch_size=LANES, num_steps=STEPS, offset=0), train=TrainConfig(epochs=2))
    losses, *_ = trained(options, AllReduceGradients, graphed=False)
    train_state, _ = learner_of(options, AllReduceGradients, graphed=True)
    gradients = train_state.update.update.gradients

    def waiting(window, state):
        found, state = gradients(window, state)
        assert float(found[0]) > 0
        return found, state

    train_state.update.update = dataclasses.replace(train_state.update.update, gradients=waiting)
    again = []
    with pytest.warns(UserWarning, match="no CUDA graph.*cannot be captured") as said:
        for _ in range(options.train.epochs):
            again += [step.tally.nats for step in train_steps(train_state, options, ControlFlags)]
            end_epoch(train_state)
    assert len(said) == 1
    assert again == [tally.nats for tally in losses]


def a_model(cell="rnn", **weight):
    metadata = {"is_cuda": True, "dtype": torch.float32} | weight
    is_users = cell not in BUILTIN_CELLS
    return SimpleNamespace(linear=SimpleNamespace(weight=SimpleNamespace(**metadata)), has_custom_cell=is_users)


def test_what_is_captured(monkeypatch):
    one, two = (LaneAssignment([range(4)], workers, 20) for workers in (1, 2))
    assert supports_cuda_graph(a_model(), one)
    assert not supports_cuda_graph(a_model(), two)
    assert not supports_cuda_graph(a_model("torch.nn:GRU"), one)
    assert not supports_cuda_graph(a_model(dtype=torch.float64), one)
    assert not supports_cuda_graph(a_model(is_cuda=False), one)
    monkeypatch.setenv(GRAPH_ENV_VAR, "off")
    assert not supports_cuda_graph(a_model(), one)


def test_a_capture_that_breaks_off_leaves_the_stream_as_it_was(monkeypatch):
    streams = ["own"]

    @contextlib.contextmanager
    def graph(made, **options):
        streams.append("of the capture")
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=len))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    assert capture_graph(lambda: 3) == (3, len)
    with pytest.raises(ZeroDivisionError):
        capture_graph(lambda: 1 // 0)
    assert streams[-1] == "own"
