"""Loss, state and gradients of a step on a GPU agree with plain ``nn`` modules in float64 on the CPU.

Without a GPU the same tests run on the CPU, but for the precisions that it does not have.

Axes: T steps, B lanes, H hidden units, V tokens, L layers.
"""

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import disable_kernel
from test_cuda_graph import REGULARIZATION, small_config, train
from test_rnn import SEPARATOR, documents_alone, window_of_documents
from torch import Tensor, nn
from torch.nn import functional as F

from job.config.model import BUILTIN_CELLS, SCAN_CELLS, ModelConfig
from job.config.training import OptimizerConfig
from job.distributed.gradient_sync import AllReduceGradients, Batch, LossModule, assign_lanes
from job.nn.cell_layers import CellLayers
from job.nn.language_model import LanguageModel, build_model
from job.nn.regularization import Regularization, mask_keys
from job.nn.rnn import _rnn_layer_cudnn, _rnn_layer_torch
from job.nn.state import LayerState, State

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

NN_CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
CELLS = [*BUILTIN_CELLS, "cells:DecayCell"]


@dataclass(frozen=True)
class Numbers:
    """A precision, and how far its results may be from those of float64, relative to each tensor's norm."""

    weights: torch.dtype
    autocast: torch.dtype | None
    allow_tf32: bool  # in products of float32 on a GPU
    tolerance: float


PRECISIONS = {
    "fp64": Numbers(torch.float64, None, False, 1e-10),
    "fp32": Numbers(torch.float32, None, False, 1e-5),
    "tf32": Numbers(torch.float32, None, True, 1e-2),
    "bf16": Numbers(torch.float32, torch.bfloat16, False, 5e-2),
    "fp16": Numbers(torch.float32, torch.float16, False, 1e-2),
}
ON_CUDA_ONLY = {"tf32", "fp16"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and its batch."""

    lanes: int
    steps: int
    units: int
    tokens: int
    embedding: int


SIZES = {
    "aligned": Sizes(lanes=8, steps=16, units=64, tokens=32, embedding=16),
    "odd": Sizes(lanes=5, steps=7, units=33, tokens=11, embedding=0),
    "odd-embedding": Sizes(lanes=3, steps=5, units=41, tokens=13, embedding=9),
}


@pytest.fixture
def numbers(request: pytest.FixtureRequest) -> Iterator[Numbers]:
    """The precision that the test's parameter names, with float32 products of that kind on a GPU."""
    precision = PRECISIONS[request.param]
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = precision.allow_tf32
    yield precision
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def precision_parameters() -> list[object]:
    return [pytest.param(name, marks=[pytest.mark.cuda] * (name in ON_CUDA_ONLY)) for name in PRECISIONS]


def make_batch(sizes: Sizes, config: ModelConfig, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens_TB = torch.randint(0, sizes.tokens, (sizes.steps + 1, sizes.lanes), generator=generator)
    keys_SB = mask_keys(config, 0, 5, range(sizes.lanes))
    return Batch(tokens_TB[:-1], tokens_TB[1:], torch.zeros(3), keys_SB).to(device)


def plain_loss(
    model: LanguageModel, batch: Batch, regularization: Regularization, cell: str
) -> tuple[Tensor, list[Tensor]]:
    """The summed loss of a window from a zero state and the state after it, by plain ``nn`` modules."""
    if model.embedding is None:
        x_TBE = F.one_hot(batch.inputs_TB, model.linear.out_features).double()
    else:
        embedded_TBE = model.embedding(batch.inputs_TB)
        x_TBE = regularization.drop_inputs(embedded_TBE, batch.inputs_TB, model.linear.out_features)
    last_states: list[tuple[Tensor, ...]] = []
    if cell in NN_CELLS:
        recurrent: Any = model.rnn
        for layer, (weight_GE, weight_GH, *biases) in enumerate(recurrent.all_weights):
            weights = [weight_GE, regularization.drop_weight(weight_GH, layer), *biases]
            module = NN_CELLS[cell](x_TBE.shape[2], weights[1].shape[1]).double()
            if layer:
                x_TBE = regularization.drop_between_layers(x_TBE, layer)
            names = [name for name, _ in module.named_parameters()]
            x_TBE, state = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x_TBE,))
            last_states.append(state if isinstance(state, tuple) else (state,))
    elif isinstance(model.rnn, CellLayers):  # in float64, whose numbers test_cell_layers.py compares with formulas
        x_TBE, state = model.rnn(x_TBE, None, regularization, None)
        last_states.append(tuple(state_tensors(state)))
    else:
        x_TBE, state = model.rnn(x_TBE, None)
        last_states.append(state)
    logits_TBV = F.linear(regularization.drop_outputs(x_TBE), model.linear.weight, model.linear.bias)
    nats = F.cross_entropy(logits_TBV.flatten(0, 1), batch.targets_TB.flatten(), reduction="sum")
    return nats, [torch.cat(tensors) for tensors in zip(*last_states, strict=True)]


