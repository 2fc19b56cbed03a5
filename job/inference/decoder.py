"""A model that advances the state of many lanes by a token at a time, for generation and serving.

Axes: B lanes, V tokens of the vocabulary.
"""

import math
from typing import cast

import torch
from torch import Tensor

from job.errors import NonFiniteLogits
from job.kernels.ops import PackedModel, can_use_kernel
from job.nn.language_model import LanguageModel
from job.nn.rnn import RecurrentLayers
from job.nn.state import LayerState, State, cat_states, map_state

GREEDY_CHUNK = 200  # tokens per call of the kernel, between which Python handles signals


class Decoder:
    """Advances any number of lanes; their logits and states have the same bits as if each were alone.

    The compiled kernel serves rnn, gru and lstm in float32, with weights that are packed once.

    Args:
        model: put into evaluation mode; its weights must not change afterwards
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._packed = model.eval(), _pack(model)

    @torch.no_grad()
    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns logits (B, V) and the state after a token of each lane.

        Args:
            tokens_B: token ids, int64
            state: of the lanes before the token, which does not change; None: zeros

        Raises:
            IndexError: a token is not in the vocabulary
            NonFiniteLogits: the largest logit is NaN or infinite
        """
        logits_BV, new_state = self._step(tokens_B, state)
        return _check_finite(logits_BV), new_state

    def _step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        if self._packed is not None:
            new_state, layer_states = self._copy_state(state, len(tokens_B))
            logits_BV = self._packed.decode(tokens_B[None].contiguous(), layer_states)
            return self._rare_logits(layer_states[-1][0]) if self._model.tails else logits_BV, new_state
        # One lane at a time: the last bits of torch's operators depend on the number of lanes and on a lane's place.
        pairs = [self._step_alone(tokens_B, state, lane) for lane in range(len(tokens_B))]
        return torch.cat([logits_1V for logits_1V, _ in pairs]), cat_states([state for _, state in pairs])

    @torch.no_grad()
    def generate_greedy(self, first_B: Tensor, state: State, length: int) -> Tensor | None:
        """Decodes greedily in few calls of the kernel.

        Args:
            first_B: the last token of each lane before the generated ones, int64
            state: of the lanes before that token; None: zeros
            length: number of tokens to generate

        Returns:
            Tokens (length, B), or None if the kernel does not support this model or device.

        Raises:
            IndexError: a token is not in the vocabulary
            NonFiniteLogits: the largest logit is NaN or infinite
        """
        if self._packed is None or self._model.tails:
            return None
        _, layer_states = self._copy_state(state, len(first_B))
        tokens_TB = first_B.new_empty(length + 1, len(first_B))
        tokens_TB[0] = first_B
        for start in range(0, length, GREEDY_CHUNK):
            stop = min(start + GREEDY_CHUNK, length)
            tokens_TB[stop] = _check_finite(self._packed.decode(tokens_TB[start:stop], layer_states)).argmax(1)
        return tokens_TB[1:]

    def _copy_state(self, state: State, num_lanes: int) -> tuple[State, list[LayerState]]:
        """Returns a copy, and the tensors of each layer in it, which the kernel replaces."""
        rnn = cast(RecurrentLayers, self._model.rnn)
        tensors = tuple(
            tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for tensor in rnn.state_tensors(state, num_lanes)
        )
        return rnn.as_state(tensors), rnn.split_state(tensors)

    def _rare_logits(self, hidden_BH: Tensor) -> Tensor:
        """Returns the logits of an adaptive softmax, lane by lane."""
        log_probabilities = self._model.tails.log_probabilities
        return torch.cat([log_probabilities(self._model.linear, h_H.clone()[None, None])[0] for h_H in hidden_BH])

    def _step_alone(self, tokens_B: Tensor, state: State, lane: int) -> tuple[Tensor, State]:
        # A copy, since the address of a tensor, too, has an effect on its last bits.
        lane_state = map_state(lambda tensor: tensor[:, lane : lane + 1].clone(), state)
        logits_11V, lane_state = self._model(tokens_B[None, lane : lane + 1], lane_state)
        return logits_11V[0], lane_state


def _check_finite(logits_BV: Tensor) -> Tensor:
    largest = float(logits_BV.amax())  # NaN if one is; that of a token that is forbidden is -inf
    if not math.isfinite(largest):
        raise NonFiniteLogits(f"the model's largest logit is {largest}", "use another checkpoint")
    return logits_BV


def _pack(model: LanguageModel) -> PackedModel | None:
    """Returns the model's weights for the kernel, or None if it does not support the model or its device."""
    rnn = model.rnn
    if not isinstance(rnn, RecurrentLayers) or not can_use_kernel(model.linear.weight, model.linear.weight.dtype):
        return None
    output = None if model.tails else model.linear
    return PackedModel(
        rnn.mode, model.vocabulary_size, model.embedding_weight, rnn.all_weights, output, model.reset_token
    )
