"""One update of the weights: the global gradient, its clip, and the optimizer's step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from job import optimizer
from job.gradients import Ordered, Summed, Window
from job.model import State

# Takes a window, the state before it and the learning rate; gives what ``Tally.of`` reads, and the state after.
Update = Callable[[Window, State, float], tuple[Tensor, State]]


@dataclass(frozen=True)
class Direct:
    """An update as Python leads through it, one operation after the other.

    The optimizer has one group of weights, which are clipped together.
    """

    gradients: Summed | Ordered
    optimizer: torch.optim.Optimizer
    grad_clip_norm: float
    device: torch.device

    def __call__(self, window: Window, state: State, rate: float | Tensor) -> tuple[Tensor, State]:
        """As ``Update``; the rate may be a tensor on the device.

        It has the weights' precision, as a tensor for them would: a captured update is to be this one.
        """
        found, state = self.gradients(window.on(self.device), state)
        if isinstance(rate, float) and found.dtype == torch.float32:
            rate = float(np.float32(rate))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            if self.grad_clip_norm:
                optimizer.clip(group["params"], self.grad_clip_norm)
        self.optimizer.step()
        return found, state
