"""What a cluster's autoscaler may bring, which Ray itself does not tell."""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

from job.cluster.resources import NodeType

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

STATUS_TIMEOUT_S = 30.0  # seconds for the head to answer
_REPORT = "__autoscaling_status"  # where Ray's autoscaler keeps its report
_FLAG = "--autoscaling-config="


def scalable_node_types() -> list[NodeType] | None:
    """Nothing where there is no autoscaler, None where there is one whose limits cannot be known.

    What it has brought already is counted too: its report of that lags, and too much is awaited, with
    a message, where too little would be refused.
    """
    kinds: dict[str, str] = {}
    with contextlib.suppress(ValueError, LookupError, TypeError):
        kinds = json.loads(_internal_kv_get(_REPORT) or "{}")["autoscaler_report"]["node_type_mapping"]
    # Without an autoscaler Ray takes each node for a type of its own, named after it.
    if kinds and all(kind == f"node_{node}" for node, kind in kinds.items()):
        return []
    on_head = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001}, max_retries=0)(_configuration)
    try:
        found = ray.get(on_head.remote(ray.get_runtime_context().gcs_address), timeout=STATUS_TIMEOUT_S)
        if found is None:
            return None if kinds or is_autoscaler_v2() else []
        return _limits(found)
    except (ray.exceptions.RayError, LookupError, TypeError, ValueError):
        return None


def _configuration(gcs_address: str) -> dict[str, Any] | None:
    """Runs on the head: what its autoscaler was started with, if anything; None where it runs elsewhere."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            vocabulary = path.read_bytes().decode(errors="replace").split("\0")
            is_autoscaler = any(word.endswith("monitor.py") and "autoscaler" in word for word in vocabulary)
            if is_autoscaler and f"--gcs-address={gcs_address}" in vocabulary:  # other clusters may have a head here
                files = [word.removeprefix(_FLAG) for word in vocabulary if word.startswith(_FLAG)]
                return dict(importlib.import_module("yaml").safe_load(Path(files[0]).read_text())) if files else {}
    return None


def _limits(configuration: dict[str, Any]) -> list[NodeType] | None:
    if not configuration:
        return []
    if configuration["provider"]["type"] == "local":  # its machines are all of the head's kind, and still to come
        return None
    most = int(configuration["max_workers"])
    kinds = configuration["available_node_types"]
    brought = [kind for name, kind in kinds.items() if name != configuration["head_node_type"]]
    if not all(kind["resources"] for kind in brought):
        return None
    return [NodeType(kind["resources"], min(most, kind.get("max_workers", most))) for kind in brought]
