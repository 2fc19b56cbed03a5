"""Several models as one: the mean of their probabilities.

Axes: T steps, B lanes, V tokens of the vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from job.data.tokens import Tokens
from job.errors import UserError
from job.inference.decoder import Decoder
from job.nn.language_model import LanguageModel
from job.nn.state import State
from job.training.checkpoint import LoadedCheckpoint
from job.training.loop import lane_windows


def check_same_vocabulary(checkpoints: Sequence[LoadedCheckpoint]) -> None:
    """Raises UserError unless all models have the vocabulary of the first one."""
    first, *others = checkpoints
    for other in others:
        if other.vocabulary != first.vocabulary:
            problem = f"{other.checkpoint.path}: has another vocabulary than {first.checkpoint.path}"
            raise UserError(problem, "give runs with one vocabulary.file, or evaluate them one by one")


def mean_log_probabilities(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Returns the logarithm of the mean of probabilities that are given as logarithms, one tensor for each model."""
    return torch.logsumexp(torch.stack(list(log_probabilities)), 0) - math.log(len(log_probabilities))


class Ensemble:
    """One or several models that generate text together.

    Args:
        models: put into evaluation mode; the output bias of a single one is replaced if a token is forbidden
        forbidden: the id of a token that has no probability; None: there is none
    """

    def __init__(self, models: Sequence[LanguageModel], forbidden: int | None = None) -> None:
        self.models, self.forbidden = list(models), forbidden
        if len(models) == 1 and forbidden is not None:  # so that the kernel of greedy decoding needs not know it
            bias = models[0].linear.bias  # copied, since the checkpoint's weights must not change
            bias.data = bias.data.index_fill(0, torch.tensor(forbidden, device=bias.device), -math.inf)
        self.decoders = list(map(Decoder, models))

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens V."""
        return self.models[0].vocabulary_size

    @torch.no_grad()
    def advance(self, tokens_TB: Tensor, states: Sequence[State]) -> list[State]:
        """Returns the states of all models after a window, given those before it."""
        return [model.advance(tokens_TB, state) for model, state in zip(self.models, states, strict=True)]

    @torch.no_grad()
    def step(self, tokens_B: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """Returns logits (B, V) and the states after a token of each lane, as ``Decoder.step`` of each model.

        Those of several models are the logarithms of the mean of their probabilities.

        Args:
            tokens_B: token ids, int64
            states: of each model before the token
        """
        pairs = [decoder.step(tokens_B, state) for decoder, state in zip(self.decoders, states, strict=True)]
        logits, new_states = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if len(logits) == 1:
            return logits[0], new_states
        mean_BV = mean_log_probabilities([logits_BV.double().log_softmax(1) for logits_BV in logits])
        if self.forbidden is not None:
            mean_BV[:, self.forbidden] = -math.inf
        return mean_BV, new_states

    def generate_greedy(self, first_B: Tensor, states: Sequence[State], length: int) -> Tensor | None:
        """Decodes greedily as ``Decoder.generate_greedy``; returns None for several models."""
        return self.decoders[0].generate_greedy(first_B, states[0], length) if len(self.decoders) == 1 else None


@torch.no_grad()
def evaluate_ensemble(models: Sequence[LanguageModel], tokens: Tokens, lanes: Sequence[range], num_steps: int) -> float:
    """Returns the loss of some lanes under the mean of the models' probabilities, as ``evaluate_group`` of one model.

    The arguments are those of ``evaluate_group``. Memory is needed for all models, and for the logits of one of them.
    """
    states: list[State] = [None] * len(models)
    device = models[0].linear.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for window_TB in (window_TB.to(device) for window_TB in lane_windows(tokens, lanes, num_steps)):
        targets_TB1, log_probabilities = window_TB[1:, :, None], []
        for number, model in enumerate(models):
            logits_TBV, states[number] = model(window_TB[:-1].clamp(min=0), states[number])
            log_softmax_TBV = logits_TBV.double().log_softmax(2)
            log_probabilities.append(log_softmax_TBV.gather(2, targets_TB1.clamp(min=0)))
        total -= mean_log_probabilities(log_probabilities)[targets_TB1 >= 0].sum()
    return float(total)
