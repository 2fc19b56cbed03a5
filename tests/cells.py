"""Custom cells that tests train, named ``cells:Class`` on the command line."""

import os

import torch
from torch import nn


class DecayCell(nn.Module):
    """A diagonal linear recurrence whose state is a tuple of two tensors."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        assert num_layers == 1
        self.input = nn.Linear(input_size, hidden_size)
        self.decay = nn.Parameter(torch.zeros(hidden_size))

    def forward(
        self, inputs: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
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


class LinearCell(nn.Module):
    """A linear layer, with the number of steps as its state."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.layer = nn.Linear(input_size, hidden_size)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        count = inputs.new_zeros(1, inputs.shape[1], 1) if state is None else state
        return self.layer(inputs), count + len(inputs)


class LaneFirstCell(LinearCell):
    """Returns a state with the lane on axis 0, which violates the protocol."""

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(inputs), torch.zeros(inputs.shape[1], 3)


class DivergingCell(LinearCell):
    """Outputs NaN from the 281st step of an epoch on."""

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, count = super().forward(inputs, state)
        return torch.where(count > 280, torch.nan, outputs), count


class RaisingCell(LinearCell):
    """Raises an error in the eighth window."""

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, count = super().forward(inputs, state)
        if count.max() > 280:
            raise ValueError("no more")
        return outputs, count


class ExitingCell(LinearCell):
    """Ends its process in the second window, without a Python exception."""

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if state is not None and len(inputs) > 3:  # the protocol check uses three steps
            os._exit(1)
        return super().forward(inputs, state)


class UnusedWeightsCell(LinearCell):
    """Has a parameter that no window uses, one that only the first window uses, and a frozen one."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__(input_size, hidden_size, num_layers)
        self.unused = nn.Parameter(torch.ones(3))
        self.first = nn.Parameter(torch.ones(1, 1, hidden_size))
        self.frozen = nn.Parameter(torch.ones(hidden_size), requires_grad=False)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        previous = self.first.expand(1, inputs.shape[1], -1) if state is None else state
        outputs = torch.tanh(self.layer(inputs) + previous) * self.frozen
        return outputs, outputs[-1:]


class BranchingCell(UnusedWeightsCell):
    """Uses the parameter ``unused`` only for lanes whose window contains token 0."""

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, state = super().forward(inputs, state)
        has_token_0 = inputs[..., :1].sum(0)
        return (outputs + self.unused.sum() * has_token_0, state) if has_token_0.any() else (outputs, state)


class ScalarParameterCell(LinearCell):
    """Has a zero-dimensional parameter and an integer buffer."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__(input_size, hidden_size, num_layers)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("index", torch.arange(3))

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, count = super().forward(inputs, state)
        return outputs * self.scale, count
