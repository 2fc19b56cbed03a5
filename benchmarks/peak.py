"""Measured limits of one core, and of a GPU."""

import ctypes
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job.kernels.ops import uses_amx


@dataclass(frozen=True)
class Limits:
    """FLOP/s and bytes per second. bf16: with the instructions that the kernels use."""

    float32: float
    bfloat16: float
    memory: float

    def of(self, dtype: torch.dtype) -> float:
        return self.bfloat16 if dtype == torch.bfloat16 else self.float32


def limits() -> Limits:
    """The best of twenty short tries, by the CPU time of this process."""
    with tempfile.TemporaryDirectory() as folder:
        library_file = Path(folder) / "peak.so"
        source = Path(__file__).parent / "peak.c"
        subprocess.run(
            ["cc", "-O3", "-march=native", "-fPIC", "-shared", str(source), "-o", str(library_file)], check=True
        )
        library = ctypes.CDLL(str(library_file))
        iterations = ctypes.c_long(200_000)
        size = 64 << 20
        to, source_bytes = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        copied = ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(source_bytes.data_ptr()), ctypes.c_long(size)
        return Limits(
            _best(library.multiply_floats, iterations),
            _best(library.multiply_tiles if uses_amx() else library.multiply_bf16, iterations),
            _best(library.copy, *copied),
        )


def product_peak(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a large matrix product of random numbers on a device: the best of five tries."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize(device)
        best = max(best, 10 * 2 * side**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(function: Any, *arguments: object) -> float:
    function.restype = ctypes.c_double
    results = 0.0
    for _ in range(20):
        start = time.process_time()
        done = function(*arguments)
        results = max(results, done / (time.process_time() - start))
    return results
