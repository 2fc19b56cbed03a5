"""A worker's rank, device and precision, and the resources of its machine."""

import contextlib
import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from job.config.run import ScaleConfig
from job.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAX_MMAP_THRESHOLD = 32 << 20  # to which glibc itself raises it, in a process that frees blocks of such a size


@dataclass(frozen=True)
class World:
    """One worker's place in its worker group.

    Made in one place: by the training worker on a cluster, by the driver for a run without one.
    """

    rank: int
    size: int  # number of workers
    device: torch.device
    threads: int  # for operations on the CPU
    attempt: str  # identifies the worker group; new at each start


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights, and that of matrix products if it differs (else None)."""

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Returns the precision ``fp32``, ``fp64``, ``bf16`` or ``auto``: bf16 if the hardware multiplies it, else fp32."""
    if name == "auto":
        name = "bf16" if _has_fast_bf16(device) else "fp32"
    autocast = torch.bfloat16 if name == "bf16" else None
    return Precision(name, torch.float64 if name == "fp64" else torch.float32, autocast)


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def local_device(scale: ScaleConfig) -> torch.device:
    """Returns the device of a process that computes alone: its GPU if it has one and may use it, else the CPU.

    Raises:
        UserError: the configuration requires a GPU, and there is none that torch can use
    """
    has_gpu = torch.cuda.is_available()
    if scale.gpu_requirement and not has_gpu:
        raise UserError(f"{scale.gpu_requirement}: this machine has no GPU that torch can use", "leave it out")
    return torch.device("cuda" if has_gpu and scale.accelerator != "cpu" else "cpu")


def use_full_precision() -> None:
    """Lets cuDNN multiply float32 as IEEE float32 in this process. Its default is TF32, unlike that of cuBLAS."""
    torch.backends.cudnn.allow_tf32 = False


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU model or the CPU architecture, for messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def raise_malloc_thresholds() -> None:
    """Makes glibc keep freed memory for the next step; does nothing with another C library.

    Training runs in a thread, and glibc returns a thread's freed memory to the system at every step:
    some 200 page faults, 6 % of a step of the default configuration.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)


def release_freed_memory() -> None:
    """Returns freed memory to the system, and from now on, too, as glibc does in a process that frees large tensors.

    ``raise_malloc_thresholds`` cannot be undone any better: glibc does not return the thresholds.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MAX_MMAP_THRESHOLD)
        libc.malloc_trim(0)


def available_cpus() -> int:
    """Returns the number of CPU cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _cgroup_cpu_limit(Path("/sys/fs/cgroup"))))


def machine_memory() -> int:
    """Returns the bytes of memory that this process may use, by the machine and by its container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroup v2 and v1
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)


def _cgroup_cpu_limit(cgroup: Path) -> int:
    """Returns a control group's CPU quota in cores, rounded up; ``sys.maxsize`` if there is none."""
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" is not a number
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        return -(-quota // period)
    with contextlib.suppress(OSError, ValueError):  # cgroup v1
        quota, period = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return -(-quota // period) if quota > 0 else sys.maxsize
    return sys.maxsize
