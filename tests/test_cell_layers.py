"""Cells from torch operators: each equals its paper's formulas, one step at a time, in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job, result
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from job.config.model import BUILTIN_CELLS, ModelConfig
from job.distributed.gradient_sync import AllReduceGradients, Batch, DeterministicGradients, LossModule, assign_lanes
from job.errors import UserError
from job.nn import scan
from job.nn.cell_layers import LAYERS, CellLayers
from job.nn.language_model import LanguageModel, build_model, build_model_with_weights, place_by_token
from job.nn.regularization import Regularization, mask_keys
from job.nn.rnn import RecurrentLayers
from job.nn.scan import linear_scan
from job.nn.state import State

TOKENS, SEPARATOR = 7, 6
PlainState = tuple[Tensor, ...]
Plain = Callable[[dict[str, Tensor], Tensor, PlainState], PlainState]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def mingru(weights: dict[str, Tensor], x: Tensor, state: PlainState) -> PlainState:
    """Feng et al., 2024, section 3.1: one step."""
    k, v = (x @ weights["linear.weight"].T + weights["linear.bias"]).chunk(2, 1)
    z = sigmoid(k)
    return ((1 - z) * state[0] + z * v,)


def minlstm(weights: dict[str, Tensor], x: Tensor, state: PlainState) -> PlainState:
    """Feng et al., 2024, section 3.2: one step, with the sum of the gates normalized to one."""
    f, i, v = (x @ weights["linear.weight"].T + weights["linear.bias"]).chunk(3, 1)
    f, i = sigmoid(f), sigmoid(i)
    return (f / (f + i) * state[0] + i / (f + i) * v,)


def lstm(weights: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor, first: int = 0) -> PlainState:
    """The last step of each of the two: that of an LSTM, with the rows of the weights from ``first`` on."""
    gates = x @ weights["weight_ih"][first:].T + h @ weights["weight_hh"][first:].T + weights["bias"]
    i, f, new, o = gates.chunk(4, 1)
    c = sigmoid(f) * c + sigmoid(i) * new.tanh()
    return sigmoid(o) * c.tanh(), c


def mlstm(weights: dict[str, Tensor], x: Tensor, state: PlainState) -> PlainState:
    """Krause et al., 2016, equations 18 to 23: one step."""
    units = state[0].shape[1]
    m = (x @ weights["weight_ih"][:units].T) * (state[0] @ weights["weight_hh"][:units].T)
    return lstm(weights, x, m, state[1], units)


def mogrifier(weights: dict[str, Tensor], x: Tensor, state: PlainState) -> PlainState:
    """Melis et al., 2020, equations 1 and 2, for five rounds: one step."""
    h, c = state
    x = 2 * sigmoid(h @ weights["rounds.0"].T) * x
    h = 2 * sigmoid(x @ weights["rounds.1"].T) * h
    x = 2 * sigmoid(h @ weights["rounds.2"].T) * x
    h = 2 * sigmoid(x @ weights["rounds.3"].T) * h
    x = 2 * sigmoid(h @ weights["rounds.4"].T) * x
    return lstm(weights, x, h, c)


PLAIN: dict[str, Plain] = {"mingru": mingru, "minlstm": minlstm, "mlstm": mlstm, "mogrifier": mogrifier}
SIZES: dict[str, Any] = {"hidden_size": (6, 5), "num_layers": 2, "embedding_size": 5, "tied": True}


def make_model(cell: str, **options: Any) -> LanguageModel:
    """A model with weights that are large enough for all gates to matter."""
    model = build_model(ModelConfig(cell=cell, **(options or SIZES)), TOKENS, 0).double()
    for weight in model.parameters():
        weight.data *= 2
    return model


def make_window(steps: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, TOKENS, (steps + 1, 3), generator=torch.Generator().manual_seed(steps))
    return tokens[:-1], tokens[1:]


def random_state(model: LanguageModel, inputs_TB: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    return tuple(torch.rand_like(tensor).requires_grad_() for tensor in tensors_of(model(inputs_TB, None)[1]))


def tensors_of(state: State) -> tuple[Tensor, ...]:
    assert isinstance(state, tuple)
    return state


def plain_run(
    cell: str, model: LanguageModel, tokens_TB: Tensor, state: PlainState
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits and state after a window, one step and layer at a time."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    assert isinstance(model.rnn, CellLayers)
    num_layers = len(model.rnn.layers)
    states = [tuple(tensor[0] for tensor in state[layer::num_layers]) for layer in range(num_layers)]
    logits = []
    for token_B in tokens_TB:
        x = F.one_hot(token_B, TOKENS).double() if model.embedding is None else model.embedding(token_B)
        for layer in range(num_layers):
            prefix = f"rnn.layers.{layer}."
            of_layer = {
                name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)
            }
            before = states[layer]
            if model.reset_token is not None:
                before = tuple(torch.where((token_B == model.reset_token)[:, None], 0, each) for each in before)
            states[layer] = PLAIN[cell](of_layer, x, before)
            x = states[layer][0]
        logits.append(x @ model.linear.weight.T + model.linear.bias)
    return torch.stack(logits), tuple(tensor[None] for part in zip(*states, strict=True) for tensor in part)


def test_every_builtin_cell_has_an_implementation() -> None:
    assert {*BUILTIN_CELLS} == {*RecurrentLayers.MODES, *LAYERS}
    assert LAYERS.keys() == PLAIN.keys()


@pytest.mark.parametrize("reset_token", [None, SEPARATOR])
@pytest.mark.parametrize("steps", [1, 2, 7, 32])
@pytest.mark.parametrize("options", [{}, {"hidden_size": 4}], ids=["tied", "one-hot"])
@pytest.mark.parametrize("cell", PLAIN)
def test_model_equals_the_formulas_of_its_paper(
    cell: str, options: dict[str, Any], steps: int, reset_token: int | None
) -> None:
    """Logits, state and all gradients, those of the state before the window, too."""
    model = make_model(cell, **options)
    model.reset_token = reset_token
    inputs_TB, targets_TB = make_window(steps)
    state = random_state(model, inputs_TB)
    found: list[list[Any]] = []
    for logits_TBV, last in (model(inputs_TB, state), plain_run(cell, model, inputs_TB, state)):
        loss = F.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten()) + sum(
            each.square().sum() for each in last
        )
        found.append([logits_TBV, *last, *torch.autograd.grad(loss, [*model.parameters(), *state])])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", PLAIN)
def test_windows_of_any_length_give_the_same_logits(cell: str) -> None:
    model = make_model(cell)
    inputs_TB, _ = make_window(21)
    whole, last = model(inputs_TB, None)
    for steps in (1, 2, 5, 16):
        parts: list[Tensor] = []
        state: State = None
        for start in range(0, 21, steps):
            logits_TBV, state = model(inputs_TB[start : start + steps], state)
            parts.append(logits_TBV)
        torch.testing.assert_close(
            [torch.cat(parts), *tensors_of(state)], [whole, *tensors_of(last)], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("loop_steps", [0, 40])
def test_linear_scan_passes_gradcheck(loop_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scan and by the loop."""
    torch.manual_seed(0)
    monkeypatch.setattr(scan, "LOOP_STEPS", loop_steps)
    for steps in (1, 2, 3, 6, 9):
        decay = torch.rand(steps, 2, 3, dtype=torch.float64)
        decay[steps // 2, 0] = 0
        inputs, h0 = torch.randn(steps, 2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        assert torch.autograd.gradcheck(linear_scan, [each.requires_grad_() for each in (decay, inputs, h0)])


@pytest.mark.parametrize("steps", [2, 41, 64, 65])
def test_linear_scan_equals_the_loop(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decay, inputs = torch.rand(steps, 3, 5, requires_grad=True), torch.randn(steps, 3, 5, requires_grad=True)
    h0, weights = torch.randn(3, 5, requires_grad=True), torch.randn(steps, 3, 5)
    found: list[list[torch.Tensor]] = []
    for numbers in (1, 1000):  # in a step, from which on the loop is used
        monkeypatch.setattr(scan, "LOOP_NUMBERS", numbers)
        monkeypatch.setattr(scan, "LOOP_STEPS", 0)
        hidden = linear_scan(decay, inputs, h0)
        found.append([hidden, *torch.autograd.grad((hidden * weights).sum(), (decay, inputs, h0))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["mingru", "minlstm"])
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_scan_of_many_steps_is_finite_with_any_gates(cell: str, scale: float) -> None:
    """Gates that are rounded to zero or one, for which logarithms or quotients would overflow in float32."""
    model = build_model(ModelConfig(cell=cell, hidden_size=8, embedding_size=4), TOKENS, 0)
    for weight in model.rnn.parameters():
        weight.data *= scale
    tokens = torch.randint(0, TOKENS, (2001, 3), generator=torch.Generator().manual_seed(0))
    nats, _ = model.cross_entropy_sum(tokens[:-1], tokens[1:], None)
    exact = build_model(ModelConfig(cell=cell, hidden_size=8, embedding_size=4), TOKENS, 0).double()
    exact.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    expected, _ = exact.cross_entropy_sum(tokens[:-1], tokens[1:], None)
    torch.testing.assert_close(nats.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(nats, list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("cell", PLAIN)
def test_state_keeps_float32_under_autocast(cell: str) -> None:
    model = build_model(ModelConfig(cell=cell, hidden_size=(32, 16), num_layers=2, embedding_size=8), TOKENS, 0)
    inputs_TB, targets_TB = make_window(9)
    exact, _ = model.cross_entropy_sum(inputs_TB, targets_TB, None)
    with torch.autocast("cpu", torch.bfloat16):
        nats, state = model.cross_entropy_sum(inputs_TB, targets_TB, None)
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(state))
    torch.testing.assert_close(nats, exact, rtol=1e-2, atol=0)
    nats.backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("cell", PLAIN)
def test_gradient_of_lane_groups_is_that_of_all_lanes_with_dropout(cell: str) -> None:
    config = ModelConfig(cell=cell, **SIZES, dropout=0.4, dropout_locked=True, input_dropout=0.2)
    model = build_model(config, TOKENS, 0).double()
    tokens = torch.randint(0, TOKENS, (10, 7), generator=torch.Generator().manual_seed(0))
    regularized = LossModule(model, 63)
    batch = Batch(tokens[:-1], tokens[1:], torch.zeros(3), mask_keys(config, 0, 3, range(7)))
    found: list[list[Any]] = []
    for sync in (
        AllReduceGradients(regularized, assign_lanes(7)),
        DeterministicGradients(regularized, assign_lanes(7, 3)),
    ):
        stats, state = sync(batch, None)
        found.append([stats[0].double(), *tensors_of(state), *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    plain, _ = model(tokens[:-1], None)
    dropped, _ = model(tokens[:-1], None, Regularization(config, batch.mask_keys_SB))
    assert not torch.allclose(plain, dropped)


@pytest.mark.parametrize("cell", ["mlstm", "mogrifier"])
def test_weight_drop_is_a_model_with_masked_hidden_weights(cell: str) -> None:
    """Logits, and gradients, which are zero where the mask is."""
    config = ModelConfig(cell=cell, **SIZES, weight_drop=0.5)
    model = make_model(cell)
    inputs_TB, targets_TB = make_window(9)
    regularization = Regularization(config, mask_keys(config, 0, 3, range(3)))
    weights = dict(model.named_parameters())
    hidden = [f"rnn.layers.{layer}.weight_hh" for layer in range(2)]
    masked = {name: regularization.drop_weight(weights[name], layer) for layer, name in enumerate(hidden)}
    assert all(0.3 < float((weight == 0).double().mean()) < 0.7 for weight in masked.values())
    found: list[dict[str, Tensor]] = []
    for logits_TBV in (model(inputs_TB, None, regularization)[0], functional_call(model, masked, (inputs_TB, None))[0]):
        nats = F.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten())
        gradients = torch.autograd.grad(nats, list(weights.values()))
        found.append({"nats": nats, **dict(zip(weights, gradients, strict=True))})
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert not any(found[0][name][masked[name] == 0].any() for name in hidden)


@pytest.mark.parametrize("cell", PLAIN)
def test_state_of_other_sizes_is_an_error(cell: str) -> None:
    inputs_TB, _ = make_window(4)
    with pytest.raises(UserError, match="the state of the lanes does not have the sizes of the model"):
        make_model(cell)(inputs_TB, (torch.zeros(1, 3, 6),))


@pytest.mark.parametrize("cell", PLAIN)
def test_weights_are_placed_by_token(cell: str) -> None:
    """The logits of a text do not depend on the order of the vocabulary."""
    config = ModelConfig(cell=cell, hidden_size=8)
    model, tokens = build_model(config, 5, 0).double(), "abcde"
    other = build_model(config, 5, 1).double()
    placed = place_by_token(dict(model.state_dict()), tokens, other, config, tokens[::-1])
    moved = build_model_with_weights(config, 5, 0, placed, torch.float64, "test")
    ids = torch.tensor([[0, 3, 1, 4]]).T
    torch.testing.assert_close(moved(4 - ids, None)[0].flip(2), model(ids, None)[0])


@pytest.mark.slow
@pytest.mark.parametrize("cell", PLAIN)
def test_train_interrupted_equals_uninterrupted_and_generates(cell: str, prose: Path, tmp_path: Path) -> None:
    flags: list[Any] = ["--corpus.source", prose, "--scale.workers", 0, "--run.storage", tmp_path]
    flags += ["--stream.batch_size", 8, "--stream.num_steps", 20, "--model.cell", cell, "--train.epochs", 2]
    flags += ["--model.num_layers", 2, "--model.hidden_size", "[32, 24]", "--model.embedding_size", 24]
    flags += ["--model.tied", "true", "--model.dropout", 0.2, "--train.precision", "fp32", "--generate.prefix", "the"]
    flags += ["--optimizer.name", "adamw", "--optimizer.learning_rate", 0.01, "--optimizer.averaging", "ema"]
    flags += ["--train.reproducible", "true", "--train.max_steps"]
    for name, steps in (("whole", 20), ("parts", 7), ("parts", 20)):
        trained = job("train", *flags, steps, "--run.name", name)
        assert trained.status == 0, trained.err
    whole, parts = result(tmp_path / "whole"), result(tmp_path / "parts")
    assert whole["weights_sha256"] == parts["weights_sha256"]
    assert whole["perplexity"] < 25
    for options in ([], ["--generate.temperature", 1, "--generate.num_samples", 2]):
        words = ["generate", "--generate.prefix", "the", "--json", *options]
        texts = [json.loads(job(*words, tmp_path / name).out) | {"checkpoint": ""} for name in ("whole", "parts")]
        assert texts[0] == texts[1]
    evaluated = job("evaluate", tmp_path / "whole", "--corpus.source", prose, "--corpus.max_tokens", 2000)
    assert evaluated.status == 0, evaluated.err
    trained = job("train", *flags, 22, "--run.name", "init", "--model.init", tmp_path / "whole")
    assert trained.status == 0, trained.err
