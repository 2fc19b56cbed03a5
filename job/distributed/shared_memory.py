"""The exchange between workers of one machine, in memory that they share.

Gloo goes through the network's stack also where there is no network, and its threads sleep and are woken
for each message: a millisecond or more, as long as a small model's step.
"""

import contextlib
import ctypes
import mmap
import os
import secrets
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from job.kernels.build import load_library

SLOT_BYTES = 1 << 20  # bytes of a worker's slot; longer rows of numbers take turns
CACHE_LINE = 64  # bytes, as in exchange.c


class _GroupStruct(ctypes.Structure):
    """``neighbours`` of exchange.c."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("rank", ctypes.c_long),
        ("workers", ctypes.c_long),
        ("slot_bytes", ctypes.c_long),
        ("timeout_s", ctypes.c_double),
        ("sequence", ctypes.c_uint64),
        ("stalled_rank", ctypes.c_long),
    )


class SharedMemoryGroup:
    """All workers of a run, where they share a machine's memory."""

    def __init__(self, memory: mmap.mmap, rank: int, workers: int, timeout_s: float) -> None:
        self.memory = memory  # kept as long as its address is used
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.group = _GroupStruct(address, rank, workers, SLOT_BYTES, timeout_s)

    def all_reduce_(self, numbers: Tensor) -> None:
        """Makes float32 or float64 numbers the sums of all workers' numbers: all call it, with as many each.

        Raises RuntimeError where another does not within the patience.
        """
        assert numbers.is_contiguous() and numbers.dtype in (torch.float32, torch.float64)
        width, count = ctypes.c_long(numbers.element_size()), ctypes.c_long(numbers.numel())
        self._call("add_up", width, count, ctypes.c_void_p(numbers.data_ptr()))

    def all_gather(self, numbers: Tensor, places: list[Tensor]) -> None:
        """Gives each place one worker's numbers, in the order of their ranks; else as ``add_up``, of any type."""
        assert len(places) == self.group.workers
        assert all(some.is_contiguous() and some.nbytes == numbers.nbytes for some in (numbers, *places))
        addresses = (ctypes.c_void_p * len(places))(*(place.data_ptr() for place in places))
        self._call("gather", ctypes.c_long(numbers.nbytes), ctypes.c_void_p(numbers.data_ptr()), addresses)

    def _call(self, function: str, *arguments: Any) -> None:
        if getattr(load_library(), function)(ctypes.byref(self.group), *arguments):
            raise RuntimeError(f"worker {self.group.stalled_rank} was silent for {self.group.timeout_s:g} seconds")


def create_group(timeout_s: float) -> SharedMemoryGroup | None:
    """The workers of the default group, all of which call it; None where they do not all share a memory.

    The memory has no name in any folder, and goes with the last worker.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    size = CACHE_LINE + workers * CACHE_LINE + (workers + 1) * SLOT_BYTES
    with contextlib.ExitStack() as stack:
        invitation: list[tuple[int, int, bytes] | None] = [_create(size, stack) if rank == 0 else None]
        dist.broadcast_object_list(invitation)
        memory = _attach(*invitation[0], size) if invitation[0] else None
        agreed = torch.tensor(memory is not None and load_library() is not None, dtype=torch.int32)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return SharedMemoryGroup(memory, rank, workers, timeout_s) if memory and agreed else None


def _create(size: int, stack: contextlib.ExitStack) -> tuple[int, int, bytes] | None:
    """New memory: process and file that have it while the stack lasts, and what it begins with."""
    try:
        file = os.memfd_create("lanes")
        stack.callback(os.close, file)
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError):  # another system than Linux, or too little memory
        return None
    token = secrets.token_bytes(CACHE_LINE)
    os.pwrite(file, token, 0)
    return os.getpid(), file, token


def _attach(process: int, file: int, token: bytes, size: int) -> mmap.mmap | None:
    """That memory; None where another machine or container has something else there, or nothing."""
    try:
        # Network namespaces are hosts of their own: what cuts them off from each other must not go unnoticed.
        if not os.path.samefile(f"/proc/{process}/ns/net", "/proc/self/ns/net"):
            return None
        with open(f"/proc/{process}/fd/{file}", "r+b", buffering=0) as opened:
            if os.fstat(opened.fileno()).st_size != size or opened.read(CACHE_LINE) != token:
                return None
            return mmap.mmap(opened.fileno(), size)
    except OSError:
        return None
