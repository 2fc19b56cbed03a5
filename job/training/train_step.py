"""One optimizer step: the global gradient, its clipping, and the update of the weights."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from job.distributed.gradient_sync import AllReduceGradients, Batch, DeterministicGradients
from job.nn.state import State
from job.training.averaging import WeightAverage
from job.training.optimizer import clip_and_update
from job.training.schedule import StepSizes

# From a batch, the lanes' state before it and what the schedule gives, to the statistics that StepStats.from_tensor
# reads and the state after it.
TrainStep = Callable[[Batch, State, StepSizes], tuple[Tensor, State]]


@dataclass(frozen=True)
class EagerTrainStep:
    """A step that launches one operation after the other. All parameters of the optimizer are clipped together."""

    gradients: AllReduceGradients | DeterministicGradients
    optimizer: torch.optim.Optimizer
    grad_clip_norm: float  # 0: no clipping
    device: torch.device
    average: WeightAverage | None = None

    def __call__(self, batch: Batch, state: State, sizes: StepSizes) -> tuple[Tensor, State]:
        """Takes the step; step sizes on the device must be tensors of the weights' dtype.

        A float is rounded to the weights' dtype, so that eager and CUDA-graph steps give identical results.
        """
        stats, state = self.gradients(batch.to(self.device), state)
        if stats.dtype == torch.float32:
            sizes = StepSizes(*(float(np.float32(size)) if isinstance(size, float) else size for size in sizes))
        for group in self.optimizer.param_groups:
            group["lr"] = sizes.learning_rate
        clip_and_update(self.optimizer, self.grad_clip_norm)
        if self.average:
            self.average.update(sizes.average_weight)
        return stats, state
