"""Layers, loss and greedy decoding: each implementation agrees with torch's own outputs, states and gradients."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import disable_kernel, not_none
from torch import nn
from torch.nn import functional as F

from job.config.model import ModelConfig
from job.errors import UserError
from job.inference import decoder
from job.inference.ensemble import Ensemble
from job.inference.generate import continue_greedily
from job.nn import cross_entropy
from job.nn.cross_entropy import linear_cross_entropy
from job.nn.language_model import LanguageModel, build_model
from job.nn.regularization import Regularization, mask_keys
from job.nn.rnn import RecurrentLayers, _flatten_weights, rnn_layer
from job.nn.rnn_fallback import gru_layer, tanh_layer
from job.nn.state import State, map_state, slice_state

CELLS = {"RNN_TANH": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
SIZES = [(1, 1, 1, 3), (5, 3, 7, 4), (17, 1, 6, 9), (33, 3, 1, 28), (257, 9, 3, 10), (64, 35, 5, 70)]  # H, B, T, V
# Relative to each tensor's norm, or to 0.1 if that is larger, for sums of a few numbers that cancel. A bf16 has 2^-9.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def state_tensors(state: Any) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def inner_product(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    products = [(a.double() * b).sum() for a, b in zip(tensors, others, strict=True)]
    return torch.stack(products).sum()


def assert_near(actual: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp(min=0.1)
        assert error <= tolerance, (number, error.item())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("input_form", ["one-hot", "embedding", "features"])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_layer_agrees_with_torch_in_float64(
    implementation: str, cell: str, input_form: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for units, lanes, steps, tokens in SIZES:
        features = tokens if input_form == "one-hot" else 6
        reference = CELLS[cell](features, units)
        weights = [weight.detach().to(weight_dtype).requires_grad_() for weight in reference.parameters()]
        reference = reference.double()
        inputs = torch.randint(0, tokens, (steps, lanes))
        embedding = torch.randn(tokens, features, requires_grad=True, dtype=weight_dtype)
        num_tensors = 2 if cell == "LSTM" else 1
        state = [torch.rand(lanes, units, dtype=weight_dtype).requires_grad_() for _ in range(num_tensors)]
        leaves = [*weights, *state, *([] if input_form == "one-hot" else [embedding])]

        exact_embedding = torch.eye(tokens) if input_form == "one-hot" else embedding.detach()
        exact_embedding = exact_embedding.double().requires_grad_()
        exact_state = [part.detach().double().requires_grad_() for part in state]
        initial = tuple(part[None] for part in exact_state)
        hidden, last = reference(F.embedding(inputs, exact_embedding), initial if cell == "LSTM" else initial[0])
        expected = [hidden, *(part[0] for part in state_tensors(last))]
        exact_leaves = [*reference.parameters(), *exact_state, *([] if input_form == "one-hot" else [exact_embedding])]
        output_grads = [torch.randn_like(part) for part in expected]

        with autocast(dtype):
            if input_form == "features":
                hidden, last = rnn_layer(cell, F.embedding(inputs, embedding), None, tuple(state), weights)
            else:
                table = embedding if input_form == "embedding" else None
                hidden, last = rnn_layer(cell, inputs, table, tuple(state), weights)
        outputs = [hidden, *last]
        assert hidden.dtype == dtype
        assert_near(outputs, expected, TOLERANCES[dtype])
        loss = inner_product(outputs, output_grads)
        exact_loss = inner_product(expected, output_grads)
        assert_near(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact_loss, exact_leaves), TOLERANCES[dtype])


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("use_bf16", [False, True], ids=["float32", "bfloat16"])
def test_model_with_dropout_agrees_with_float64(implementation: str, cell: str, use_bf16: bool) -> None:
    model_config = ModelConfig(cell=cell, hidden_size=40, num_layers=3, embedding_size=7, dropout=0.3)
    model, exact = (build_model(model_config, 11, seed=1) for _ in range(2))
    exact = exact.double()
    inputs, targets = torch.randint(0, 11, (2, 6, 4))
    regularization = Regularization(model_config, mask_keys(model_config, 0, 5, range(4)))
    with autocast(torch.bfloat16 if use_bf16 else None):
        nats, state = model.cross_entropy_sum(inputs, targets, None, regularization)
    expected, exact_state = exact.cross_entropy_sum(inputs, targets, None, regularization)
    nats.backward()
    expected.backward()
    tolerance = TOLERANCES[torch.bfloat16 if use_bf16 else torch.float32]
    assert_near([nats, *state_tensors(state)], [expected, *state_tensors(exact_state)], tolerance)
    gradients, exact_gradients = ([weight.grad for weight in net.parameters()] for net in (model, exact))
    assert_near(gradients, exact_gradients, tolerance)


SEPARATOR = 8  # the last of 9 tokens


def window_of_documents(steps: int, lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of lanes with no separator, one at the first step, one at the last, three in a row, or any."""
    inputs, targets = torch.randint(0, SEPARATOR, (2, steps, lanes))
    inputs[0, 1] = inputs[-1, 2] = SEPARATOR
    inputs[3:6, 3] = SEPARATOR
    inputs[:, 4:][torch.rand(steps, lanes - 4) < 0.3] = SEPARATOR
    return inputs, targets


