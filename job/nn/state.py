"""The recurrent state of lanes, as data that the caller owns.

A state is None (all zeros), a tensor, or a tuple of tensors, as torch's recurrent modules take and return it.
Axis 1 of each tensor is the lane. No module stores a state.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from job.errors import UserError

State = Tensor | tuple[Tensor, ...] | None
LayerState = tuple[Tensor, ...]  # one layer's
Layer = Callable[[Tensor, Any], tuple[Tensor, Any]]  # inputs (T, B, …) and state to outputs (T, B, …) and state


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Returns the state with ``function`` applied to each of its tensors."""
    if isinstance(state, tuple):
        return tuple(map(function, state))
    return None if state is None else function(state)


def detach_state(state: State) -> State:
    """Returns the state without its autograd history, which truncates back-propagation through time."""
    return map_state(Tensor.detach, state)


def slice_state(state: State, start: int, count: int) -> State:
    """Returns the state of ``count`` lanes, contiguous in memory as cuDNN requires.

    Args:
        state: the state of all lanes of a worker
        start: index of the first lane within ``state``
        count: number of lanes
    """
    return map_state(lambda tensor: tensor.narrow(1, start, count).contiguous(), state)


def reset_state(state: State, is_reset_B: Tensor) -> State:
    """Returns the state with zeros for some lanes."""
    return map_state(lambda tensor: tensor.masked_fill(is_reset_B.view(-1, *[1] * (tensor.dim() - 2)), 0), state)


def state_tensors(state: State, shapes: Sequence[tuple[int, ...]], weight: Tensor) -> tuple[Tensor, ...]:
    """Returns the state as a tuple of tensors of these shapes; zeros of the weight's dtype and device if it is None.

    Raises UserError if it has other shapes: it may come from a file, and kernels do not check them.
    """
    if state is None:
        return tuple(weight.new_zeros(shape) for shape in shapes)
    tensors = (state,) if isinstance(state, Tensor) else state
    if [tensor.shape for tensor in tensors] != list(shapes):
        raise UserError("the state of the lanes does not have the sizes of the model")
    return tensors


def run_documents(layer: Layer, inputs: Tensor, state: Any, starts_TB: Tensor | None) -> tuple[Tensor, Any]:
    """Runs a recurrent layer over a window in which documents start: the window is cut where one does.

    Args:
        layer: takes a part of the window
        inputs: inputs (T, B, …) of the window
        state: the lanes' state before the window
        starts_TB: bool, whether the state before the step is taken to be zero; None: it never is

    Returns:
        The outputs (T, B, …), and the state after the window.
    """
    if starts_TB is None:
        return layer(inputs, state)
    cuts = starts_TB[1:].any(1).nonzero().flatten() + 1
    parts = []
    for start, stop in pairwise([0, *cuts.tolist(), len(inputs)]):
        part, state = layer(inputs[start:stop], reset_state(state, starts_TB[start]))
        parts.append(part)
    return torch.cat(parts), state


def cat_states(states: list[State]) -> State:
    """Concatenates states of the same structure along the lanes."""
    first = states[0]
    if isinstance(first, tuple):
        return tuple(torch.cat(tensors, 1) for tensors in zip(*cast(list[tuple[Tensor, ...]], states), strict=True))
    return None if first is None else torch.cat(cast(list[Tensor], states), 1)
