"""Checks that every node of a cluster can run workers: versions, storage, users' cells and GPUs.

The functions that run on a node travel with their code, so that a node without this package can report that.
They import nothing of this package before they have found it.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from job.cluster.resources import Placement
from job.errors import UserError
from job.storage import Folder

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROBE_TIMEOUT_S, GPU_QUERY_TIMEOUT_S = 60.0, 20.0
VERSIONS = ("torch", "ray", "pyarrow")
INSTALL = "install it there, use an image that has it, or ray job submit --working-dir"


@dataclass(frozen=True)
class NodeReport:
    """A node's resources, and what ``probe`` returned there, or why it did not return."""

    name: str
    resources: dict[str, float]
    metadata: dict[str, Any]
    error: str = ""


def probe_nodes(*arguments: Any) -> list[NodeReport]:
    """Runs ``probe`` with these arguments on all nodes at the same time. Omits nodes that die meanwhile."""
    function, calls = ray.remote(num_cpus=0, max_retries=0)(probe), {}
    for node_id in _alive_nodes():
        on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
        calls[node_id] = function.options(scheduling_strategy=on_node).remote(*arguments)
    ray.wait([*calls.values()], num_returns=len(calls), timeout=PROBE_TIMEOUT_S)
    return [_node_report(node, calls[node_id]) for node_id, node in _alive_nodes().items() if node_id in calls]


def _alive_nodes() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _node_report(node: dict[str, Any], call: Any) -> NodeReport:
    metadata, error = {}, ""
    try:
        metadata = ray.get(call, timeout=0)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(call, force=True)
        error = f"did not answer within {PROBE_TIMEOUT_S:.0f} s"
    except ray.exceptions.RayError as raised:
        error = " ".join(str(raised).split())[-200:]
    return NodeReport(node["NodeManagerAddress"], node["Resources"], metadata, error)


# --- on the node ---


def probe(storage: str, marker: str = "", cells: tuple[str, ...] = (), gpus: bool = False) -> dict[str, Any]:
    """Checks the machine on which it runs.

    Args:
        storage: the address of a folder
        marker: the name of a file in it that this machine should see; empty: do not touch the storage
        cells: values of ``model.cell``; those of users must be importable
        gpus: whether to query GPUs, which takes a second
    """
    package = importlib.util.find_spec("job")
    users_cells = [cell for cell in cells if ":" in cell]
    metadata = {name: _version(name) for name in VERSIONS} | {
        "python": platform.python_version(),
        "package": _digest(Path(package.origin).parent) if package and package.origin else "",
        "cells_missing": [cell for cell in users_cells if importlib.util.find_spec(re.split(r"[.:]", cell)[0]) is None],
    }
    if metadata["package"]:
        metadata |= _probe_storage(storage, marker)
    return metadata | (_probe_gpus() if gpus else {})


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest(folder: Path) -> str:
    """A hash of the package's sources, C included: they decide the bits of a reproducible run."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.[ch]") for path in folder.rglob(pattern)):
        total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _probe_storage(storage: str, marker: str) -> dict[str, Any]:
    """Whether the node sees the marker and why it cannot write, if so; the free bytes of a local disk."""
    folder = importlib.import_module("job.storage").Folder(storage)
    metadata: dict[str, Any] = {"seen": False, "write_error": "", "free": None}
    try:
        metadata["seen"] = bool(marker) and folder.has(marker)
        if metadata["seen"]:
            test_file = f"{marker}-{socket.gethostname()}"
            folder.write(test_file, b"")
            folder.remove(test_file)
        if folder.local_path is not None and folder.local_path.exists():
            metadata["free"] = shutil.disk_usage(folder.local_path).free
    except OSError as error:
        metadata["write_error"] = str(error).splitlines()[0]
    return metadata


def _probe_gpus() -> dict[str, Any]:
    """The name, free bytes and total bytes of each GPU, and the versions of its driver and of NCCL."""
    query = "--query-gpu=driver_version,name,memory.free,memory.total"
    command = [shutil.which("nvidia-smi") or "", query, "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=GPU_QUERY_TIMEOUT_S, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {"gpus": [], "driver": "", "nccl": ""}
    rows = [line.split(", ") for line in run.stdout.splitlines()]
    # A partitioned GPU shows no memory.
    gpus = [(name, *(int(mib) << 20 if mib.isdigit() else 0 for mib in memory)) for _, name, *memory in rows]
    with_cuda = importlib.import_module("torch").version.cuda
    nccl = ".".join(map(str, importlib.import_module("torch.cuda.nccl").version())) if with_cuda else ""
    return {"gpus": gpus, "driver": rows[0][0] if rows else "", "nccl": nccl}


# --- what a report means ---


def version_problem(node: NodeReport, local: dict[str, Any]) -> UserError | None:
    """The error if a node did not report this machine's Python, libraries and sources of this package.

    Args:
        local: what ``probe`` returned here
    """
    if node.error:
        return UserError(f"node {node.name}: {node.error}", "see ray status, or remove the node")
    for name in ("python", *VERSIONS):
        version = node.metadata[name]
        if version != local[name]:
            has = f"{name} {version}" if version else f"no {name}"
            return UserError(f"node {node.name} has {has}, this machine {local[name]}", "use one image on all nodes")
    if node.metadata["package"] != local["package"]:
        has = "another version of" if node.metadata["package"] else "not"
        return UserError(f"node {node.name} has {has} this package, job", INSTALL)
    return None


def cell_problem(node: NodeReport) -> UserError | None:
    """The error if a node cannot import a user's cell."""
    missing = node.metadata["cells_missing"]
    return UserError(f"node {node.name} cannot import model.cell = {missing[0]}", INSTALL) if missing else None


def storage_problem(node: NodeReport, storage: str, field: str = "run.storage") -> UserError | None:
    """The error if a node does not see the same storage as this machine, or cannot write to it."""
    if reason := node.metadata["write_error"]:
        return UserError(f"{field} = {storage}: node {node.name} cannot write there: {reason}", "grant access")
    if not node.metadata["seen"]:
        return UserError(
            f"{field} = {storage}: node {node.name} does not see files that this machine writes there",
            "give a folder that all nodes share, or an object store",
        )
    return None


def check_nodes(placement: Placement, storage: str, *cells: str, field: str = "run.storage") -> None:
    """Raises UserError if a node that has the resources for a worker could not run it."""
    folder = Folder.resolve(storage)
    with folder.probe_file(field) as marker:
        local = probe(folder.address, marker, cells)
        for node in probe_nodes(folder.address, marker, cells):
            if placement.capacity([node.resources]):
                error = version_problem(node, local) or cell_problem(node)
                error = error or storage_problem(node, folder.address, field)
                if error:
                    raise error
