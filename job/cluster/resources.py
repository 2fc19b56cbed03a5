"""How many workers, each with what: on this machine, or on the nodes of a cluster.

Knows resources as numbers, and no Ray.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from job.config.schema import ScaleConfig
from job.errors import UserError

Resources = dict[str, float]


@dataclass(frozen=True)
class NodeType:
    """A kind of nodes that a cluster's autoscaler may bring."""

    resources: Resources
    most: int


@dataclass(frozen=True)
class Placement:
    """How a run's workers lie on the cluster."""

    min_workers: int
    max_workers: int
    use_gpu: bool
    cpus_per_worker: int
    strategy: str
    accelerator_type: str = ""
    notice: str = ""

    @property
    def resources(self) -> Resources:
        """What Ray sets aside for one worker; Ray's own name for a kind of accelerator is a resource too."""
        need: Resources = {"CPU": self.cpus_per_worker}
        if self.use_gpu:
            need["GPU"] = 1
        if self.accelerator_type:
            need[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return need

    @property
    def each(self) -> str:
        """What one worker needs, as a person says it."""
        cpus = f"{self.cpus_per_worker} CPU{'s' * (self.cpus_per_worker > 1)}"
        gpu = f" and a GPU{f' ({self.accelerator_type})' if self.accelerator_type else ''}" if self.use_gpu else ""
        return f"{cpus}{gpu} each"

    def room(self, nodes: Iterable[Resources]) -> int:
        """Workers that fit on nodes with so much to give."""
        return sum(math.floor(min(node.get(kind, 0) / need for kind, need in self.resources.items())) for node in nodes)

    def autoscaled_capacity(self, growth: Iterable[NodeType]) -> int:
        """Workers that fit on what an autoscaler may bring."""
        return sum(self.room([kind.resources]) * kind.most for kind in growth)


def local_placement(scale: ScaleConfig, cores: int, gpus: int) -> Placement:
    """A placement on a cluster of one's own; UserError where it has not the GPUs."""
    workers = scale.max_workers
    if scale.gpu_requirement and gpus < scale.min_workers:
        raise UserError(
            f"{scale.gpu_requirement}: this machine has {gpus} GPUs for {scale.min_workers} workers; "
            "lower scale.workers, or leave it out"
        )
    use_gpu = scale.accelerator != "cpu" and gpus > 0
    notice = ""
    if use_gpu and gpus < workers:  # the same run on any number of workers, so on so many too
        notice = f"{gpus} GPU{'s' * (gpus > 1)} here: {gpus} in the place of {workers} workers"
        workers = gpus
    cpus = scale.cpus_per_worker or max(1, cores // max(1, workers))
    return Placement(min(scale.min_workers, workers), workers, use_gpu, cpus, scale.placement.upper(), notice=notice)


def cluster_placement(scale: ScaleConfig, nodes: list[Resources], growth: list[NodeType] | None) -> Placement:
    """A placement on the nodes of a cluster, and on those that its autoscaler may bring.

    ``growth`` is empty without an autoscaler, and None where one's limits are not known. UserError
    where the cluster can never hold the workers.
    """
    brought = growth or []
    gpus = sum(node.get("GPU", 0) for node in nodes) + sum(kind.resources.get("GPU", 0) * kind.most for kind in brought)
    placement = Placement(
        scale.min_workers,
        scale.max_workers,
        bool(scale.gpu_requirement) or (scale.accelerator == "auto" and gpus >= scale.min_workers),
        scale.cpus_per_worker or 1,
        scale.placement.upper(),
        scale.accelerator_type,
    )
    room = placement.room(nodes) + placement.autoscaled_capacity(brought)
    if growth is not None and room < scale.min_workers:
        raise UserError(
            f"scale.workers = {scale.workers}: this cluster can never place more than {room} workers of "
            f"{placement.each}; lower scale.workers or scale.cpus_per_worker, or add nodes"
        )
    return placement
