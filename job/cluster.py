"""Which Ray cluster, what it can place, and Ray's own talk kept away."""

import math
import os
from contextlib import redirect_stderr
from dataclasses import dataclass

# Ray reads these when it is imported. What a user has set stays.
_QUIET = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # seconds until a dead worker is seen
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "ERROR",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_worker_niceness": "0",  # else Ray's own housekeeping goes before training
}
# These concern Ray's processes on the nodes.
_ON_NODES = {
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # seconds to wait for a worker that hangs
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what cuBLAS needs to be reproducible
}
for _name, _value in (_QUIET | _ON_NODES).items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import torch  # noqa: E402

from job.config import Scale  # noqa: E402
from job.errors import UserError  # noqa: E402
from job.world import cores  # noqa: E402


@dataclass(frozen=True)
class Placement:
    """How a run's workers lie on the cluster."""

    min_workers: int
    max_workers: int
    use_gpu: bool
    cpus_per_worker: int
    strategy: str
    notice: str = ""

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for one worker."""
        return {"CPU": self.cpus_per_worker, "GPU": int(self.use_gpu)}


def connect(scale: Scale) -> Placement:
    """Connects to a cluster (``RAY_ADDRESS`` where it is set, else one of its own on this machine).

    Gives the workers' place on it; UserError where it can never hold them. Within a cluster, as a
    trial of a search is, their place was found before.
    """
    if ray.is_initialized():
        return _placed(scale, _alive())[0]
    return connect_for_many(scale, 1)[0]


def connect_for_many(scale: Scale, runs: int) -> tuple[Placement, int]:
    """Connects as ``connect`` does; the place of one run, and how many of so many have room at once.

    0 asks for as many as there is room for.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address == "local":
        placement = _on_this_machine(scale)
        each = placement.max_workers * placement.cpus_per_worker
        slots = max(cores(), each * max(1, runs))
        _start(slots)
        room = min(slots // each, torch.cuda.device_count() // placement.max_workers if placement.use_gpu else slots)
        return placement, min(room, runs or room)
    _join(address)
    try:
        placement, workers = _on_cluster(scale, _alive())
    except UserError:
        ray.shutdown()
        raise
    room = max(1, workers // placement.max_workers)
    return placement, min(room, runs or room)


def _start(slots: int) -> None:
    ray.init(
        address="local",
        num_cpus=slots,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
    )


def _join(address: str) -> None:
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": _ON_NODES},
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"RAY_ADDRESS = {address}: no cluster can be reached there: {reason}") from None


def _on_this_machine(scale: Scale) -> Placement:
    gpus, workers = torch.cuda.device_count(), scale.max_workers
    if scale.accelerator == "gpu" and gpus < scale.min_workers:
        raise UserError(
            f"scale.accelerator = gpu: this machine has {gpus} GPUs for {scale.min_workers} workers; "
            "lower scale.workers, or use auto or cpu"
        )
    use_gpu = scale.accelerator != "cpu" and gpus > 0
    notice = ""
    if use_gpu and gpus < workers:  # the same run on any number of workers, so on so many too
        notice = f"{gpus} GPU{'s' * (gpus > 1)} here: {gpus} in the place of {workers} workers"
        workers = gpus
    cpus = scale.cpus_per_worker or max(1, cores() // max(1, workers))
    return Placement(min(scale.min_workers, workers), workers, use_gpu, cpus, scale.placement.upper(), notice)


def _alive() -> list[dict[str, float]]:
    """What each living node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _on_cluster(scale: Scale, nodes: list[dict[str, float]]) -> tuple[Placement, int]:
    """The workers' place, and how many of them the cluster can hold; UserError where that is too few."""
    placement, room = _placed(scale, nodes)
    if room < scale.min_workers:
        cpus = placement.cpus_per_worker
        each = f"{cpus} CPU{'s' * (cpus > 1)}{' and a GPU' if placement.use_gpu else ''} each"
        raise UserError(
            f"scale.workers = {scale.workers}: this cluster can never place more than {room} workers of {each}: "
            "lower scale.workers or scale.cpus_per_worker, or add nodes"
        )
    return placement, room


def _placed(scale: Scale, nodes: list[dict[str, float]]) -> tuple[Placement, int]:
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    use_gpu = scale.accelerator == "gpu" or (scale.accelerator == "auto" and gpus >= scale.min_workers)
    cpus = scale.cpus_per_worker or 1
    placement = Placement(scale.min_workers, scale.max_workers, use_gpu, cpus, scale.placement.upper())
    return placement, sum(_fit(node, cpus, use_gpu) for node in nodes)


def _fit(node: dict[str, float], cpus: int, use_gpu: bool) -> int:
    by_cpu = node.get("CPU", 0) / cpus
    return math.floor(min(by_cpu, node.get("GPU", 0)) if use_gpu else by_cpu)
