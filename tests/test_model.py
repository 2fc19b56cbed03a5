"""The model: our recurrence is torch's, dropout belongs to lanes, state is the caller's."""

import pytest
import torch
from torch import nn

from job.config.schema import ModelConfig
from job.distributed.gradient_sync import AllReduceGradients, Batch, LaneAssignment
from job.errors import UserError
from job.nn.dropout import Dropout, dropout_keys
from job.nn.language_model import build_model
from job.nn.rnn import RecurrentLayers
from job.nn.rnn_fallback import tanh_layer

KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize(("layers", "lanes", "steps"), [(1, 3, 5), (2, 1, 4), (3, 4, 1)])
def test_recurrent_layers_are_torchs(cell, layers, lanes, steps):
    ours = RecurrentLayers(cell, 5, 7, layers).double()
    torchs = KINDS[cell](5, 7, layers).double()
    torchs.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 5, (steps, lanes))
    one_hot = nn.functional.one_hot(tokens, 5).double()
    one = torch.randn(layers, lanes, 7, dtype=torch.float64)
    state = (one, one / 2) if cell == "lstm" else one
    for inputs in (tokens, one_hot):
        outputs, last = ours(inputs, state)
        expected, expected_last = torchs(one_hot, state)
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last, expected_last, rtol=1e-12, atol=1e-12)
        loss = torch.randn_like(expected)
        found = torch.autograd.grad((outputs * loss).sum(), list(ours.parameters()))
        wanted = torch.autograd.grad((expected * loss).sum(), list(torchs.parameters()))
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_the_recurrences_own_backward_is_its_gradient():
    inputs = [torch.randn(4, 2, 3), torch.randn(2, 3), torch.randn(3, 3)]
    assert torch.autograd.gradcheck(tanh_layer, [x.double().requires_grad_() for x in inputs])


def test_bf16_stays_near_fp32():
    net = build_model(ModelConfig(hidden_size=64), 20, seed=1)
    tokens = torch.randint(0, 20, (30, 4))
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = net(tokens, None)
    high, _ = net(tokens, None)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, rtol=0, atol=0.03)


def test_names_are_torchs_own():
    names = set(build_model(ModelConfig(cell="lstm", num_layers=2), 9, 0).state_dict())
    layers = {f"rnn.{kind}_l{layer}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for layer in (0, 1)}
    assert names == layers | {"linear.weight", "linear.bias"}


def dropout_of(probability, seed, step, lanes):
    return Dropout(probability, dropout_keys(seed, step, 2, lanes))


def test_a_mask_belongs_to_its_lane():
    x = torch.ones(6, 10, 33)
    whole = dropout_of(0.4, 3, 7, range(10))(x, 1)
    parts = [dropout_of(0.4, 3, 7, lanes)(x[:, lanes.start : lanes.stop], 1) for lanes in (range(3), range(3, 10))]
    assert torch.equal(torch.cat(parts, 1), whole)
    others = [dropout_of(0.4, 4, 7, range(10)), dropout_of(0.4, 3, 8, range(10)), dropout_of(0.4, 3, 7, range(1, 11))]
    assert not any(torch.equal(other(x, 1), whole) for other in others)
    assert not torch.equal(dropout_of(0.4, 3, 7, range(10))(x, 0), whole)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_masks_keep_the_right_share_and_are_not_alike(probability):
    x = torch.ones(100, 50, 40)
    kept = (dropout_of(probability, 0, 0, range(50))(x, 0) > 0).float()
    assert abs(kept.mean() - (1 - probability)) < 0.004  # five standard deviations
    for axis in range(3):  # neighbours are uncorrelated
        a, b = (kept.narrow(axis, start, kept.shape[axis] - 1) for start in (0, 1))
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.015


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_model(ModelConfig(), 28, seed=5).state_dict()
    torch.manual_seed(2)
    again = build_model(ModelConfig(), 28, seed=5).state_dict()
    other = build_model(ModelConfig(), 28, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["rnn.weight_hh_l0"], other["rnn.weight_hh_l0"])


class ScaledCell(nn.Module):
    """An example of a user's own cell: a diagonal recurrence with a tuple of two tensors as its state."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        assert num_layers == 1
        self.input = nn.Linear(input_size, hidden_size)
        self.decay = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, inputs, state):
        if state is None:
            zeros = inputs.new_zeros(1, inputs.shape[1], self.decay.numel())
            state = (zeros, zeros)
        memory, count = state[0][0], state[1][0]
        outputs = []
        for features in self.input(inputs):
            memory = torch.sigmoid(self.decay) * memory + features
            count = count + 1
            outputs.append(torch.tanh(memory))
        return torch.stack(outputs), (memory[None], count[None])


class LeakyCell(nn.Module):
    """Keeps its state to itself, which the protocol forbids."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.layer = nn.Linear(input_size, hidden_size)

    def forward(self, inputs, state):
        return self.layer(inputs), torch.zeros(inputs.shape[1], 3)


def test_a_users_cell_is_checked():
    assert build_model(ModelConfig(cell="test_model:ScaledCell"), 9, 0)
    assert build_model(ModelConfig(cell="torch.nn:GRU"), 9, 0)
    for cell, why in {
        "test_model:LeakyCell": "axis 1",
        "test_model:Missing": "cannot be imported",
        "test_model:KINDS": "not a torch.nn.Module",
        "torch.nn:Linear": "must return outputs and state",
    }.items():
        with pytest.raises(UserError, match=why):
            build_model(ModelConfig(cell=cell), 9, 0)


def test_a_tuple_state_travels_through_the_gradients():
    net = build_model(ModelConfig(cell="test_model:ScaledCell", hidden_size=8), 9, 0)
    tokens = torch.randint(0, 9, (6, 4))
    window = Batch(tokens[:-1], tokens[1:], torch.zeros(3), dropout_keys(0, 0, 0, range(4)))
    _, state = AllReduceGradients(net, LaneAssignment([range(4)], 1, 20))(window, None)
    assert isinstance(state, tuple)
    assert state[1].shape == (1, 4, 8)
    assert not any(part.requires_grad for part in state)
