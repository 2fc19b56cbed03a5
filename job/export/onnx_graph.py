"""The ONNX graph of a step of a model, built from its configuration and its weights.

Each built-in cell is a function of a few operators. The weights have the names that they have in a checkpoint. A
variable that holds a value of the graph holds its name, with the axes of the value: B lanes, E input features, H hidden
units, G gates times hidden units, V tokens of the vocabulary, K tokens and clusters of the head of an adaptive softmax,
F features and N tokens of one of its tails.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from job.config.model import ModelConfig
from job.nn.adaptive_softmax import resolve_cutoffs

OPSET, IR_VERSION = 17, 8  # of 2022, so that old versions of runtimes read the file
LANES = "batch"  # the name of the free axis
Step = Callable[..., tuple[str, ...]]  # layer, input and state tensors to new state tensors, of which the first is h


@dataclass
class Graph:
    """The nodes and constants of a graph. Values are strings, the names of nodes' outputs.

    Args:
        onnx: the library
        weights: those of the model, by name
    """

    onnx: Any
    weights: dict[str, Tensor]
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)

    def add(self, operator: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Adds a node; returns the name of its first output.

        Args:
            operator: of ONNX
            inputs: names of values
            outputs: names for its outputs; empty: a name is made for the only one
            attributes: of the operator
        """
        names = list(outputs) or [f"{operator.lower()}_{len(self.nodes)}"]
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, names, **attributes))
        return names[0]

    def constant(self, name: str, array: np.ndarray) -> str:
        """Sets a constant; returns its name."""
        self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def sum(self, first: str, *others: str) -> str:
        """Adds the sum of values."""
        return self.add("Sum", first, *others)

    def product(self, first: str, second: str) -> str:
        """Adds the elementwise product of two values."""
        return self.add("Mul", first, second)

    def sigmoid(self, value: str) -> str:
        """Adds the logistic function of a value."""
        return self.add("Sigmoid", value)

    def tanh(self, value: str) -> str:
        """Adds the hyperbolic tangent of a value."""
        return self.add("Tanh", value)

    def split(self, value: str, sizes: Sequence[int], axis: int = 1) -> list[str]:
        """Adds the parts of a value along an axis."""
        names = [f"split_{len(self.nodes)}_{index}" for index in range(len(sizes))]
        constant = self.constant(f"sizes_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
        self.add("Split", value, constant, outputs=names, axis=axis)
        return names

    def weight(self, name: str) -> str:
        """Returns a weight of the model, in float32."""
        return name if name in self.constants else self.constant(name, self.weights[name].detach().float().numpy())

    def linear(self, value_BE: str, weight_GE: str, *bias_G: str) -> str:
        """Adds the value (B, G) of a linear layer."""
        return self.add("Gemm", value_BE, weight_GE, *bias_G, transB=1)

    def layer(self, value_BE: str, name: str) -> str:
        """Adds the value of a linear layer of this name."""
        return self.linear(value_BE, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))


@dataclass(frozen=True)
class LayerGraph:
    """A layer in a graph.

    Args:
        graph: to which nodes are added
        pattern: the name of a weight of this layer, with ``{}`` for the part that is the same in all layers
        units: number of hidden units H
    """

    graph: Graph
    pattern: str
    units: int

    def weight(self, name: str) -> str:
        """Returns a weight of the layer."""
        return self.graph.weight(self.pattern.format(name))

    def linear(self, value_BE: str, *names: str) -> str:
        """Adds the product with a weight of the layer, and its bias if that is named, too."""
        return self.graph.linear(value_BE, *map(self.weight, names))

    def gates(self, value_BG: str, count: int) -> list[str]:
        """Returns the part (B, H) of each gate."""
        return self.graph.split(value_BG, [self.units] * count)


# --- one step of each cell ---


def _rnn(layer: LayerGraph, x_BE: str, h_BH: str) -> tuple[str]:
    preacts_BH = (layer.linear(x_BE, "weight_ih", "bias_ih"), layer.linear(h_BH, "weight_hh", "bias_hh"))
    return (layer.graph.tanh(layer.graph.sum(*preacts_BH)),)


def _gru(layer: LayerGraph, x_BE: str, h_BH: str) -> tuple[str]:
    graph = layer.graph
    reset_x, update_x, new_x = layer.gates(layer.linear(x_BE, "weight_ih", "bias_ih"), 3)
    reset_h, update_h, new_h = layer.gates(layer.linear(h_BH, "weight_hh", "bias_hh"), 3)
    reset_BH, update_BH = graph.sigmoid(graph.sum(reset_x, reset_h)), graph.sigmoid(graph.sum(update_x, update_h))
    new_BH = graph.tanh(graph.sum(new_x, graph.product(reset_BH, new_h)))
    return (_mix(graph, update_BH, new_BH, h_BH),)


