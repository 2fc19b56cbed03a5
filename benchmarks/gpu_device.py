"""Prints the device and the versions of a machine as JSON: ``python -m benchmarks.gpu_device [--device cpu]``."""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_nccl_available

from benchmarks.gpu_packages import installed_version
from job.distributed.context import available_cpus, machine_memory

PACKAGES = ("ray", "numpy", "pyarrow", "pytest", "triton")


def driver_version() -> str | None:
    """The version of NVIDIA's driver, None without one."""
    path = Path("/proc/driver/nvidia/version")
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return path.read_text().split("\n")[0] if path.exists() else None


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device's model and sizes."""
    machine = {"type": device.type, "cores": available_cpus(), "machine_memory_bytes": machine_memory()}
    if device.type != "cuda":
        return machine | {"name": processor_name(), "bf16": torch.cpu.get_capabilities().get("avx512_bf16", False)}
    properties = torch.cuda.get_device_properties(device)
    return machine | {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def processor_name() -> str:
    """The model of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, Any]:
    """Python, torch, CUDA's libraries, the driver, and packages."""
    nccl = torch.cuda.nccl.version() if is_nccl_available() else None  # type: ignore[no-untyped-call]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        **{name: installed_version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU on this machine; --device cpu runs what needs none")
    json.dump({"device": device_facts(device), "versions": versions()}, sys.stdout)


if __name__ == "__main__":
    main()