def documents_alone(
    model: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor, state: State
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of a window and the state after it, of each document of each lane on its own."""
    losses, states = [], []
    for lane in range(inputs.shape[1]):
        tokens, lane_state = inputs[:, lane : lane + 1], slice_state(state, lane, 1)
        cuts = [step for step in range(1, len(tokens)) if tokens[step] == SEPARATOR]
        for start, stop in pairwise([0, *cuts, len(tokens)]):
            before = None if tokens[start] == SEPARATOR else lane_state
            nats, lane_state = model.cross_entropy_sum(tokens[start:stop], targets[start:stop, lane : lane + 1], before)
            losses.append(nats)
        states.append(state_tensors(lane_state))
    return torch.stack(losses).sum(), [torch.cat(parts, 1) for parts in zip(*states, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "cell",
    [
        *("rnn", "gru", "lstm", "cells:DecayCell", "torch.nn:LSTM"),
        pytest.param("torch.nn:GRU", marks=pytest.mark.slow),
    ],
)
def test_model_that_resets_agrees_with_each_document_alone_from_zero_state(
    implementation: str, cell: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_layers = 1 if cell == "cells:DecayCell" else 2
    config = ModelConfig(cell=cell, hidden_size=40, num_layers=num_layers, embedding_size=7 * (cell != "gru"))
    model, exact = (build_model(config, 9, seed=1) for _ in range(2))
    exact.double()
    model.to(torch.float64 if dtype == torch.float64 else torch.float32).reset_token = SEPARATOR
    inputs, targets = window_of_documents(12, 11)
    with torch.no_grad():
        _, first = exact(inputs, None)
    exact_state = map_state(lambda part: part.clone().requires_grad_(), first)
    state = map_state(lambda part: part.to(model.linear.weight.dtype).requires_grad_(), first)
    with autocast(dtype):
        nats, last = model.cross_entropy_sum(inputs, targets, state)
    expected, exact_last = documents_alone(exact, inputs, targets, exact_state)
    tolerance = TOLERANCES[dtype]
    assert_near([nats, *state_tensors(last)], [expected, *exact_last], tolerance)
    leaves, exact_leaves = (
        [*net.parameters(), *state_tensors(before)] for net, before in ((model, state), (exact, exact_state))
    )
    gradients = torch.autograd.grad(nats, leaves, allow_unused=True)
    exact_gradients = torch.autograd.grad(expected, exact_leaves, allow_unused=True)
    used = [number for number, gradient in enumerate(exact_gradients) if gradient is not None]
    assert [number for number, gradient in enumerate(gradients) if gradient is not None] == used
    assert_near([gradients[number] for number in used], [exact_gradients[number] for number in used], tolerance)
    for gradient in gradients[len(list(model.parameters())) :]:
        assert gradient is None or not gradient[:, 1].any()  # its first token is the separator


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "torch.nn:GRU"])
def test_model_that_resets_has_the_dropout_masks_of_one_that_does_not(
    implementation: str, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(cell=cell, hidden_size=64, num_layers=2, dropout=0.5)
    model = build_model(config, 9, 0)
    inputs, _ = window_of_documents(12, 11)
    regularization = Regularization(config, mask_keys(config, 0, 5, range(11)))
    dropped: list[torch.Tensor] = []
    original = Regularization._drop

    def drop(self: Regularization, *arguments: Any) -> torch.Tensor:
        dropped.append(original(self, *arguments) == 0)
        return original(self, *arguments)

    monkeypatch.setattr(Regularization, "_drop", drop)
    for reset_token in (None, SEPARATOR):
        model.reset_token = reset_token
        model(inputs, None, regularization)
    num_sites = 1 if cell == "torch.nn:GRU" else 2  # the layers of a custom cell are its own
    assert len(dropped) == 2 * num_sites
    for carried, reset in zip(dropped[:num_sites], dropped[num_sites:], strict=True):
        assert torch.equal(carried, reset)
        assert 0.4 < reset.float().mean() < 0.6


def test_fallback_layers_pass_gradcheck() -> None:
    def random(*shape: Any) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(tanh_layer, [random(4, 2, 3), random(2, 3), random(3, 3)])
    assert torch.autograd.gradcheck(gru_layer, [random(4, 2, 9), random(2, 3), random(9, 3), random(3)])


@pytest.mark.parametrize(
    ("rows", "units", "tokens"), [(1, 32, 2), (37, 64, 5), (130, 256, 257), (9, 1, 3), (70, 45, 40), (5, 200, 65)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_linear_cross_entropy_agrees_with_torch_in_float64(
    implementation: str, dtype: torch.dtype, rows: int, units: int, tokens: int
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, rows, units, requires_grad=True)
    weight, bias = torch.randn(tokens, units, requires_grad=True), torch.randn(tokens, requires_grad=True)
    targets = torch.randint(0, tokens, (1, rows))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = F.cross_entropy(F.linear(*exact)[0], targets[0], reduction="sum")
    with autocast(dtype):
        nats = linear_cross_entropy(hidden.to(dtype), weight, bias, targets)
    assert nats.dtype == torch.float32
    assert_near([nats], [expected], TOLERANCES[dtype])
    gradients = torch.autograd.grad(nats / 7, [hidden, weight, bias])
    assert_near(gradients, torch.autograd.grad(expected / 7, exact), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_linear_cross_entropy_in_chunks_equals_that_of_all_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable_kernel(monkeypatch)
    torch.manual_seed(0)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, weight, bias = (
        torch.randn(*shape, dtype=weight_dtype, requires_grad=True) for shape in [(9, 3, 45), (50, 45), (50,)]
    )
    targets, results = torch.randint(0, 50, (9, 3)), []
    chunks = mock.Mock(wraps=cross_entropy._add_gradients)
    monkeypatch.setattr(cross_entropy, "_add_gradients", chunks)
    evaluated = mock.Mock(wraps=cross_entropy._cross_entropy_torch)
    monkeypatch.setattr(cross_entropy, "_cross_entropy_torch", evaluated)
    for limit in (27 * 50, 10 * 50, 1):
        monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", limit)
        chunks.reset_mock()
        with autocast(dtype):
            nats = linear_cross_entropy(hidden, weight, bias, targets)
        results.append([nats, *torch.autograd.grad(nats / 7, [hidden, weight, bias])])
        rows = [call.args[4].shape[0] for call in chunks.mock_calls] or [27]
        assert (max(rows), sum(rows)) == (max(1, limit // 50), 27)
        with torch.no_grad(), autocast(dtype):
            assert_near([linear_cross_entropy(hidden, weight, bias, targets)], [nats], TOLERANCES[dtype])
        assert max(call.args[3].numel() for call in evaluated.mock_calls) == max(1, limit // 50)
        evaluated.reset_mock()
    for chunked in results[1:]:
        assert_near(chunked, results[0], TOLERANCES[dtype])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_linear_cross_entropy_of_nonfinite_hidden_state_is_nan(implementation: str, value: float) -> None:
    hidden = torch.ones(3, 2, 32)
    hidden[1, 1, 7] = value
    nats = linear_cross_entropy(hidden, torch.randn(5, 32), torch.zeros(5), torch.zeros(3, 2, dtype=torch.int64))
    assert nats.isnan()


def test_linear_cross_entropy_rejects_mismatched_shapes(implementation: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        linear_cross_entropy(
            torch.ones(1, 4, 32), torch.ones(5, 32), torch.zeros(5), torch.zeros(5, 4, dtype=torch.int64)
        )


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize(
    ("sizes", "embedding", "resets"),
    [((64,), 0, False), ((64, 64), 7, True), ((37,), 5, True), ((70, 33, 5), 0, False)],
)
def test_greedy_decoding_equals_argmax_steps(
    implementation: str,
    cell: str,
    sizes: tuple[int, ...],
    embedding: int,
    resets: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ModelConfig(cell=cell, num_layers=len(sizes), embedding_size=embedding, hidden_size=sizes)
    model = build_model(config, 28, 3)
    for name, weight in model.named_parameters():
        weight.data *= 2 if "weight_hh" in name else 8  # so that many tokens are generated
    prefixes = torch.randint(0, 28, (5, 7), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(decoder, "GREEDY_CHUNK", 7)

    def generate(prefixes_NB: torch.Tensor) -> torch.Tensor:
        ensemble = Ensemble([model])
        return continue_greedily(ensemble, prefixes_NB[-1], ensemble.advance(prefixes_NB[:-1], [None]), 16)

    generated = generate(prefixes)
    if resets:  # at a token that occurs
        carried, model.reset_token = generated, int(generated[3, 3])
        generated = generate(prefixes)
        assert not torch.equal(generated, carried)
    inputs, state, expected = prefixes, None, []
    with torch.no_grad():
        for _ in range(16):
            logits, state = model(inputs, state)
            inputs = logits[-1:].argmax(2)
            expected.append(inputs[0])
    assert torch.equal(generated, torch.stack(expected))
    assert torch.equal(generate(prefixes[:, 3:4]), generated[:, 3:4])


def test_flatten_weights_makes_equal_contiguous_weights() -> None:
    """As cuDNN needs them; the check itself needs no GPU."""
    weights: list[torch.Tensor] = list(torch.nn.GRU(5, 8).parameters())
    flat_weights = _flatten_weights(weights, torch.float64)
    assert all(torch.equal(flat, weight.double()) for flat, weight in zip(flat_weights, weights, strict=True))
    ends = [flat.data_ptr() + flat.numel() * 8 for flat in flat_weights]
    assert [flat.data_ptr() for flat in flat_weights[1:]] == ends[:-1]
    torch.cat([flat.flatten() for flat in flat_weights]).square().sum().backward()
    assert all(torch.allclose(not_none(weight.grad), 2 * weight) for weight in weights)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("shape", [(2, 3, 16), (2, 3, 64), (2, 2, 32), (1, 3, 32), (2, 3, 32, 1)])
def test_layers_with_state_of_other_sizes_raise_user_error(cell: str, shape: tuple[Any, ...]) -> None:
    """The kernel wrote beyond the end of its memory, by as much as a checkpoint's state was too small."""
    layers = RecurrentLayers(cell, 8, [32, 32])
    state = torch.zeros(shape)
    with pytest.raises(UserError, match="the state of the lanes does not have the sizes of the model"):
        layers(torch.zeros(5, 3, 8), (state, state) if cell == "lstm" else state)


@pytest.mark.parametrize(("cell", "num_tensors"), [("rnn", 2), ("gru", 0), ("lstm", 1)])
def test_layers_with_another_number_of_states_raise_user_error(cell: str, num_tensors: int) -> None:
    with pytest.raises(UserError, match="the state of the lanes does not have the sizes of the model"):
        RecurrentLayers(cell, 8, [32, 32])(torch.zeros(5, 3, 8), (torch.zeros(2, 3, 32),) * num_tensors)
