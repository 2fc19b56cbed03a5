"""A worker's place among all, and what its hardware is good at."""

import contextlib
import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)


@dataclass(frozen=True)
class World:
    """Read from the environment in one place (the worker, or the driver for a run without a cluster)."""

    rank: int
    size: int
    device: torch.device
    threads: int
    attempt: str  # names this group of workers; new at each start


@dataclass(frozen=True)
class Precision:
    """The weights' type, and that of products where it is another."""

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision of that name; ``auto`` is bf16 where the hardware multiplies it, else fp32."""
    if name == "auto":
        name = "bf16" if _has_fast_bf16(device) else "fp32"
    autocast = torch.bfloat16 if name == "bf16" else None
    return Precision(name, torch.float64 if name == "fp64" else torch.float32, autocast)


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def device_name(device: torch.device) -> str:
    """The device as a person calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def raise_malloc_thresholds() -> None:
    """Has the C library keep freed memory for the next step.

    A worker trains in a thread, and glibc hands a thread's freed memory back to the system at every
    step: some 200 page faults, 6 % of the seed's step. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)


def available_cpus() -> int:
    """Processor cores that this process may use, by its affinity and by its container's quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(found, _cgroup_cpu_limit(Path("/sys/fs/cgroup"))))


def _cgroup_cpu_limit(group: Path) -> int:
    """Cores' worth of time that a control group grants, rounded up; many where it sets no bound."""
    with contextlib.suppress(OSError, ValueError):  # version 2; "max" is no number
        granted, period = (group / "cpu.max").read_text().split()
        return -(-int(granted) // int(period))
    with contextlib.suppress(OSError, ValueError):
        granted, period = ((group / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return -(-int(granted) // int(period)) if int(granted) > 0 else sys.maxsize
    return sys.maxsize
