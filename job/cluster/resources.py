"""The number of workers and their resources, on this machine or on the nodes of a cluster.

Resources are plain numbers here; this module does not import Ray.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from job.config.run import ScaleConfig
from job.errors import UserError
from job.run.estimate import check_cpus

Resources = dict[str, float]
MAX_NODES = 10_000  # of one type, that an autoscaler is expected to add


def parse_cluster_config(cluster_config: dict[str, Any]) -> list[Resources] | None:
    """The resources of each node that an autoscaler may add, by a configuration for ``ray up``.

    Returns an empty list without an autoscaler (an empty configuration), and None if its limits are unknown: for a
    list of existing machines (provider ``local``) and for node types without resources.
    """
    if not cluster_config:
        return []
    limit = min(int(cluster_config["max_workers"]), MAX_NODES)
    head, node_types = cluster_config["head_node_type"], cluster_config["available_node_types"]
    workers = [node_type for name, node_type in node_types.items() if name != head]
    if cluster_config["provider"]["type"] == "local" or not all(node_type["resources"] for node_type in workers):
        return None
    counts = [min(limit, node_type.get("max_workers", limit)) for node_type in workers]
    return [node_type["resources"] for node_type, count in zip(workers, counts, strict=True) for _ in range(count)]


@dataclass(frozen=True)
class Placement:
    """The workers of a run and the resources of each.

    Args:
        min_workers, max_workers: the same unless the run is elastic
        strategy: how Ray spreads the workers over nodes
        notice: what the user should know about a difference from the configuration
        workers_per_gpu: how many of them share a GPU, if they use any
    """

    min_workers: int
    max_workers: int
    use_gpu: bool
    cpus_per_worker: int
    strategy: str
    accelerator_type: str = ""
    notice: str = ""
    workers_per_gpu: int = 1

    @property
    def resources(self) -> Resources:
        """The resources that Ray reserves for one worker."""
        resources: Resources = {"CPU": self.cpus_per_worker}
        if self.use_gpu:
            resources["GPU"] = math.floor(10_000 / self.workers_per_gpu) / 10_000  # Ray takes four decimals
        if self.accelerator_type:
            resources[f"accelerator_type:{self.accelerator_type}"] = 0.001  # Ray marks such nodes by a resource
        return resources

    def describe(self) -> str:
        """The resources of one worker, for messages."""
        cpus = f"{self.cpus_per_worker} CPU{'s' * (self.cpus_per_worker > 1)}"
        share = f"1/{self.workers_per_gpu} of " * (self.workers_per_gpu > 1)
        model = f" ({self.accelerator_type})" if self.accelerator_type else ""
        return f"{cpus}{f' and {share}a GPU{model}' if self.use_gpu else ''} each"

    def capacity(self, nodes: Iterable[Resources]) -> int:
        """The number of workers that fit on nodes with these resources."""
        return sum(math.floor(min(node.get(name, 0) / need for name, need in self.resources.items())) for node in nodes)


def local_placement(scale: ScaleConfig, cores: int, gpus: int) -> Placement:
    """Places workers on this machine, with fewer of them than configured, or several on a GPU, if it has few GPUs.

    They share GPUs only if the configuration requires GPUs: a GPU is not faster with several workers.

    Raises UserError if it has too few cores for the configuration, or no GPU and the configuration requires one.
    """
    workers = scale.max_workers
    check_cpus(scale.cpus_per_worker, cores)
    if scale.gpu_requirement and not gpus:
        problem = f"{scale.gpu_requirement}: this machine has 0 GPUs for {scale.min_workers} workers"
        raise UserError(problem, "remove this setting")
    use_gpu = scale.accelerator != "cpu" and gpus > 0
    notice, workers_per_gpu = "", 1
    if use_gpu and gpus < workers:  # the number of workers does not change the result
        has = f"this machine has {gpus} GPU{'s' * (gpus > 1)}"
        if scale.gpu_requirement and gpus < scale.min_workers:
            workers = scale.min_workers
            workers_per_gpu = math.ceil(workers / gpus)
            notice = f"{has}: up to {workers_per_gpu} workers share one"
        else:
            notice, workers = f"{has}: using {gpus} instead of {workers} workers", gpus
    cpus = scale.cpus_per_worker or max(1, cores // max(1, workers))
    min_workers, strategy = min(scale.min_workers, workers), scale.placement.upper()
    return Placement(min_workers, workers, use_gpu, cpus, strategy, "", notice, workers_per_gpu)


def cluster_placement(scale: ScaleConfig, nodes: list[Resources], addable: list[Resources] | None) -> Placement:
    """Places workers on a cluster's nodes and on those that its autoscaler may add; None: their limits are unknown.

    Raises UserError if the cluster can never hold the workers.
    """
    all_nodes = nodes + (addable or [])
    gpus = sum(node.get("GPU", 0) for node in all_nodes)
    placement = Placement(
        scale.min_workers,
        scale.max_workers,
        bool(scale.gpu_requirement) or (scale.accelerator == "auto" and gpus >= scale.min_workers),
        scale.cpus_per_worker or 1,
        scale.placement.upper(),
        scale.accelerator_type,
    )
    capacity = placement.capacity(all_nodes)
    if addable is not None and capacity < scale.min_workers:
        raise UserError(
            f"scale.workers = {scale.workers}: this cluster can never place more than {capacity} workers of "
            f"{placement.describe()}",
            "lower scale.workers or scale.cpus_per_worker, or add nodes",
        )
    return placement
