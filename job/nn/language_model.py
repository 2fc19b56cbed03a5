"""The recurrent language model: tokens and state in, logits and state out.

The state is data that the caller owns. It is None (all zero), a tensor, or a tuple of tensors,
each with the lane on axis 1, as torch's own cells have it; nothing recurrent hides in a module.

Axes: T steps, B lanes, E input features, H hidden units, V tokens of the vocabulary, L layers.
"""

from collections.abc import Callable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from job.config.schema import BUILTIN_CELLS, ModelConfig
from job.errors import UserError
from job.kernels.ops import VECTOR_WIDTH, generate_greedy, supports_dtype
from job.nn.custom_cell import build_custom_cell, check_state_protocol
from job.nn.dropout import Dropout
from job.nn.loss import linear_cross_entropy
from job.nn.rnn import rnn_layer

State = Tensor | tuple[Tensor, ...] | None


def map_state(change: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with each of its tensors changed."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return change(state)
    return tuple(change(part) for part in state)


def detach_state(state: State) -> State:
    """The state without the history that gradients would flow through."""
    return map_state(Tensor.detach, state)


def slice_state(state: State, first: int, count: int) -> State:
    """The state of some lanes, by their place in this state; in one piece, as cuDNN wants it."""
    return map_state(lambda part: part.narrow(1, first, count).contiguous(), state)


def cat_states(states: list[State]) -> State:
    """States of successive lanes as one."""
    if states[0] is None or len(states) == 1:
        return states[0]
    if isinstance(states[0], Tensor):
        return torch.cat(cast(list[Tensor], states), 1)
    parts = zip(*cast(list[tuple[Tensor, ...]], states), strict=True)
    return tuple(torch.cat(part, 1) for part in parts)


class RecurrentLayers(nn.RNNBase):
    """Layers of torch's own cells, under torch's own names, with dropout that belongs to lanes."""

    MODES: ClassVar = {"rnn": "RNN_TANH", "gru": "GRU", "lstm": "LSTM"}
    WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def __init__(self, cell: str, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__(self.MODES[cell], input_size, hidden_size, num_layers)

    def forward(  # type: ignore[override]
        self, inputs: Tensor, state: State = None, dropout: Dropout | None = None, embedding_VE: Tensor | None = None
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
            outputs, last = rnn_layer(self.mode, outputs, None if number else embedding_VE, before, weights)
            lasts.append(last)
        after = tuple(torch.stack(part) for part in zip(*lasts, strict=True))
        return outputs, after if self.mode == "LSTM" else after[0]

    def generate_greedy(
        self, first_B: Tensor, state: State, embedding_VE: Tensor | None, head: nn.Linear, length: int
    ) -> Tensor | None:
        """As ``LanguageModel.speech``."""
        own, units = head.weight.dtype, self.hidden_size
        if head.weight.device.type != "cpu" or own != torch.float32 or units % VECTOR_WIDTH or not supports_dtype(own):
            return None
        layers = [self._weights(number) for number in range(self.num_layers)]
        parts = self._parts(state, len(first_B))
        return generate_greedy(self.mode, layers, embedding_VE, head.weight, head.bias, parts, first_B, length)

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

    def __init__(self, model_config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.embedding = (
            nn.Embedding(vocabulary_size, model_config.embedding_size) if model_config.embedding_size else None
        )
        features = model_config.embedding_size or vocabulary_size
        self.rnn: nn.Module
        if model_config.cell in BUILTIN_CELLS:
            self.rnn = RecurrentLayers(model_config.cell, features, model_config.hidden_size, model_config.num_layers)
        else:
            self.rnn = build_custom_cell(model_config, features)
        self.linear = nn.Linear(model_config.hidden_size, vocabulary_size)

    @property
    def has_custom_cell(self) -> bool:
        """Whether the cell is the user's own, which may leave weights unused and take any way through its code."""
        return not isinstance(self.rnn, RecurrentLayers)

    def forward(self, tokens_TB: Tensor, state: State, dropout: Dropout | None = None) -> tuple[Tensor, State]:
        """Logits (T, B, V) and the state after the last step; no dropout where it is None."""
        hidden_TBH, state = self._hidden(tokens_TB, state, dropout)
        return self.linear(hidden_TBH), state

    def cross_entropy_sum(
        self, tokens_TB: Tensor, targets_TB: Tensor, state: State, dropout: Dropout | None = None
    ) -> tuple[Tensor, State]:
        """The cross-entropy of the targets, summed, and the state after the last step."""
        hidden_TBH, state = self._hidden(tokens_TB, state, dropout)
        return linear_cross_entropy(hidden_TBH, self.linear.weight, self.linear.bias, targets_TB), state

    def generate_greedy(self, first_B: Tensor, state: State, length: int) -> Tensor | None:
        """The most likely tokens, each the next one's input: (length, B), in one call; None where there is no such."""
        if not isinstance(self.rnn, RecurrentLayers):
            return None
        embedding_VE = None if self.embedding is None else self.embedding.weight
        return self.rnn.generate_greedy(first_B, state, embedding_VE, self.linear, length)

    def _hidden(self, tokens_TB: Tensor, state: State, dropout: Dropout | None) -> tuple[Tensor, State]:
        if isinstance(self.rnn, RecurrentLayers):
            embedding_VE = None if self.embedding is None else self.embedding.weight
            hidden_TBH, state = self.rnn(tokens_TB, state, dropout, embedding_VE)
        elif self.embedding is not None:
            hidden_TBH, state = self.rnn(self.embedding(tokens_TB), state)
        else:
            inputs = F.one_hot(tokens_TB, self.vocabulary_size).to(self.linear.weight.dtype)
            hidden_TBH, state = self.rnn(inputs, state)
        return (hidden_TBH if dropout is None else dropout(hidden_TBH, 0)), state


def build_model(model_config: ModelConfig, vocabulary_size: int, seed: int) -> LanguageModel:
    """A model with torch's initial weights, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(model_config, vocabulary_size)
    if not isinstance(model.rnn, RecurrentLayers):
        check_state_protocol(model.rnn, model_config, model_config.embedding_size or vocabulary_size)
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
