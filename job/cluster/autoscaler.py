"""The limits of a cluster's autoscaler, which Ray has no API for."""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import ray

from job.cluster.ray_extensions import (
    AUTOSCALER_CLUSTER_FLAG,
    AUTOSCALER_CONFIG_FLAG,
    AUTOSCALER_SCRIPT,
    HEAD_NODE_RESOURCE,
    is_autoscaled,
)
from job.cluster.resources import NO_AUTOSCALER, UNKNOWN_AUTOSCALER, Autoscaler, NodeType

# A function of this module runs on the head node, which may not have this package.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

QUERY_TIMEOUT_S = 30.0


def query_autoscaler() -> Autoscaler:
    """Determines how many nodes of which types this cluster's autoscaler may add.

    Nodes that it has already added count again: Ray's report of them lags. So capacity may be overestimated,
    in which case a run waits with a notice; underestimated capacity would refuse it.
    """
    if is_autoscaled() is False:
        return NO_AUTOSCALER
    on_head = ray.remote(num_cpus=0, resources={HEAD_NODE_RESOURCE: 0.001}, max_retries=0)(_read_cluster_config)
    try:
        cluster_config = ray.get(on_head.remote(ray.get_runtime_context().gcs_address), timeout=QUERY_TIMEOUT_S)
        if cluster_config is None:
            return UNKNOWN_AUTOSCALER if is_autoscaled() else NO_AUTOSCALER
        return parse_cluster_config(cluster_config)
    except (ray.exceptions.RayError, LookupError, TypeError, ValueError):
        return UNKNOWN_AUTOSCALER


def _read_cluster_config(gcs_address: str) -> dict[str, Any] | None:
    """The configuration of the autoscaler that runs on this node, the head. None if it runs elsewhere."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().decode(errors="replace").split("\0")
            is_autoscaler = any(word.endswith(AUTOSCALER_SCRIPT) and "autoscaler" in word for word in arguments)
            # The heads of other clusters may run on the same machine.
            if is_autoscaler and AUTOSCALER_CLUSTER_FLAG + gcs_address in arguments:
                flag = AUTOSCALER_CONFIG_FLAG
                files = [word.removeprefix(flag) for word in arguments if word.startswith(flag)]
                return dict(importlib.import_module("yaml").safe_load(Path(files[0]).read_text())) if files else {}
    return None


def parse_cluster_config(cluster_config: dict[str, Any]) -> Autoscaler:
    """The limits that a cluster configuration, as for ``ray up``, sets. An empty one has no autoscaler.

    They are unknown for a list of existing machines (provider ``local``), and if a node type has no resources.
    """
    if not cluster_config:
        return NO_AUTOSCALER
    max_workers = int(cluster_config["max_workers"])
    node_types = cluster_config["available_node_types"]
    workers = [node_type for name, node_type in node_types.items() if name != cluster_config["head_node_type"]]
    if cluster_config["provider"]["type"] == "local" or not all(node_type["resources"] for node_type in workers):
        return UNKNOWN_AUTOSCALER
    return Autoscaler(
        tuple(
            NodeType(node_type["resources"], min(max_workers, node_type.get("max_workers", max_workers)))
            for node_type in workers
        )
    )
