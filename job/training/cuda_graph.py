"""A training step captured once as a CUDA graph and replayed with one call.

A small model's step on a GPU is hundreds of short kernels, which Python takes longer to launch than the GPU to run.
A graph reads and writes fixed memory: before each replay the batch, the state and the step sizes are copied there,
and after it the new state is there.
"""

import os
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from job.distributed.gradient_sync import Batch
from job.nn.language_model import LanguageModel
from job.nn.state import State, map_state
from job.training.schedule import StepSizes
from job.training.train_step import EagerTrainStep, TrainStep

GRAPH_ENV_VAR = "LANES_GRAPH"  # "off" disables the capture, "workers" captures the steps of several workers, too
WARMUP_STEPS = 3  # steps before the capture, in which libraries finish autotuning and allocate their workspaces
NO_GRAPH = "no CUDA graph, each step is launched operation by operation"

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


def supports_cuda_graph(model: LanguageModel, world_size: int) -> bool:
    """Whether each step is the same work of a single GPU, or of several with NCCL if that is enabled.

    NCCL's operations can be captured, but this has not run on several GPUs yet. The steps of an adaptive softmax are
    not the same work: the number of rows of each cluster depends on the targets.
    """
    weight, setting = model.linear.weight, os.environ.get(GRAPH_ENV_VAR)
    # The learning rate on the GPU is a float32, which would round that of a run in float64.
    is_uniform = (
        not model.has_custom_cell and model.reset_token is None and weight.is_cuda and weight.dtype == torch.float32
    )
    is_supported = is_uniform and (
        setting != "off" if world_size == 1 else setting == "workers" and dist.get_backend() == "nccl"
    )
    if is_supported and model.tails:
        warnings.warn(f"{NO_GRAPH}: the steps of model.softmax = adaptive differ", stacklevel=2)
    return is_supported and not model.tails


def capture_graph(step: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """Records the kernels that ``step`` launches, without running them.

    Returns:
        the tensor that holds the result after each replay, and the function that replays the kernels

    Raises:
        RuntimeError: an operation of the step cannot be captured
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a checkpoint may be written meanwhile
            result = step()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch does not restore it after a failed capture
        raise
    return result, graph.replay


class CudaGraphTrainStep:
    """A TrainStep for batches of one shape: eager during the warm-up, then a CUDA graph if it can be captured."""

    def __init__(self, eager_step: EagerTrainStep, capture: Capture = capture_graph) -> None:
        self.eager_step = eager_step
        self.capture = capture
        self.device_sizes = torch.zeros(len(StepSizes._fields), device=eager_step.device)
        self.sizes = StepSizes(*self.device_sizes)
        self.warmup_left = WARMUP_STEPS
        self.step: TrainStep | None = None  # used after the warm-up

    def __call__(self, batch: Batch, state: State, sizes: StepSizes) -> tuple[Tensor, State]:
        """Takes the step; the next call overwrites the tensors that it returns."""
        for device_size, size in zip(self.device_sizes, sizes, strict=True):
            device_size.fill_(size)
        if self.warmup_left:
            self.warmup_left -= 1
        elif self.step is None and state is not None:  # a state of None has no shape to capture
            self.step = self._capture(batch, state)
        return (self.step or self.eager_step)(batch, state, self.sizes)

    def _capture(self, first_batch: Batch, first_state: State) -> TrainStep:
        """Returns the captured step, or the eager one if it cannot be captured."""
        for group in self.eager_step.optimizer.param_groups:
            if "capturable" in group:  # required for the capture; torch warns if it is set earlier
                group["capturable"] = True
        graph_batch = Batch(*(tensor.to(self.eager_step.device, copy=True) for tensor in first_batch))
        graph_state = map_state(torch.clone, first_state)

        def step() -> Tensor:
            stats, new_state = self.eager_step(graph_batch, graph_state, self.sizes)
            _copy_state_(graph_state, new_state)
            return stats

        def replay_step(batch: Batch, state: State, _: StepSizes) -> tuple[Tensor, State]:
            for destination, source in zip(graph_batch, batch, strict=True):
                destination.copy_(source, non_blocking=True)
            _copy_state_(graph_state, state)
            replay()
            return stats, graph_state

        try:
            stats, replay = self.capture(step)
        except RuntimeError as error:  # no operation has run yet
            reason = error.__context__ or error
            warnings.warn(f"{NO_GRAPH}: {reason}", stacklevel=2)
            return self.eager_step
        return replay_step


def _copy_state_(destination: State, source: State) -> None:
    """Copies a state, or zeros if it is None, into the tensors of another state."""
    for index, tensor in enumerate(_state_tensors(destination)):
        if source is None:
            tensor.zero_()
        else:
            tensor.copy_(_state_tensors(source)[index])


def _state_tensors(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state or ()
