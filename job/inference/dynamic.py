"""Dynamic evaluation: the weights follow the text, by a step of SGD after each segment.

Source: Krause et al. 2018, "Dynamic Evaluation of Neural Sequence Models", the variant with SGD and weight decay
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from job.config.inference import EvaluateConfig
from job.data.tokens import Tokens
from job.inference.ensemble import mean_log_probabilities
from job.nn.language_model import LanguageModel
from job.nn.state import State, detach_state
from job.training.loop import lane_windows


class DynamicModel:
    """A copy of a model that learns from the text that it predicts.

    Args:
        model: in evaluation mode; does not change
        evaluate_config: learning rate and decay
    """

    def __init__(self, model: LanguageModel, evaluate_config: EvaluateConfig) -> None:
        self.model, self.config = copy.deepcopy(model).requires_grad_(True), evaluate_config
        self.weights = list(self.model.parameters())
        self.trained_weights = [weight.detach().clone() for weight in self.weights]
        self.state: State = None

    def predict_and_learn(self, window_T: Tensor) -> Tensor:
        """Returns the log-probabilities (T - 1,), float64, of all tokens of a segment but the first, then updates.

        The update is that of the mean loss of the segment, into which the gradient of earlier segments does not reach.
        """
        logits_TBV, state = self.model(window_T[:-1, None], self.state)
        nats_T = F.cross_entropy(logits_TBV[:, 0].double(), window_T[1:], reduction="none")
        gradients = torch.autograd.grad(nats_T.mean(), self.weights, allow_unused=True)
        with torch.no_grad():
            for weight, gradient, trained in zip(self.weights, gradients, self.trained_weights, strict=True):
                if self.config.dynamic_decay:
                    weight.lerp_(trained, self.config.dynamic_decay)
                if gradient is not None:
                    weight.sub_(gradient, alpha=self.config.dynamic)
        self.state = detach_state(state)
        return -nats_T.detach()


def evaluate_dynamic(models: Sequence[LanguageModel], tokens: Tokens, evaluate_config: EvaluateConfig) -> float:
    """Returns the loss of all tokens but the first in nats, summed; each is predicted before any weight has seen it.

    Args:
        models: in evaluation mode; several are an ensemble, each of which follows the text by itself
        tokens: token ids (N,), N at least 2
        evaluate_config: learning rate, decay and length of a segment
    """
    copies = [DynamicModel(model, evaluate_config) for model in models]
    device = models[0].linear.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for window_TB in lane_windows(tokens, [range(len(tokens) - 1)], evaluate_config.dynamic_steps):
        window_T = window_TB[:, 0].to(device)
        total -= mean_log_probabilities([model.predict_and_learn(window_T) for model in copies]).sum()
    return float(total)
