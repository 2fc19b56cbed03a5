"""A stack of layers of the cells that are not torch's: from torch operators, on any device.

Axes: T steps, B lanes, E input features, H hidden units.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from job.nn.lstm_variants import MogrifierLSTMLayer, MultiplicativeLSTMLayer, StepLayer
from job.nn.minimal import MinGRULayer, MinimalLayer, MinLSTMLayer
from job.nn.regularization import Regularization
from job.nn.state import State, state_tensors

LAYERS: dict[str, type[MinimalLayer | StepLayer]] = {
    "mingru": MinGRULayer,
    "minlstm": MinLSTMLayer,
    "mlstm": MultiplicativeLSTMLayer,
    "mogrifier": MogrifierLSTMLayer,
}


class CellLayers(nn.Module):
    """Layers that are called one after the other, with dropout by lane between them.

    A layer is created as ``Class(input_size, hidden_size)``, has the number of its state's tensors ``num_states`` and
    the weight between its hidden states ``weight_hh``, or None, and is called as ``outputs, state = layer(inputs_TBE,
    state, weight_hh, starts_TB)`` with a state of tensors (1, B, H).

    The state of all layers is a tuple of these, first the first tensor of each layer.

    Args:
        cell: a key of ``LAYERS``
        input_size: number of input features E
        layer_sizes: number of hidden units H of each layer
    """

    def __init__(self, cell: str, input_size: int, layer_sizes: Sequence[int]) -> None:
        super().__init__()
        self.layer_sizes = tuple(layer_sizes)
        input_sizes = (input_size, *self.layer_sizes[:-1])
        self.layers = nn.ModuleList(map(LAYERS[cell], input_sizes, self.layer_sizes))
        self.num_states = LAYERS[cell].num_states

    def forward(
        self, features_TBE: Tensor, state: State, regularization: Regularization | None, starts_TB: Tensor | None
    ) -> tuple[Tensor, State]:
        """Runs all layers over a window; the arguments are those of ``RecurrentLayers``, whose state may be None.

        Raises UserError if the state has other sizes.
        """
        shapes = [(1, features_TBE.shape[1], size) for size in self.layer_sizes] * self.num_states
        tensors, num_layers = state_tensors(state, shapes, next(self.parameters())), len(self.layers)
        outputs, states = features_TBE, []
        for index, layer in enumerate(self.layers):
            hidden_weight = cast(Tensor | None, layer.weight_hh)
            if regularization is not None:
                outputs = regularization.drop_between_layers(outputs, index) if index else outputs
                if hidden_weight is not None:
                    hidden_weight = regularization.drop_weight(hidden_weight, index)
            outputs, layer_state = layer(outputs, tensors[index::num_layers], hidden_weight, starts_TB)
            states.append(layer_state)
        return outputs, tuple(tensor for part in zip(*states, strict=True) for tensor in part)
