"""The recurrent state of lanes, as data that the caller owns.

A state is None (all zeros), a tensor, or a tuple of tensors, as torch's recurrent modules take and return it.
Axis 1 of each tensor is the lane. No module stores a state.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...] | None


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


def cat_states(states: list[State]) -> State:
    """Concatenates states of the same structure along the lanes."""
    first = states[0]
    if isinstance(first, tuple):
        return tuple(torch.cat(tensors, 1) for tensors in zip(*cast(list[tuple[Tensor, ...]], states), strict=True))
    return None if first is None else torch.cat(cast(list[Tensor], states), 1)
