"""What the benchmarks share: the machine they ran on, and medians of interleaved runs."""

import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from job.distributed.context import available_cpus


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
    metadata = _processor()
    name = "{model name} (family {cpu family})".format(**metadata) if "cpu family" in metadata else platform.processor()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "ray"))
    bf16 = "with" if torch.cpu.get_capabilities().get("avx512_bf16") else "without"
    return f"{name}, {available_cpus()} cores, {bf16} AVX-512 bf16; Python {platform.python_version()}, {versions}"


def _processor() -> dict[str, str]:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    block = path.read_text().split("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
