"""The language model: layers equal to torch's, parameter names, initialization and precision."""

from typing import Any

import pytest
import torch
from torch import nn

from job.config.model import ModelConfig
from job.errors import UserError
from job.nn.language_model import build_model, load_weights
from job.nn.rnn import RecurrentLayers

TORCH_LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


@pytest.mark.parametrize("cell", TORCH_LAYERS)
@pytest.mark.parametrize(("num_layers", "lanes", "steps"), [(1, 3, 5), (2, 1, 4), (3, 4, 1)])
def test_recurrent_layers_match_torch_outputs_states_and_gradients(
    cell: str, num_layers: int, lanes: int, steps: int
) -> None:
    layers = RecurrentLayers(cell, 5, [7] * num_layers).double()
    reference = TORCH_LAYERS[cell](5, 7, num_layers).double()
    reference.load_state_dict(layers.state_dict())
    tokens = torch.randint(0, 5, (steps, lanes))
    one_hot = nn.functional.one_hot(tokens, 5).double()
    h0 = torch.randn(num_layers, lanes, 7, dtype=torch.float64)
    state = (h0, h0 / 2) if cell == "lstm" else h0
    for inputs in (tokens, one_hot):
        outputs, last_state = layers(inputs, state)
        expected, expected_state = reference(one_hot, state)
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last_state, expected_state, rtol=1e-12, atol=1e-12)
        weighting = torch.randn_like(expected)
        gradients = torch.autograd.grad((outputs * weighting).sum(), list(layers.parameters()))
        expected_gradients = torch.autograd.grad((expected * weighting).sum(), list(reference.parameters()))
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-11)


def test_model_under_bf16_autocast_is_close_to_fp32() -> None:
    model = build_model(ModelConfig(hidden_size=64), 20, seed=1)
    tokens = torch.randint(0, 20, (30, 4))
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = model(tokens, None)
    high, _ = model(tokens, None)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, rtol=0, atol=0.03)


def test_model_parameters_have_torch_names() -> None:
    names = set(build_model(ModelConfig(cell="lstm", num_layers=2), 9, 0).state_dict())
    layers = {f"rnn.{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for layer in (0, 1)}
    assert names == layers | {"linear.weight", "linear.bias"}


def test_build_model_weights_depend_only_on_seed() -> None:
    torch.manual_seed(1)
    first = build_model(ModelConfig(), 28, seed=5).state_dict()
    torch.manual_seed(2)
    again = build_model(ModelConfig(), 28, seed=5).state_dict()
    other = build_model(ModelConfig(), 28, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["rnn.weight_hh_l0"], other["rnn.weight_hh_l0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.bias": None}, r"linear.bias is missing, expected \(9,\)"),
        ({"linear.scale": torch.ones(9)}, r"linear.scale is \(9,\), expected no such tensor"),
        ({"linear.bias": torch.ones(8)}, r"linear.bias is \(8,\), expected \(9,\)"),
    ],
)
def test_load_weights_of_another_model_raises(change: dict[str, Any], message: str) -> None:
    model = build_model(ModelConfig(hidden_size=8), 9, 0)
    changed = {**model.state_dict(), **change}
    weights = {name: weight for name, weight in changed.items() if weight is not None}
    with pytest.raises(UserError, match=f"init: weights do not match the model: {message}"):
        load_weights(model, weights, "init")