def _mix(graph: Graph, share_BH: str, first_BH: str, second_BH: str) -> str:
    """Returns ``first + share * (second - first)``."""
    return graph.sum(first_BH, graph.product(share_BH, graph.add("Sub", second_BH, first_BH)))


def _lstm(layer: LayerGraph, x_BE: str, h_BH: str, c_BH: str) -> tuple[str, str]:
    preacts_BG = (layer.linear(x_BE, "weight_ih", "bias_ih"), layer.linear(h_BH, "weight_hh", "bias_hh"))
    return _lstm_gates(layer, layer.graph.sum(*preacts_BG), c_BH)


def _lstm_gates(layer: LayerGraph, preacts_BG: str, c_BH: str) -> tuple[str, str]:
    graph = layer.graph
    input_BH, forget_BH, new_BH, output_BH = layer.gates(preacts_BG, 4)
    new_c = graph.product(graph.sigmoid(input_BH), graph.tanh(new_BH))
    c_BH = graph.sum(graph.product(graph.sigmoid(forget_BH), c_BH), new_c)
    return graph.product(graph.sigmoid(output_BH), graph.tanh(c_BH)), c_BH


def _mingru(layer: LayerGraph, x_BE: str, h_BH: str) -> tuple[str]:
    gate_BH, candidate_BH = layer.gates(layer.linear(x_BE, "linear.weight", "linear.bias"), 2)
    return (_mix(layer.graph, layer.graph.sigmoid(gate_BH), h_BH, candidate_BH),)


def _minlstm(layer: LayerGraph, x_BE: str, h_BH: str) -> tuple[str]:
    graph = layer.graph
    forget_BH, input_BH, candidate_BH = layer.gates(layer.linear(x_BE, "linear.weight", "linear.bias"), 3)
    # log sigmoid(i) - log sigmoid(f), since log sigmoid(x) = -softplus(-x)
    softplus = [graph.add("Softplus", graph.add("Neg", value_BH)) for value_BH in (forget_BH, input_BH)]
    return (_mix(graph, graph.sigmoid(graph.add("Sub", *softplus)), h_BH, candidate_BH),)


def _mlstm(layer: LayerGraph, x_BE: str, h_BH: str, c_BH: str) -> tuple[str, str]:
    graph, sizes = layer.graph, [layer.units, 4 * layer.units]
    (factor_HE, weight_GE), (factor_HH, weight_GH) = (
        graph.split(layer.weight(name), sizes, axis=0) for name in ("weight_ih", "weight_hh")
    )
    m_BH = graph.product(graph.linear(x_BE, factor_HE), graph.linear(h_BH, factor_HH))
    preacts_BG = (graph.linear(x_BE, weight_GE, layer.weight("bias")), graph.linear(m_BH, weight_GH))
    return _lstm_gates(layer, graph.sum(*preacts_BG), c_BH)


def _mogrifier(layer: LayerGraph, x_BE: str, h_BH: str, c_BH: str) -> tuple[str, str]:
    graph, scaled = layer.graph, [x_BE, h_BH]
    rounds = sum(name.startswith(layer.pattern.format("rounds.")) for name in graph.weights)
    for index in range(rounds):
        gate = graph.sigmoid(layer.linear(scaled[(index + 1) % 2], f"rounds.{index}"))
        scaled[index % 2] = graph.product(graph.sum(gate, gate), scaled[index % 2])
    preacts_BG = (layer.linear(scaled[0], "weight_ih", "bias"), layer.linear(scaled[1], "weight_hh"))
    return _lstm_gates(layer, graph.sum(*preacts_BG), c_BH)


@dataclass(frozen=True)
class Cell:
    """A built-in cell: its function, the names of its state's tensors, and those of the weights of a layer."""

    step: Step
    state: tuple[str, ...]
    pattern: str = "rnn.layers.{layer}.{{}}"


_TORCH = "rnn.{{}}_l{layer}"  # the names of torch's modules
CELLS = {
    "rnn": Cell(_rnn, ("h",), _TORCH),
    "gru": Cell(_gru, ("h",), _TORCH),
    "lstm": Cell(_lstm, ("h", "c"), _TORCH),
    "mingru": Cell(_mingru, ("h",)),
    "minlstm": Cell(_minlstm, ("h",)),
    "mlstm": Cell(_mlstm, ("h", "c")),
    "mogrifier": Cell(_mogrifier, ("h", "c")),
}


