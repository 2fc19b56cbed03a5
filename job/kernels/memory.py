"""Memory of the size of weights, which each step needs again: gradients, and weights as the kernels pack them.

glibc returns blocks of more than 32 MiB to the system as soon as they are freed, and a thread's smaller ones, too.
To get their pages back took a sixth of a step of an LSTM of 1,500 units.
"""

import math
import weakref
from collections import defaultdict

import torch
from torch import Tensor

MIN_NUMBERS = 1 << 20  # torch's allocator takes care of smaller tensors

_freed: defaultdict[int, list[Tensor]] = defaultdict(list)  # by their number of elements


def empty_weight(*shape: int) -> Tensor:
    """Returns an uninitialized float32 tensor on the CPU, whose memory is used again once nothing refers to it.

    Freed memory is kept until ``release_memory``, so this is for shapes that depend on the model only.
    """
    size = math.prod(shape)
    if size < MIN_NUMBERS:
        return torch.empty(shape)
    freed = _freed[size]
    try:
        memory = freed.pop()
    except IndexError:
        memory = torch.empty(size)
    lent = memory.numpy()  # is kept alive by each tensor that shares the memory
    weakref.finalize(lent, freed.append, memory).atexit = False
    return torch.from_numpy(lent).view(shape)


def release_memory() -> None:
    """Returns freed memory to the system."""
    _freed.clear()
