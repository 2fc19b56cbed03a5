"""A user's own cells, through the command line; the first is the README's example."""

import os

import torch
from conftest import job, result
from torch import nn


class Bomb(nn.Module):
    """Counts the steps of each lane in its state, and from the 281st on gives no number."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.layer = nn.Linear(input_size, hidden_size)

    def forward(self, inputs, state):
        count = inputs.new_zeros(1, inputs.shape[1], 1) if state is None else state
        count = count + len(inputs)
        return torch.where(count > 280, torch.nan, self.layer(inputs)), count


def test_torchs_own_module_is_a_cell_and_trains_as_ours(prose, tmp_path):
    flags = ["train", "--corpus.source", prose, "--scale.workers", 0, "--train.epochs", 2, "--generate.prefix", "the"]
    flags += ["--train.precision", "fp64", "--run.storage", tmp_path, "--model.hidden_size", 24]
    ours = job(*flags, "--run.name", "ours", "--model.cell", "gru")
    theirs = job(*flags, "--run.name", "theirs", "--model.cell", "torch.nn:GRU")
    assert (ours.status, theirs.status) == (0, 0), ours.err + theirs.err
    assert result(tmp_path / "ours")["weights_sha256"] == result(tmp_path / "theirs")["weights_sha256"]
    assert torch.get_default_dtype() == torch.float32


class Dies(nn.Module):
    """Takes its process with it in the second window: no Python error is left to tell of it."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.layer = nn.Linear(input_size, hidden_size)

    def forward(self, inputs, state):
        if state is not None and len(inputs) > 3:  # not where the protocol is tried
            os._exit(1)
        return self.layer(inputs), inputs.new_zeros(1, inputs.shape[1], 1)


class Breaks(Bomb):
    """Raises an error of its own in the eighth window."""

    def forward(self, inputs, state):
        outputs, count = super().forward(inputs, state)
        if count.max() > 280:
            raise ValueError("no more")
        return outputs, count


class Odd(Bomb):
    """Has a parameter without a dimension, and a buffer of whole numbers."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__(input_size, hidden_size, num_layers)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("index", torch.arange(3))

    def forward(self, inputs, state):
        return self.layer(inputs) * self.scale, inputs.new_zeros(1, inputs.shape[1], 1)
