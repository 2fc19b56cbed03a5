"""A user's own cells, through the command line; the first is the README's example."""

import os

import torch
from conftest import job, result
from safetensors.torch import load_file
from torch import nn

from job.config.schema import ModelConfig
from job.distributed.gradient_sync import AllReduceGradients, Batch, DeterministicGradients, LaneAssignment
from job.nn.language_model import build_model


class Bomb(nn.Module):
    """Counts the steps of each lane in its state, and from the 281st on gives no number."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.layer = nn.Linear(input_size, hidden_size)

    def forward(self, inputs, state):
        count = inputs.new_zeros(1, inputs.shape[1], 1) if state is None else state
        count = count + len(inputs)
        return torch.where(count > 280, torch.nan, self.layer(inputs)), count


def test_torchs_own_module_is_a_cell_and_trains_as_ours(prose, tmp_path):
    flags = ["train", "--corpus.source", prose, "--scale.workers", 0, "--train.epochs", 2, "--generate.prefix", "the"]
    flags += ["--train.precision", "fp64", "--run.storage", tmp_path, "--model.hidden_size", 24]
    ours = job(*flags, "--run.name", "ours", "--model.cell", "gru")
    theirs = job(*flags, "--run.name", "theirs", "--model.cell", "torch.nn:GRU")
    assert (ours.status, theirs.status) == (0, 0), ours.err + theirs.err
    assert result(tmp_path / "ours")["weights_sha256"] == result(tmp_path / "theirs")["weights_sha256"]
    assert torch.get_default_dtype() == torch.float32


class Dies(nn.Module):
    """Takes its process with it in the second window: no Python error is left to tell of it."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.layer = nn.Linear(input_size, hidden_size)

    def forward(self, inputs, state):
        if state is not None and len(inputs) > 3:  # not where the protocol is tried
            os._exit(1)
        return self.layer(inputs), inputs.new_zeros(1, inputs.shape[1], 1)


class Breaks(Bomb):
    """Raises an error of its own in the eighth window."""

    def forward(self, inputs, state):
        outputs, count = super().forward(inputs, state)
        if count.max() > 280:
            raise ValueError("no more")
        return outputs, count


class Idle(Bomb):
    """Has a weight that no window uses, one that only the first does, and one that is not to change."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__(input_size, hidden_size, num_layers)
        self.dead = nn.Parameter(torch.ones(3))
        self.first = nn.Parameter(torch.ones(1, 1, hidden_size))
        self.fixed = nn.Parameter(torch.ones(hidden_size), requires_grad=False)

    def forward(self, inputs, state):
        before = self.first.expand(1, inputs.shape[1], -1) if state is None else state
        outputs = torch.tanh(self.layer(inputs) + before) * self.fixed
        return outputs, outputs[-1:]


class Seldom(Idle):
    """Takes a way that a token opens in its lane."""

    def forward(self, inputs, state):
        outputs, state = super().forward(inputs, state)
        opened = inputs[..., :1].sum(0)
        return (outputs + self.dead.sum() * opened, state) if opened.any() else (outputs, state)


def test_a_weight_that_one_lane_group_uses_has_that_groups_gradient():
    net = build_model(ModelConfig(cell="test_cells:Seldom", hidden_size=8), 5, seed=1)
    tokens = torch.randint(1, 5, (6, 4), generator=torch.Generator().manual_seed(0))
    tokens[2, 0] = 0
    window = Batch(tokens[:-1], tokens[1:], torch.zeros(3), torch.zeros(0, 4, dtype=torch.int32))
    state = torch.zeros(1, 4, 8)
    found = []
    for kind, groups in (
        (AllReduceGradients, [range(4)]),
        (DeterministicGradients, [range(1), range(1, 3), range(3, 4)]),
    ):
        kind(net, LaneAssignment(groups, 1, 20))(window, state)
        found.append({name: weight.grad for name, weight in net.named_parameters()})
    one, groups = found
    assert groups["rnn.dead"] is not None
    assert groups["rnn.first"] is None
    for name, slope in one.items():
        assert (slope is None) == (groups[name] is None), name
        assert slope is None or torch.allclose(slope, groups[name], atol=1e-7), name


def test_weights_without_a_gradient_are_left_alone(prose, tmp_path):
    flags = ["train", "--corpus.source", prose, "--scale.workers", 0, "--train.epochs", 2, "--generate.prefix", "the"]
    flags += ["--train.precision", "fp64", "--run.storage", tmp_path, "--model.cell", "test_cells:Idle"]
    flags += ["--optimizer.weight_decay", 0.1]
    for name, reproducible in (("one", "false"), ("groups", "true")):
        ended = job(*flags, "--run.name", name, "--train.reproducible", reproducible)
        assert ended.status == 0, ended.err
    (one,), (groups,) = (sorted((tmp_path / name / "checkpoints").iterdir())[-1:] for name in ("one", "groups"))
    one, groups = (load_file(place / "model.safetensors") for place in (one, groups))
    assert torch.equal(one["rnn.dead"], torch.ones(3, dtype=torch.float64))
    assert not torch.equal(one["rnn.first"], torch.ones(1, 1, 256, dtype=torch.float64))
    for name, weight in one.items():
        torch.testing.assert_close(groups[name], weight, rtol=1e-9, atol=1e-12)


class Odd(Bomb):
    """Has a parameter without a dimension, and a buffer of whole numbers."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__(input_size, hidden_size, num_layers)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("index", torch.arange(3))

    def forward(self, inputs, state):
        return self.layer(inputs) * self.scale, inputs.new_zeros(1, inputs.shape[1], 1)
