"""Shared by the benchmarks: a description of the machine, and medians of interleaved runs."""

import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from job.distributed.context import available_cpus
from job.kernels.ops import uses_amx


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every benchmark once per round, so that a drift of the machine affects all of them alike."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
            print(f"  round {number + 1}/{rounds}  {name:<34}{results[name][-1]:10.3f}", flush=True)
    return results


def ratios(a: list[float], b: list[float]) -> str:
    """Median and range of ``a / b``, pair by pair."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})"


def machine() -> str:
    """Processor, cores and versions, printed above each table."""
    metadata = _processor()
    name = "{model name} (family {cpu family})".format(**metadata) if "cpu family" in metadata else platform.processor()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "ray"))
    found = torch.cpu.get_capabilities()
    bf16 = "AMX" if uses_amx() else "AVX-512 bf16" if found.get("avx512_bf16") else "no bf16"
    return f"{name}, {available_cpus()} cores, {bf16}; Python {platform.python_version()}, {versions}"


def _processor() -> dict[str, str]:
    """The first processor in ``/proc/cpuinfo``."""
    path = Path("/proc/cpuinfo")
    block = path.read_text().split("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
