"""The learning rate, and the share of new weights in the average, as functions of the step and of decisions."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from job.config.training import OptimizerConfig
from job.training.decisions import Decisions


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
        batch_size: lanes of the run
    """

    optimizer_config: OptimizerConfig
    num_steps: int
    batch_size: int

    def learning_rate(self, step: int, reductions: int = 0) -> float:
        """Returns the learning rate of a step (from 0): a linear warm-up, then the schedule.

        The cosine reaches zero at the end of the schedule and stays there.

        Args:
            step: number of the step
            reductions: by the schedule plateau so far
        """
        config, after_warmup = self.optimizer_config, step - self.optimizer_config.warmup_steps
        if after_warmup < 0:
            return self.peak * (step + 1) / config.warmup_steps
        match config.schedule:
            case "cosine":
                fraction = after_warmup / max(1, self.num_steps - config.warmup_steps)
                return self.peak * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
            case "step":
                return self.peak * config.decay_factor ** (after_warmup // config.decay_every)
            case "plateau":
                return self.peak * config.decay_factor**reductions
        return self.peak

    @property
    def peak(self) -> float:
        """The learning rate after the warm-up.

        By LEGW (You et al., 2019, https://arxiv.org/abs/1901.08256) it grows with the square root of the batch, and the
        epochs of the warm-up with the batch: so its steps stay the same.
        """
        base = self.optimizer_config.base_batch_size
        return self.optimizer_config.learning_rate * (math.sqrt(self.batch_size / base) if base else 1)

    def is_averaged(self, step: int, decisions: Decisions) -> bool:
        """Whether the average contains the weights after a step (from 0)."""
        config = self.optimizer_config
        match config.averaging:
            case "mean":
                start = config.average_start
                return step >= int(start * self.num_steps if start < 1 else start)
            case "nt-asgd":
                return decisions.average_start is not None
        return config.averaging == "ema"

    def average_weight(self, averaged_steps: int) -> float:
        """Returns the weight that new weights get in an average of so far ``averaged_steps`` steps.

        It is 1, so that both are equal, as long as there are none. The decay of the moving average grows as in
        TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``, so that initial weights are soon forgotten.
        """
        if averaged_steps and self.optimizer_config.averaging == "ema":
            return max(1 - self.optimizer_config.ema_decay, 9 / (10 + averaged_steps))
        return 1 / (1 + averaged_steps)
