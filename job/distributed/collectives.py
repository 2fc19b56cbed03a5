"""Exchange of plain data between workers, as JSON: nothing that arrives is unpickled."""

import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_json(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Returns rank 0's value on all workers, which must all call it.

    Args:
        value: rank 0's is sent: None, numbers, text, and lists and dicts of such; a tuple arrives as a list
        group: the workers; None: torch's default process group, and the value itself if there is none
    """
    if not dist.is_initialized():
        return value
    data = _encode(value, group)
    size = torch.tensor([len(data)], device=data.device)
    dist.broadcast(size, 0, group)
    if dist.get_rank():
        data = data.new_empty(int(size))
    dist.broadcast(data, 0, group)
    return _decode(data)


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns all workers' values in the order of their ranks; the arguments are those of ``broadcast_json``."""
    if not dist.is_initialized():
        return [value]
    data = _encode(value, group)
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=data.device)
    sizes[dist.get_rank()] = len(data)
    dist.all_reduce(sizes, group=group)
    padded = data.new_zeros(int(sizes.max()))
    padded[: len(data)] = data
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded, group)
    return [_decode(row[:size]) for row, size in zip(rows, sizes.tolist(), strict=True)]


def broadcast_tensors(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Returns rank 0's tensors on all workers; all are on the CPU, and of any dtype."""
    if not dist.is_initialized():
        return tensors
    layout = [(name, str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()]
    for name, dtype, shape in broadcast_json(layout, group):
        if dist.get_rank():
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        dist.broadcast(tensors[name].reshape(-1).view(torch.uint8), 0, group)
    return tensors


def _encode(value: Any, group: dist.ProcessGroup | None) -> Tensor:
    data = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), np.uint8).copy())
    return data.cuda() if dist.get_backend(group) == "nccl" else data


def _decode(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())
