"""The recurrent language model: tokens and state in, logits and state out.

The state is data that the caller owns. It is None (all zero), a tensor, or a tuple of tensors,
each with the lane on axis 1, as torch's own cells have it; nothing recurrent hides in a module.

Axes: T steps, B lanes, E input features, H hidden units, V tokens of the vocabulary, L layers.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from job import config, kernel, loss, recurrence
from job.dropout import Dropout
from job.errors import UserError

State = Tensor | tuple[Tensor, ...] | None


def map_state(change: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with each of its tensors changed."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return change(state)
    return tuple(change(part) for part in state)


def detached(state: State) -> State:
    """The state without the history that gradients would flow through."""
    return map_state(Tensor.detach, state)


def lanes_of_state(state: State, first: int, count: int) -> State:
    """The state of some lanes, by their place in this state; in one piece, as cuDNN wants it."""
    return map_state(lambda part: part.narrow(1, first, count).contiguous(), state)


def joined_states(states: list[State]) -> State:
    """States of successive lanes as one."""
    if states[0] is None or len(states) == 1:
        return states[0]
    if isinstance(states[0], Tensor):
        return torch.cat(cast(list[Tensor], states), 1)
    parts = zip(*cast(list[tuple[Tensor, ...]], states), strict=True)
    return tuple(torch.cat(part, 1) for part in parts)


class Recurrent(nn.RNNBase):
    """Layers of torch's own cells, under torch's own names, with dropout that belongs to lanes."""

    MODES: ClassVar = {"rnn": "RNN_TANH", "gru": "GRU", "lstm": "LSTM"}
    WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def __init__(self, cell: str, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__(self.MODES[cell], input_size, hidden_size, num_layers)

    def forward(  # type: ignore[override]
        self, inputs: Tensor, state: State = None, dropout: Dropout | None = None, vectors_VE: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states (T, B, H) and the last state, tensors (L, B, H).

        ``inputs`` are features (T, B, E), or tokens (T, B) whose features ``vectors_VE`` has; they are
        one-hot where it is None.
        """
        parts, outputs, lasts = self._parts(state, inputs.shape[1]), inputs, []
        for number in range(self.num_layers):
            if number and dropout is not None:
                outputs = dropout(outputs, number)
            weights = self._weights(number)
            before = tuple(part[number] for part in parts)
            outputs, last = recurrence.layer(self.mode, outputs, None if number else vectors_VE, before, weights)
            lasts.append(last)
        after = tuple(torch.stack(part) for part in zip(*lasts, strict=True))
        return outputs, after if self.mode == "LSTM" else after[0]

    def speech(
        self, first_B: Tensor, state: State, vectors_VE: Tensor | None, head: nn.Linear, length: int
    ) -> Tensor | None:
        """As ``LanguageModel.speech``."""
        own, units = head.weight.dtype, self.hidden_size
        if head.weight.device.type != "cpu" or own != torch.float32 or units % kernel.WIDTH or not kernel.works_in(own):
            return None
        layers = [self._weights(number) for number in range(self.num_layers)]
        parts = self._parts(state, len(first_B))
        return kernel.speech(self.mode, layers, vectors_VE, head.weight, head.bias, parts, first_B, length)

    def _weights(self, layer: int) -> list[Tensor]:
        return [getattr(self, f"{name}_l{layer}") for name in self.WEIGHTS]

    def _parts(self, state: State, lanes: int) -> tuple[Tensor, ...]:
        """The state's tensors, of zeros where there is none yet."""
        if state is None:
            zeros = cast(Tensor, self.weight_hh_l0).new_zeros(self.num_layers, lanes, self.hidden_size)
            return (zeros, zeros) if self.mode == "LSTM" else (zeros,)
        return (state,) if isinstance(state, Tensor) else state


