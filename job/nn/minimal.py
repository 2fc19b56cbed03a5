"""minGRU and minLSTM: gates that read the input only, so that all steps of a window are computed by a scan.

Source: Feng et al., "Were RNNs all we needed?", 2024, section 3. A step of minGRU is

    z = sigmoid(W_z x),  h' = W_h x,  h = (1 - z) * h + z * h'

and one of minLSTM

    f = sigmoid(W_f x),  i = sigmoid(W_i x),  h' = W_h x,  h = (f * h + i * h') / (f + i)

with a bias with each weight. The paper's program makes candidates positive, which its scan of logarithms needs and this
one does not: the derivative of its function jumps, so gradients in bf16 were ten times less exact.

Axes: T steps, B lanes, E input features, H hidden units.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from job.nn.scan import linear_scan
from job.nn.state import LayerState


class MinimalLayer(nn.Module):
    """A layer whose hidden state is a mean, weighted by its gate, of candidates and of the state before.

    Args:
        input_size: number of input features E
        hidden_size: number of hidden units H
    """

    num_linear: ClassVar[int]  # of weights (H, E), that of the candidates last
    num_states: ClassVar = 1
    weight_hh = None  # there are no weights between hidden states

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size, self.num_linear * hidden_size)

    def forward(
        self, inputs_TBE: Tensor, state: LayerState, hidden_weight: Tensor | None, starts_TB: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """Runs the layer over a window, as ``CellLayers`` calls it."""
        projections = self.linear(inputs_TBE).to(self.linear.weight.dtype).chunk(self.num_linear, 2)
        gate_TBH, candidate_TBH = self._gate(*projections[:-1]), projections[-1]
        decay_TBH = torch.sigmoid(-gate_TBH)
        if starts_TB is not None:
            decay_TBH = decay_TBH.masked_fill(starts_TB[..., None], 0)
        hidden_TBH = linear_scan(decay_TBH, torch.sigmoid(gate_TBH) * candidate_TBH, state[0][0])
        return hidden_TBH, (hidden_TBH[-1:],)

    def _gate(self, *projections_TBH: Tensor) -> Tensor:
        """Returns the logit of the candidates' weight in the mean."""
        raise NotImplementedError


class MinGRULayer(MinimalLayer):
    """A layer of minGRU: weights W_z and W_h."""

    num_linear = 2

    def _gate(self, *projections_TBH: Tensor) -> Tensor:
        return projections_TBH[0]


class MinLSTMLayer(MinimalLayer):
    """A layer of minLSTM: weights W_f, W_i and W_h."""

    num_linear = 3

    def _gate(self, *projections_TBH: Tensor) -> Tensor:
        forget_TBH, input_TBH = projections_TBH
        # i / (f + i) = sigmoid(log i - log f), without the quotient of two values that may both be rounded to zero
        return F.logsigmoid(input_TBH) - F.logsigmoid(forget_TBH)
