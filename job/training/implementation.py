"""How each worker computes, which decides the last bits of its results."""

import platform
from dataclasses import dataclass

import torch

from job.distributed.collectives import gather_json
from job.distributed.context import Precision, World, device_name
from job.errors import UnrecoverableError
from job.kernels.ops import kernel_unavailable_reason, supports_dtype, uses_amx


@dataclass(frozen=True)
class Implementation:
    """How a worker computes, and its node.

    The versions of Python, torch and this package are not part of it: they are compared before a run starts.
    """

    node: str
    processor: str  # the GPU's model, or the CPU's architecture and the instructions that torch and the kernel use
    uses_kernel: bool
    kernel_unavailable: str  # the reason; empty if the kernel is available or the device is not a CPU

    def __str__(self) -> str:
        reason = f" ({self.kernel_unavailable})" if self.kernel_unavailable else ""
        return f"{'with' if self.uses_kernel else 'without'} the compiled kernel{reason} on {self.processor}"


def gather_implementations(world: World, precision: Precision) -> list[Implementation]:
    """Returns the implementation of each worker, in the order of their ranks; all workers must call it."""
    device = world.device
    on_cpu = device.type == "cpu"
    instructions = f" {torch.backends.cpu.get_cpu_capability()}" if on_cpu else ""
    if on_cpu and precision.autocast and uses_amx():
        instructions += " with AMX"
    own = (
        platform.node(),
        device_name(device) + instructions,
        on_cpu and supports_dtype(precision.autocast or precision.weights),
        kernel_unavailable_reason(device),
    )
    return [Implementation(*values) for values in gather_json(own)]


def check_devices(world: World, gpu_requirement: str) -> None:
    """Compares the devices of all workers, which must all call it.

    Args:
        gpu_requirement: the field that requires GPUs and its value; empty if none does

    Raises:
        UnrecoverableError: some workers compute on a GPU and others on a CPU, or on a CPU although a GPU is required
    """
    workers = gather_json((platform.node(), world.device.type))
    on_cpu = [f"worker {rank} on {node}" for rank, (node, device) in enumerate(workers) if device == "cpu"]
    if on_cpu and (gpu_requirement or len(on_cpu) < len(workers)):
        required = f"{gpu_requirement}: " if gpu_requirement else ""
        others = "" if len(on_cpu) == len(workers) else ", but others have one"
        raise UnrecoverableError(
            f"{required}{on_cpu[0]} has no GPU that torch can use{others}",
            "check torch and the driver there, or set scale.accelerator = cpu",
        )


def check_same_implementation(implementations: list[Implementation]) -> None:
    """Raises UnrecoverableError if the workers of a reproducible run would compute different bits."""
    first = implementations[0]
    for rank, other in enumerate(implementations):
        if (other.processor, other.uses_kernel) != (first.processor, first.uses_kernel):
            raise UnrecoverableError(
                f"train.reproducible: worker {rank} on {other.node} would compute {other}, "
                f"but worker 0 on {first.node} {first}, which gives other bits",
                "use nodes that are alike, or set LANES_KERNEL=off on all of them (no-amx, if they differ in AMX only)",
            )


def describe_missing_kernel(implementations: list[Implementation]) -> str:
    """Returns why the first worker without the kernel has none, and which worker if others have it. Else empty."""
    missing = {rank: worker for rank, worker in enumerate(implementations) if worker.kernel_unavailable}
    if not missing:
        return ""
    rank, worker = next(iter(missing.items()))
    where = "" if len(missing) == len(implementations) else f"worker {rank} on {worker.node}: "
    return where + worker.kernel_unavailable
