"""One update of the weights: the global gradient, its clip, and the optimizer's step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from job.distributed.gradient_sync import AllReduceGradients, Batch, DeterministicGradients
from job.nn.state import State
from job.training.optimizer import clip_gradient

# Takes a window, the state before it and the learning rate; gives what ``Tally.of`` reads, and the state after.
TrainStep = Callable[[Batch, State, float], tuple[Tensor, State]]


@dataclass(frozen=True)
class EagerTrainStep:
    """An update as Python leads through it, one operation after the other.

    The optimizer has one group of weights, which are clipped together.
    """

    gradients: AllReduceGradients | DeterministicGradients
    optimizer: torch.optim.Optimizer
    grad_clip_norm: float
    device: torch.device

    def __call__(self, window: Batch, state: State, rate: float | Tensor) -> tuple[Tensor, State]:
        """As ``Update``; the rate may be a tensor on the device.

        It has the weights' precision, as a tensor for them would: a captured update is to be this one.
        """
        found, state = self.gradients(window.on(self.device), state)
        if isinstance(rate, float) and found.dtype == torch.float32:
            rate = float(np.float32(rate))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            if self.grad_clip_norm:
                clip_gradient(group["params"], self.grad_clip_norm)
        self.optimizer.step()
        return found, state
