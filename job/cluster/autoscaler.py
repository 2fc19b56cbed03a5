"""The limits of a cluster's autoscaler."""

from typing import Any

import ray

from job.cluster.ray_extensions import is_autoscaled, read_cluster_config
from job.cluster.resources import NO_AUTOSCALER, UNKNOWN_AUTOSCALER, Autoscaler, NodeType

QUERY_TIMEOUT_S = 30.0


def query_autoscaler() -> Autoscaler:
    """Determines how many nodes of which types this cluster's autoscaler may add.

    Nodes that it has already added count again, because Ray's report of them lags. If capacity is overestimated,
    a run waits with a notice; if it were underestimated, the run would be refused.
    """
    if is_autoscaled() is False:
        return NO_AUTOSCALER
    try:
        cluster_config = read_cluster_config(QUERY_TIMEOUT_S)
        if cluster_config is None:
            return UNKNOWN_AUTOSCALER if is_autoscaled() else NO_AUTOSCALER
        return parse_cluster_config(cluster_config)
    except (ray.exceptions.RayError, LookupError, TypeError, ValueError):
        return UNKNOWN_AUTOSCALER


def parse_cluster_config(cluster_config: dict[str, Any]) -> Autoscaler:
    """The limits in a configuration for ``ray up``. An empty one has no autoscaler.

    They are unknown for a list of existing machines (provider ``local``) and for node types without resources.
    """
    if not cluster_config:
        return NO_AUTOSCALER
    max_workers = int(cluster_config["max_workers"])
    node_types = [
        NodeType(node_type["resources"], min(max_workers, node_type.get("max_workers", max_workers)))
        for name, node_type in cluster_config["available_node_types"].items()
        if name != cluster_config["head_node_type"]
    ]
    if cluster_config["provider"]["type"] == "local" or not all(node_type.resources for node_type in node_types):
        return UNKNOWN_AUTOSCALER
    return Autoscaler(tuple(node_types))