# --- the model ---


def state_sizes(model_config: ModelConfig) -> dict[str, int]:
    """Returns the number of units H of each tensor of the state (B, H) by its name, in the order of the inputs.

    These are ``h_0``, ``h_1``, … of all layers and then, for variants of the LSTM, ``c_0``, ``c_1``, …
    """
    names = CELLS[model_config.cell].state
    return {f"{name}_{layer}": size for name in names for layer, size in enumerate(model_config.layer_sizes)}


def build_graph(
    onnx: Any, model_config: ModelConfig, weights: dict[str, Tensor], vocabulary_size: int, reset_token: int | None
) -> Any:
    """Returns the ONNX model of a step: ``tokens`` (B) and state to ``logits`` (B, V) and the new state.

    Args:
        onnx: the library
        model_config: of a model with a built-in cell
        weights: all tensors of the model's ``state_dict``, by name
        vocabulary_size: number of tokens V
        reset_token: before which the state of a lane is taken to be zero; None: none
    """
    graph, cell, sizes = Graph(onnx, weights), CELLS[model_config.cell], state_sizes(model_config)
    read_states = _reset_states(graph, sizes, reset_token)
    hidden_BH = _features(graph, model_config, vocabulary_size)
    for index, units in enumerate(model_config.layer_sizes):
        layer = LayerGraph(graph, cell.pattern.format(layer=index), units)
        names = [f"{name}_{index}" for name in cell.state]
        new_states = cell.step(layer, hidden_BH, *(read_states[name] for name in names))
        for name, new_state in zip(names, new_states, strict=True):
            graph.add("Identity", new_state, outputs=[f"new_{name}"])
        hidden_BH = new_states[0]
    graph.add("Identity", _logits(graph, model_config, hidden_BH, vocabulary_size), outputs=["logits"])
    return _model(graph, sizes, vocabulary_size)


def _features(graph: Graph, model_config: ModelConfig, vocabulary_size: int) -> str:
    """Adds the features (B, E) that the first layer reads."""
    if model_config.embedding_size:
        table_VE = graph.weight("linear.weight" if model_config.tied else "embedding.weight")
        return graph.add("Gather", table_VE, "tokens")
    depth = graph.constant("vocabulary_size", np.array(vocabulary_size))
    return graph.add("OneHot", "tokens", depth, graph.constant("off_on", np.array([0, 1], np.float32)))


def _logits(graph: Graph, model_config: ModelConfig, hidden_BH: str, vocabulary_size: int) -> str:
    """Adds the logits (B, V); those of an adaptive softmax are log-probabilities."""

    head_BK = graph.layer(hidden_BH, "linear")
    cutoffs = resolve_cutoffs(model_config, vocabulary_size)
    if not cutoffs:
        return head_BK
    log_BK = graph.add("LogSoftmax", head_BK, axis=1)
    frequent, *clusters = graph.split(log_BK, [cutoffs[0], *[1] * len(cutoffs)])
    for number, cluster_B1 in enumerate(clusters):
        features_BF = graph.linear(hidden_BH, graph.weight(f"tails.{number}.projection.weight"))
        log_BN = graph.add("LogSoftmax", graph.layer(features_BF, f"tails.{number}.linear"), axis=1)
        frequent = graph.add("Concat", frequent, graph.sum(log_BN, cluster_B1), axis=1)
    return frequent


def _reset_states(graph: Graph, sizes: dict[str, int], reset_token: int | None) -> dict[str, str]:
    """Adds the states that are read, zero before the reset token; returns them by the names of the inputs."""
    if reset_token is None:
        return {name: name for name in sizes}
    is_reset_B = graph.add("Equal", "tokens", graph.constant("reset_token", np.array(reset_token)))
    is_reset_B1 = graph.add("Unsqueeze", is_reset_B, graph.constant("axis", np.array([1])))
    zero = graph.constant("zero", np.zeros((), np.float32))
    return {name: graph.add("Where", is_reset_B1, zero, name) for name in sizes}


def _model(graph: Graph, sizes: dict[str, int], vocabulary_size: int) -> Any:
    helper, types = graph.onnx.helper, graph.onnx.TensorProto

    def value(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, types.FLOAT, [LANES, size])

    inputs = [helper.make_tensor_value_info("tokens", types.INT64, [LANES]), *(value(*item) for item in sizes.items())]
    outputs = [value("logits", vocabulary_size), *(value(f"new_{name}", size) for name, size in sizes.items())]
    step = helper.make_graph(graph.nodes, "step", inputs, outputs, [*graph.constants.values()])
    return helper.make_model(step, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
