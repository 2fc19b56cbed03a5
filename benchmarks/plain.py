"""The d2l book's training loop, written plainly: one-hot input and torch's own modules."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from job.data.stream import Stream
from job.nn.state import State


class PlainModel(nn.Module):
    """One-hot vectors, a recurrent module and an output layer, as in the d2l book, section 9.6."""

    def __init__(self, cell: str, vocabulary_size: int, hidden_size: int) -> None:
        super().__init__()
        rnn_class = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell]
        self.rnn = rnn_class(vocabulary_size, hidden_size)
        self.linear = nn.Linear(hidden_size, vocabulary_size)
        self.vocabulary_size = vocabulary_size

    def forward(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        inputs = F.one_hot(tokens, self.vocabulary_size).to(self.linear.weight.dtype)
        hidden, state = self.rnn(inputs, state)
        return self.linear(hidden.reshape(-1, hidden.shape[-1])), state


def steps(model: PlainModel, stream: Stream, learning_rate: float) -> Iterator[float]:
    """Trains epoch after epoch and yields the loss of each step as a float."""
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    epoch = 0
    while True:
        state = None
        for index in range(stream.partition(epoch).num_windows):
            inputs, targets = stream.read_window(epoch, index, range(stream.config.batch_size))
            if state is not None:
                state = state.detach() if isinstance(state, torch.Tensor) else tuple(part.detach() for part in state)
            logits, state = model(inputs, state)
            loss = F.cross_entropy(logits, targets.reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()
        epoch += 1
