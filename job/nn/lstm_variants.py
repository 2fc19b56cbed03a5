"""Variants of the LSTM that are computed step by step.

Axes: T steps, B lanes, E input features, H hidden units, G gates times hidden units.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from job.kernels.ops import compute_dtype
from job.nn.state import LayerState, run_documents


def lstm_step(preacts_BG: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
    """Returns h and c after a step of an LSTM (Hochreiter and Schmidhuber, "Long short-term memory", 1997).

    Args:
        preacts_BG: what its gates are functions of, in torch's order: input, forget, new, output
        c_BH: before the step
    """
    input_BH, forget_BH, new_BH, output_BH = preacts_BG.to(c_BH.dtype).chunk(4, 1)
    c_BH = torch.sigmoid(forget_BH) * c_BH + torch.sigmoid(input_BH) * torch.tanh(new_BH)
    return torch.sigmoid(output_BH) * torch.tanh(c_BH), c_BH


class StepLayer(nn.Module):
    """A layer with the state (h, c) that is run step by step, and by parts of the window in which documents start."""

    num_states: ClassVar = 2

    def forward(
        self, inputs_TBE: Tensor, state: LayerState, hidden_weight: Tensor, starts_TB: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """Runs the layer over a window, as ``CellLayers`` calls it."""
        return run_documents(partial(self._run, hidden_weight), inputs_TBE, state, starts_TB)

    def _run(self, hidden_weight: Tensor, inputs_TBE: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        raise NotImplementedError

    def _initialize(self, hidden_size: int) -> None:
        """Initializes all weights as torch does those of its LSTM."""
        for weight in self.parameters():
            nn.init.uniform_(weight, -(hidden_size**-0.5), hidden_size**-0.5)


class MultiplicativeLSTMLayer(StepLayer):
    """An LSTM whose hidden state is multiplied by a function of the input before its gates read it.

    A step is ``m = (W_mx x) * (W_mh h)`` and then that of an LSTM that reads m in the place of h. The rows of
    ``weight_ih`` and ``weight_hh`` are those of m and then those of the gates.

    Source: Krause et al., "Multiplicative LSTM for sequence modelling", 2016.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(5 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(5 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))
        self._initialize(hidden_size)

    def _run(self, hidden_weight: Tensor, inputs_TBE: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        (h_BH, c_BH), dtype, units = (tensor[0] for tensor in state), compute_dtype(hidden_weight), state[0].shape[2]
        weight_HH, weight_GH = hidden_weight.to(dtype).split([units, 4 * units])
        inputs_TBX = F.linear(inputs_TBE, self.weight_ih, F.pad(self.bias, (units, 0))).to(dtype)
        factor_TBH, preacts_TBG = inputs_TBX.split([units, 4 * units], 2)
        hidden = []
        for factor_BH, preacts_BG in zip(factor_TBH.unbind(), preacts_TBG.unbind(), strict=True):
            m_BH = factor_BH * F.linear(h_BH.to(dtype), weight_HH)
            h_BH, c_BH = lstm_step(preacts_BG + F.linear(m_BH, weight_GH), c_BH)
            hidden.append(h_BH)
        return torch.stack(hidden), (h_BH[None], c_BH[None])


class MogrifierLSTMLayer(StepLayer):
    """An LSTM whose input and hidden state scale each other, in rounds, before its gates read them.

    Round i, from 1, is ``x = 2 sigmoid(Q_i h) * x`` if i is odd, else ``h = 2 sigmoid(R_i x) * h``.

    Source: Melis, Kočiský and Blunsom, "Mogrifier LSTM", 2020, with full matrices; there 5 rounds are best on words.
    """

    NUM_ROUNDS: ClassVar = 5

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))
        sizes = [(input_size, hidden_size), (hidden_size, input_size)]  # of Q and R
        self.rounds = nn.ParameterList(torch.empty(sizes[index % 2]) for index in range(self.NUM_ROUNDS))
        self._initialize(hidden_size)

    def _run(self, hidden_weight: Tensor, inputs_TBE: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        (h_BH, c_BH), dtype = (tensor[0] for tensor in state), compute_dtype(hidden_weight)
        rounds = [weight.to(dtype) for weight in self.rounds]
        # For a single step, as in generation, copying the weights would take longer than the step.
        is_single = len(inputs_TBE) == 1 and not torch.is_grad_enabled()
        weight_GX = None if is_single else torch.cat([self.weight_ih, hidden_weight], 1).to(dtype)
        bias_G, hidden = self.bias.to(dtype), []
        for x_BE in inputs_TBE.to(dtype).unbind():
            scaled = [x_BE, h_BH.to(dtype)]
            for index, weight in enumerate(rounds):
                read, changed = scaled[(index + 1) % 2], scaled[index % 2]
                scaled[index % 2] = 2 * torch.sigmoid(F.linear(read, weight)) * changed
            if weight_GX is None:
                weights = self.weight_ih.to(dtype), hidden_weight.to(dtype)
                preacts_BG = F.linear(scaled[0], weights[0], bias_G) + F.linear(scaled[1], weights[1])
            else:
                preacts_BG = F.linear(torch.cat(scaled, 1), weight_GX, bias_G)
            h_BH, c_BH = lstm_step(preacts_BG, c_BH)
            hidden.append(h_BH)
        return torch.stack(hidden), (h_BH[None], c_BH[None])
