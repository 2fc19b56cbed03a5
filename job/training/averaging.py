"""The average of the weights over the steps of a run."""

import torch
from torch import Tensor

from job.nn.language_model import LanguageModel


class WeightAverage:
    """A second model, whose weights are an average of those of the first one.

    Each step moves it towards the new weights, by a share that ``Schedule.average_weight`` returns: 1/n gives the mean
    of n steps, a constant the exponential moving average. Unlike in ``torch.optim.swa_utils.AveragedModel``, no number
    is read from the device, so that a CUDA graph can contain it.

    Args:
        model: the model that is trained
        averaged: a model of the same shape; its weights are the average so far
    """

    def __init__(self, model: LanguageModel, averaged: LanguageModel) -> None:
        self.model, self.averaged = model, averaged.requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, average_weight: float | Tensor) -> None:
        """Adds the model's weights to the average; buffers are copied."""
        for average, weight in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, average_weight)
        for copied, buffer in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            copied.copy_(buffer)