def state_tensors(state: State) -> list[Tensor]:
    return list(state) if isinstance(state, tuple) else [] if state is None else [state]


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, exact in expected.items():
        found = actual[name].detach().cpu().double()
        assert found.shape == exact.shape, name
        error = (found - exact).norm() / exact.norm().clamp(min=0.1)
        assert error <= tolerance, (name, error.item())


@pytest.mark.parametrize("numbers", precision_parameters(), indirect=True)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_step_on_gpu_agrees_with_plain_modules_in_float64(
    cell: str, num_layers: int, sizes: Sizes, numbers: Numbers, device: torch.device
) -> None:
    if cell not in BUILTIN_CELLS and num_layers > 1:
        cell = "cells:LinearCell"  # DecayCell has one layer only
    rates: dict[str, Any] = {"dropout": 0.3} if num_layers > 1 else {}
    if num_layers > 1 and sizes.embedding:
        rates |= {"input_dropout": 0.2, "embedding_dropout": 0.1}
    if num_layers > 1 and cell in {*BUILTIN_CELLS} - {*SCAN_CELLS}:
        rates |= {"weight_drop": 0.2}
    config = ModelConfig(
        cell=cell, hidden_size=sizes.units, num_layers=num_layers, embedding_size=sizes.embedding,
        dropout_locked=bool(sizes.embedding), **rates,
    )  # fmt: skip
    model = build_model(config, sizes.tokens, seed=1)
    exact = copy.deepcopy(model).double()
    model = model.to(device, numbers.weights)
    batch = make_batch(sizes, config, device)
    gradients = AllReduceGradients(LossModule(model, 1, config, numbers.autocast), assign_lanes(sizes.lanes))
    with warnings.catch_warnings():
        if sizes is SIZES["aligned"]:  # cuDNN copies weights at each call that are not one piece of memory
            warnings.filterwarnings("error", "RNN module weights are not part of single contiguous chunk")
        stats, state = gradients(batch, None)

    batch = batch.to(torch.device("cpu"))
    nats, last_state = plain_loss(exact, batch, Regularization(config, batch.mask_keys_SB), cell)
    nats.backward()
    if cell in BUILTIN_CELLS or num_layers == 1:
        tensors = state_tensors(state)
        found = {f"state {index}": tensor for index, tensor in enumerate(tensors)} | {"loss": stats[0]}
        expected = {f"state {index}": tensor.detach() for index, tensor in enumerate(last_state)}
        assert_near(found, expected | {"loss": nats.detach()}, numbers.tolerance)
    found, expected = (
        {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
        for net in (model, exact)
    )
    assert len(expected) > 3
    assert_near(found, expected, numbers.tolerance)


@pytest.mark.parametrize("numbers", ["fp64", "fp32", "bf16"], indirect=True)
@pytest.mark.parametrize("cell", CELLS)
def test_step_that_resets_on_gpu_agrees_with_each_document_alone_in_float64(
    cell: str, numbers: Numbers, device: torch.device
) -> None:
    model = build_model(ModelConfig(cell=cell, hidden_size=64, embedding_size=16), SEPARATOR + 1, seed=1)
    exact = copy.deepcopy(model).double()
    model.to(device, numbers.weights).reset_token = SEPARATOR
    torch.manual_seed(0)
    inputs, targets = window_of_documents(12, 11)
    batch = Batch(inputs, targets, torch.zeros(3), torch.zeros(0, 11, dtype=torch.int32)).to(device)
    gradients = AllReduceGradients(LossModule(model, 1, autocast=numbers.autocast), assign_lanes(11))
    stats, state = gradients(batch, None)
    nats, last = documents_alone(exact, inputs, targets, None)
    nats.backward()
    tensors = {f"state {index}": tensor for index, tensor in enumerate(state_tensors(state))} | {"loss": stats[0]}
    expected = {f"state {index}": tensor.detach() for index, tensor in enumerate(last)} | {"loss": nats.detach()}
    found, exact_gradients = (
        {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
        for net in (model, exact)
    )
    assert_near(tensors | found, expected | exact_gradients, numbers.tolerance)


@pytest.mark.parametrize("name", [*BUILTIN_CELLS])
@pytest.mark.parametrize(
    "numbers", ["fp64", "fp32", pytest.param("fp16", marks=pytest.mark.cuda), "bf16"], indirect=True
)
def test_two_windows_on_gpu_carry_state_as_one_long_window(name: str, numbers: Numbers, device: torch.device) -> None:
    """The state after a window is complete: continuing from it gives the same outputs."""
    sizes = SIZES["odd-embedding"]
    config = ModelConfig(cell=name, hidden_size=sizes.units, num_layers=2, embedding_size=sizes.embedding)
    model = build_model(config, sizes.tokens, seed=1).to(device, numbers.weights)
    inputs_TB = make_batch(sizes, config, device).inputs_TB
    with torch.no_grad(), torch.autocast(device.type, numbers.autocast, enabled=numbers.autocast is not None):
        whole, last = model(inputs_TB, None)
        first, state = model(inputs_TB[:2], None)
        second, state = model(inputs_TB[2:], state)
    found = {str(index): tensor for index, tensor in enumerate([torch.cat([first, second]), *state_tensors(state)])}
    expected = {str(index): tensor.double().cpu() for index, tensor in enumerate([whole, *state_tensors(last)])}
    assert_near(found, expected, numbers.tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cell", ["RNN_TANH", "GRU", "LSTM"])
def test_cudnn_layer_equals_torch_operator_with_converted_weights(
    cell: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Weights converted in one piece of memory give the numbers of weights that torch converts one by one."""
    sizes = SIZES["aligned"]
    torch.use_deterministic_algorithms(True)  # so that cuDNN adds in one order
    torch.manual_seed(0)
    module = NN_CELLS[cell.removesuffix("_TANH").lower()](sizes.embedding, sizes.units).to(device)
    inputs_TBE = torch.randn(sizes.steps, sizes.lanes, sizes.embedding, device=device)
    state = tuple(torch.randn(sizes.lanes, sizes.units, device=device) for _ in range(1 + (cell == "LSTM")))
    results = []
    for layer in (
        lambda weights: _rnn_layer_cudnn(cell, dtype, inputs_TBE, state, weights),
        lambda weights: _rnn_layer_torch(
            cell, inputs_TBE.to(dtype), tuple(x.to(dtype) for x in state), [weight.to(dtype) for weight in weights]
        ),
    ):
        weights = [weight.detach().clone().requires_grad_() for weight in module.parameters()]
        hidden_TBH, last = layer(weights)
        assert hidden_TBH.dtype == dtype
        hidden_TBH.float().square().sum().backward()
        results.append([hidden_TBH, *(tensor.float() for tensor in last), *(weight.grad for weight in weights)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cell", NN_CELLS)
def test_graph_with_converted_weights_equals_eager_step(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer of a GPU in a captured step, with a recorded list of torch operations in the place of the graph."""
    disable_kernel(monkeypatch)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    num_conversions = 0

    def layer(
        cell: str,
        _: torch.dtype,
        inputs: Tensor,
        embedding_VE: Tensor,
        state: LayerState,
        weights: list[Tensor],
        starts_TB: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        nonlocal num_conversions
        num_conversions += 1
        inputs_TBE = inputs if inputs.is_floating_point() else F.embedding(inputs, embedding_VE)
        hidden_TBH, last_state = _rnn_layer_cudnn(cell, torch.float64, inputs_TBE, state, weights, starts_TB)
        return hidden_TBH.float(), last_state

    monkeypatch.setattr("job.nn.rnn.can_use_kernel", lambda *_: True)
    monkeypatch.setattr("job.nn.rnn._rnn_layer_kernel", layer)
    config = dataclasses.replace(
        small_config(epochs=2),
        model=ModelConfig(cell=cell, hidden_size=8, num_layers=2, embedding_size=4, dropout=0.3, **REGULARIZATION),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.1, grad_clip_norm=0.5),
    )
    eager, graph = (train(config, use_graph) for use_graph in (False, True))
    assert (eager[-1], graph[-1]) == (0, 1)
    assert num_conversions > 2 * len(eager[0])
    torch.testing.assert_close(graph[:-1], eager[:-1], rtol=0, atol=0)
