"""A whole update captured once and replayed from one call: CUDA graphs.

A small model's step on a GPU is hundreds of short kernels, and Python takes longer to launch them than
they run. What is captured reads and writes places that stay: before a replay the window, the state and
the learning rate are copied into them, and after it they hold the new state.
"""

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from job.distributed.gradient_sync import Batch, LaneAssignment
from job.nn.language_model import LanguageModel
from job.nn.state import State, map_state
from job.training.train_step import EagerTrainStep

GRAPH_ENV_VAR = "LANES_GRAPH"  # set to "off", nothing is captured
WARMUP_STEPS = 3  # updates before the capture, in which libraries choose their ways and take what memory they want

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


def supports_cuda_graph(model: LanguageModel, share: LaneAssignment) -> bool:
    """Whether each update of the run is the same work of one GPU, with no exchange in it."""
    weight = model.linear.weight
    alike = share.workers == 1 and not model.has_custom_cell
    # A rate on the GPU is a float32, which would round that of a run in float64.
    return alike and weight.is_cuda and weight.dtype == torch.float32 and os.environ.get(GRAPH_ENV_VAR) != "off"


def capture_graph(step: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """Takes down what ``step`` launches, without running it: the place of its result, and what runs it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a checkpoint may be written meanwhile
            found = step()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch leaves that of a capture which broke off in its place
        raise
    return found, graph.replay


class CudaGraphTrainStep:
    """An ``Update`` of windows that are all alike."""

    def __init__(self, update: EagerTrainStep, capture: Capture = capture_graph) -> None:
        self.update, self.capture = update, capture
        self.rate = torch.zeros((), device=update.device)
        self.wait: int | None = WARMUP_STEPS  # updates until the capture; None once that is tried
        self.graph: _Graph | None = None

    def __call__(self, window: Batch, state: State, rate: float) -> tuple[Tensor, State]:
        """As ``Update``; what it gives, the next call overwrites."""
        self.rate.fill_(rate)
        if self.wait == 0 and state is not None:  # whose shape must be known
            self.wait, self.graph = None, self._captured(window, state)
        if self.graph:
            return self.graph.replayed(window, state)
        self.wait = self.wait and self.wait - 1
        return self.update(window, state, self.rate)

    def _captured(self, window: Batch, state: State) -> "_Graph | None":
        for group in self.update.optimizer.param_groups:
            if "capturable" in group:  # torch asks for it now, and warns of it at any other time
                group["capturable"] = True
        try:
            return _Graph(self.update, window, state, self.rate, self.capture)
        except RuntimeError as error:  # nothing has run yet
            why = error.__context__ or error
            warnings.warn(f"no CUDA graph, each step is launched operation by operation: {why}", stacklevel=2)
            return None


class _Graph:
    """What was captured, and the places that it reads and writes."""

    def __init__(self, update: EagerTrainStep, window: Batch, state: State, rate: Tensor, capture: Capture) -> None:
        self.window = Batch(*(part.to(update.device, copy=True) for part in window))
        self.state = map_state(torch.clone, state)

        def step() -> Tensor:
            found, after = update(self.window, self.state, rate)
            _copy_state_(after, self.state)
            return found

        self.found, self.replay = capture(step)

    def replayed(self, window: Batch, state: State) -> tuple[Tensor, State]:
        for part, place in zip(window, self.window, strict=True):
            place.copy_(part, non_blocking=True)
        _copy_state_(state, self.state)
        self.replay()
        return self.found, self.state


def _copy_state_(state: State, places: State) -> None:
    """Copies a state, zero where it is None, to where another stands."""
    for index, place in enumerate(_parts(places)):
        if state is None:
            place.zero_()
        elif (part := _parts(state)[index]) is not place:
            place.copy_(part)


def _parts(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state or ()