class LanguageModel(nn.Module):
    """Input, recurrent layers ``rnn``, and the output layer ``linear``."""

    def __init__(self, options: config.Model, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size, options.embedding_size) if options.embedding_size else None
        features = options.embedding_size or vocabulary_size
        self.rnn: nn.Module
        if options.cell in config.CELLS:
            self.rnn = Recurrent(options.cell, features, options.hidden_size, options.num_layers)
        else:
            self.rnn = _users_cell(options, features)
        self.linear = nn.Linear(options.hidden_size, vocabulary_size)

    @property
    def has_users_cell(self) -> bool:
        """Whether the cell is the user's own, which may leave weights unused and take any way through its code."""
        return not isinstance(self.rnn, Recurrent)

    def forward(self, tokens_TB: Tensor, state: State, dropout: Dropout | None = None) -> tuple[Tensor, State]:
        """Logits (T, B, V) and the state after the last step; no dropout where it is None."""
        hidden_TBH, state = self._hidden(tokens_TB, state, dropout)
        return self.linear(hidden_TBH), state

    def nats(
        self, tokens_TB: Tensor, targets_TB: Tensor, state: State, dropout: Dropout | None = None
    ) -> tuple[Tensor, State]:
        """The cross-entropy of the targets, summed, and the state after the last step."""
        hidden_TBH, state = self._hidden(tokens_TB, state, dropout)
        return loss.nats(hidden_TBH, self.linear.weight, self.linear.bias, targets_TB), state

    def speech(self, first_B: Tensor, state: State, length: int) -> Tensor | None:
        """The most likely tokens, each the next one's input: (length, B), in one call; None where there is no such."""
        if not isinstance(self.rnn, Recurrent):
            return None
        vectors_VE = None if self.embedding is None else self.embedding.weight
        return self.rnn.speech(first_B, state, vectors_VE, self.linear, length)

    def _hidden(self, tokens_TB: Tensor, state: State, dropout: Dropout | None) -> tuple[Tensor, State]:
        if isinstance(self.rnn, Recurrent):
            vectors_VE = None if self.embedding is None else self.embedding.weight
            hidden_TBH, state = self.rnn(tokens_TB, state, dropout, vectors_VE)
        elif self.embedding is not None:
            hidden_TBH, state = self.rnn(self.embedding(tokens_TB), state)
        else:
            inputs = F.one_hot(tokens_TB, self.vocabulary_size).to(self.linear.weight.dtype)
            hidden_TBH, state = self.rnn(inputs, state)
        return (hidden_TBH if dropout is None else dropout(hidden_TBH, 0)), state


def build(options: config.Model, vocabulary_size: int, seed: int) -> LanguageModel:
    """A model with torch's initial weights, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(options, vocabulary_size)
    if not isinstance(model.rnn, Recurrent):
        _check_protocol(model.rnn, options, options.embedding_size or vocabulary_size)
    return model


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Puts weights into the model in its own precision; UserError unless names and shapes agree."""
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or foreign:
        found = f"lacks {missing[0]}" if missing else f"holds {foreign[0]}, which the model has not"
        raise UserError(f"{where}: weights of another model: {found}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)} and should be {tuple(tensor.shape)}"
            raise UserError(f"{where}: weights of another model: {name} is {shapes}")
    model.load_state_dict({name: weights[name].to(own[name].dtype) for name in own})


def _users_cell(options: config.Model, features: int) -> nn.Module:
    """A recurrent module of the user's own: ``Class(input_size, hidden_size, num_layers)``."""
    module_name, _, class_name = options.cell.partition(":")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # whatever the user's code does
        raise UserError(f"model.cell = {options.cell}: cannot be imported: {_in_short(error)}") from None
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise UserError(f"model.cell = {options.cell}: not a torch.nn.Module")
    try:
        return kind(features, options.hidden_size, options.num_layers)
    except Exception as error:
        raise UserError(
            f"model.cell = {options.cell}: is made as Class(input_size, hidden_size, num_layers), with "
            f"{features}, {options.hidden_size}, {options.num_layers}: {_in_short(error)}"
        ) from None


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _check_protocol(cell: nn.Module, options: config.Model, features: int) -> None:
    """UserError unless the cell takes and gives state as the loop needs it, tried on two lanes."""

    def refuse(what: str) -> UserError:
        return UserError(f"model.cell = {options.cell}: {what} (see README, A cell of your own)")

    inputs_TBE = torch.zeros(3, 2, features)
    was_training = cell.training
    cell.eval()
    try:
        with torch.no_grad():
            first = cell(inputs_TBE, None)
            hidden, state = first
            cell(inputs_TBE, state)
    except Exception as error:
        raise refuse(f"cell(inputs, state) must give outputs and state: {error}") from None
    cell.train(was_training)
    if not isinstance(hidden, Tensor) or hidden.shape != (3, 2, options.hidden_size):
        raise refuse(f"outputs must be a tensor (steps, lanes, {options.hidden_size})")
    parts = state if isinstance(state, tuple) else (state,)
    if not all(isinstance(part, Tensor) and part.dim() >= 2 and part.shape[1] == 2 for part in parts):
        raise refuse("the state must be a tensor or a tuple of tensors with the lane on axis 1")
