"""The learning rate, and the share of new weights in the average, as functions of the step."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from job.config.schema import OptimizerConfig


class StepSizes(NamedTuple):
    """What differs between two steps: numbers, or tensors on the device in a CUDA graph."""

    learning_rate: float | Tensor
    average_weight: float | Tensor  # of the new weights in the average


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run.

    Args:
        optimizer_config: its options
        num_steps: its length; the warm-up is a part of it
    """

    optimizer_config: OptimizerConfig
    num_steps: int

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step (from 0): a linear warm-up, then constant or cosine.

        The cosine reaches zero at the end of the schedule and stays there.
        """
        peak, warmup_steps = self.optimizer_config.learning_rate, self.optimizer_config.warmup_steps
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        if self.optimizer_config.schedule == "constant":
            return peak
        fraction = (step - warmup_steps) / max(1, self.num_steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))

    def average_weight(self, step: int) -> float:
        """Returns the weight, in the average, of the weights after a step (from 0).

        It is 1, so that both are equal, as long as the mean has not started. The decay of the moving average grows as
        in TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``, so that initial weights are soon forgotten.
        """
        if self.optimizer_config.averaging == "ema":
            return max(1 - self.optimizer_config.ema_decay, 9 / (10 + step)) if step else 1.0
        return 1 / (1 + max(0, step - self.average_start))

    @property
    def average_start(self) -> int:
        """The first step (from 0) whose weights the average contains."""
        start = self.optimizer_config.average_start
        is_mean = self.optimizer_config.averaging == "mean"
        return int(start * self.num_steps if start < 1 else start) if is_mean else 0
