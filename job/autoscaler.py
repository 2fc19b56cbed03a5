"""What a cluster's autoscaler may bring, which Ray itself does not tell."""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get

from job.placement import Growth

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PATIENCE = 30.0  # seconds for the head to answer
_REPORT = "__autoscaling_status"  # where Ray's autoscaler keeps its report
_FLAG = "--autoscaling-config="


def growth() -> list[Growth] | None:
    """Nothing where there is no autoscaler, None where there is one whose limits cannot be known."""
    kinds: dict[str, str] = {}
    with contextlib.suppress(ValueError, LookupError, TypeError):
        kinds = json.loads(_internal_kv_get(_REPORT) or "{}")["autoscaler_report"]["node_type_mapping"]
    # Without an autoscaler Ray takes each node for a type of its own, named after it.
    if all(kind == f"node_{node}" for node, kind in kinds.items()):
        return []
    try:
        on_head = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001}, max_retries=0)(_configuration)
        return _limits(ray.get(on_head.remote(), timeout=PATIENCE))
    except (ray.exceptions.RayError, LookupError, TypeError, ValueError):
        return None


def _configuration() -> dict[str, Any]:
    """Runs on the head: the file that the autoscaler was started with. On Kubernetes it runs elsewhere."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            files = [word.removeprefix(_FLAG) for word in words if word.startswith(_FLAG)]
            if files and any(word.endswith("monitor.py") for word in words):
                return dict(importlib.import_module("yaml").safe_load(Path(files[0]).read_text()))
    raise LookupError("no autoscaler runs here")


def _limits(configuration: dict[str, Any]) -> list[Growth]:
    most = int(configuration["max_workers"])
    return [
        Growth(kind["resources"], min(most, kind.get("max_workers", most)))
        for name, kind in configuration["available_node_types"].items()
        if name != configuration["head_node_type"]
    ]
