"""Several models as one: the mean of their probabilities.

Axes: T steps, B lanes, V tokens of the vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from job.data.tokens import Tokens
from job.errors import UserError
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


@torch.no_grad()
def evaluate_ensemble(models: Sequence[LanguageModel], tokens: Tokens, lanes: Sequence[range], num_steps: int) -> float:
    """Returns the loss of some lanes under the mean of the models' probabilities, as ``evaluate_group`` of one model.

    The arguments are those of ``evaluate_group``. Memory is needed for all models, and for the logits of one of them.
    """
    states: list[State] = [None] * len(models)
    total = torch.zeros((), dtype=torch.float64)
    for window_TB in lane_windows(tokens, lanes, num_steps):
        targets_TB1, log_probabilities = window_TB[1:, :, None], []
        for number, model in enumerate(models):
            logits_TBV, states[number] = model(window_TB[:-1].clamp(min=0), states[number])
            log_softmax_TBV = logits_TBV.double().log_softmax(2)
            log_probabilities.append(log_softmax_TBV.gather(2, targets_TB1.clamp(min=0)))
        total -= mean_log_probabilities(log_probabilities)[targets_TB1 >= 0].sum()
    return float(total)
