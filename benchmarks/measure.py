"""What the benchmarks share: the machine they ran on, and medians of interleaved runs."""

import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from job.world import cores


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each run's figure in every round; a round runs all, one after the other, so drift meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
            print(f"  round {number + 1}/{rounds}  {name:<34}{found[name][-1]:10.3f}", flush=True)
    return found


def ratios(a: list[float], b: list[float]) -> str:
    """a / b, pair by pair: the median and the range."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})"


def machine() -> str:
    """Processor, cores and versions, for the head of a table."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
    bf16 = "with" if torch.cpu.get_capabilities().get("avx512_bf16") else "without"
    return (
        f"{names[0] if names else platform.processor()}, {cores()} cores, {bf16} AVX-512 bf16; "
        f"Python {platform.python_version()}, {versions}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
