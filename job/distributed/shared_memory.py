"""Collectives between the workers of one machine, in memory that they share.

Gloo uses the network stack even on one machine, and its threads sleep and are woken for each message: a
millisecond or more, as long as a small model's step.
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

from job.distributed.collectives import broadcast_json, gather_json
from job.kernels.abi import STRUCTS
from job.kernels.build import load_library

SLOT_BYTES = 1 << 20  # size of a worker's slot; longer data take several rounds
CACHE_LINE = 64  # bytes, as in collectives.c


class SharedMemoryGroup:
    """All workers of a run that share one machine's memory.

    Args:
        memory: of the size that ``group_bytes`` gives, shared by all workers
        rank: of this worker
        workers: number of workers
        timeout_s: seconds to wait for another worker
    """

    def __init__(self, memory: mmap.mmap, rank: int, workers: int, timeout_s: float) -> None:
        self.memory = memory  # must not be unmapped before the group is gone
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.group = STRUCTS["ShmGroup"](
            memory=address, rank=rank, workers=workers, slot_bytes=SLOT_BYTES, timeout_s=timeout_s
        )

    def all_reduce_(self, data: Tensor) -> None:
        """Replaces a float32 or float64 tensor by the sum of all workers' tensors, added in the order of the ranks.

        All workers must call it with the same shape and dtype.

        Raises:
            RuntimeError: if another worker does not call it within the timeout
        """
        assert data.is_contiguous() and data.dtype in (torch.float32, torch.float64)
        self._call("all_reduce", data.element_size(), data.numel(), data.data_ptr())

    def all_gather(self, data: Tensor, outputs: list[Tensor]) -> None:
        """Copies each worker's tensor, of any dtype, to the output of its rank; otherwise like ``all_reduce_``."""
        assert len(outputs) == self.group.workers
        assert all(tensor.is_contiguous() and tensor.nbytes == data.nbytes for tensor in (data, *outputs))
        addresses = (ctypes.c_void_p * len(outputs))(*(output.data_ptr() for output in outputs))
        self._call("all_gather", data.nbytes, data.data_ptr(), addresses)

    def _call(self, function: str, *args: Any) -> None:
        if getattr(load_library(), function)(self.group, *args):
            raise RuntimeError(f"worker {self.group.stalled_rank} did not respond for {self.group.timeout_s:g} seconds")


def group_bytes(workers: int) -> int:
    """Returns the size of a group's memory: an identifying token, each worker's flags and slot, and the sums."""
    return CACHE_LINE + workers * CACHE_LINE + (workers + 1) * SLOT_BYTES


def create_group(timeout_s: float) -> SharedMemoryGroup | None:
    """Returns a group of all workers of torch's default process group, or None if they do not share a memory.

    All workers must call it. The memory has no file name and is freed with the last worker.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    size = group_bytes(workers)
    with contextlib.ExitStack() as stack:
        handle = broadcast_json(_create(size, stack) if rank == 0 else None)
        memory = _attach(*handle) if handle else None
        all_attached = all(gather_json(memory is not None and load_library() is not None))
    return SharedMemoryGroup(memory, rank, workers, timeout_s) if memory and all_attached else None


def _create(size: int, stack: contextlib.ExitStack) -> tuple[int, int, str, int] | None:
    """Returns the arguments of ``_attach`` for new memory, whose file is closed with the stack."""
    try:
        file = os.memfd_create("lanes")
        stack.callback(os.close, file)
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError):  # not Linux, or not enough memory
        return None
    token = secrets.token_bytes(CACHE_LINE)
    os.pwrite(file, token, 0)
    return os.getpid(), file, token.hex(), size


def _attach(process: int, file: int, token: str, size: int) -> mmap.mmap | None:
    """Maps the memory. Returns None if that file is another one or missing, as on another machine or in a container."""
    try:
        # Workers in different network namespaces can be partitioned like hosts; that must stay detectable.
        if not os.path.samefile(f"/proc/{process}/ns/net", "/proc/self/ns/net"):
            return None
        with open(f"/proc/{process}/fd/{file}", "r+b", buffering=0) as opened:
            if os.fstat(opened.fileno()).st_size != size or opened.read(CACHE_LINE).hex() != token:
                return None
            return mmap.mmap(opened.fileno(), size)
    except OSError:
        return None
