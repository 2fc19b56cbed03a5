"""What a cluster's nodes are like, asked on each of them before a run is begun there.

The question travels with its code, so a node without this package can say that it lacks it.
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
class ProbeRequest:
    """What is asked: whether a file is seen in the storage, and whether users' cells can be imported."""

    storage: str
    marker: str
    cells: tuple[str, ...]
    gpus: bool = False  # slower


@dataclass(frozen=True)
class NodeReport:
    """What a node answered; ``silent`` where it did not."""

    name: str
    resources: dict[str, float]
    metadata: dict[str, Any]
    silent: str = ""


def probe_nodes(question: ProbeRequest) -> list[NodeReport]:
    """Every living node's answer; of one that dies meanwhile there is none."""
    calls = {node_id: _asked_of(node_id, question) for node_id in _living()}
    ray.wait([*calls.values()], num_returns=len(calls), timeout=PROBE_TIMEOUT_S)
    return [_node(node, calls[node_id]) for node_id, node in _living().items() if node_id in calls]


def _living() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _asked_of(node_id: str, question: ProbeRequest) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    words = (question.storage, question.marker, question.cells, question.gpus)
    return ray.remote(num_cpus=0, max_retries=0)(_facts).options(scheduling_strategy=there).remote(*words)


def _node(node: dict[str, Any], call: Any) -> NodeReport:
    name = node["NodeManagerAddress"]
    try:
        return NodeReport(name, node["Resources"], ray.get(call, timeout=0))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(call, force=True)
        return NodeReport(name, node["Resources"], {}, f"gave no answer within {PROBE_TIMEOUT_S:.0f} s")
    except ray.exceptions.RayError as error:
        return NodeReport(name, node["Resources"], {}, " ".join(str(error).split())[-200:])


def probe_local(question: ProbeRequest) -> dict[str, Any]:
    """This machine's own answer."""
    return _facts(question.storage, question.marker, question.cells, question.gpus)


def _facts(storage: str, marker: str, cells: tuple[str, ...], gpus: bool) -> dict[str, Any]:
    """Runs on the node; nothing of this package is used before it is known to be there."""
    package = importlib.util.find_spec("job")
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "package": _digest(Path(package.origin).parent) if package and package.origin else "",
        "cells_missing": [
            cell for cell in cells if ":" in cell and importlib.util.find_spec(re.split(r"[.:]", cell)[0]) is None
        ],
    }
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    if found["package"]:
        found |= _storage(storage, marker)
    return found | (_gpus() if gpus else {})


def _digest(folder: Path) -> str:
    """Of the package's source."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.c") for path in folder.rglob(pattern)):
        total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _storage(storage: str, marker: str) -> dict[str, Any]:
    """Whether the storage is the same here as where the marker was written, can be written to, and has room."""
    folder = importlib.import_module("job.storage").Folder(storage)
    found: dict[str, Any] = {"seen": False, "writable": "", "free": None}
    try:
        found["seen"] = bool(folder.has(marker))
        if found["seen"]:
            folder.write(f"{marker}-{socket.gethostname()}", b"")
            folder.remove(f"{marker}-{socket.gethostname()}")
        if folder.local_path is not None and folder.local_path.exists():
            found["free"] = shutil.disk_usage(folder.local_path).free
    except OSError as error:
        found["writable"] = str(error).splitlines()[0]
    return found


def _gpus() -> dict[str, Any]:
    """The name, free bytes and total bytes of each GPU of this node, and the versions of its driver and of NCCL."""
    query = "--query-gpu=driver_version,name,memory.free,memory.total"
    try:
        command = [shutil.which("nvidia-smi") or "", query, "--format=csv,noheader,nounits"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=GPU_QUERY_TIMEOUT_S, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {"gpus": [], "driver": "", "nccl": ""}
    rows = [line.split(", ") for line in run.stdout.splitlines()]
    # A partitioned GPU shows no memory.
    gpus = [(name, *(int(mib) << 20 if mib.isdigit() else 0 for mib in memory)) for _, name, *memory in rows]
    with_cuda = importlib.import_module("torch").version.cuda
    nccl = ".".join(map(str, importlib.import_module("torch.cuda.nccl").version())) if with_cuda else ""
    return {"gpus": gpus, "driver": rows[0][0] if rows else "", "nccl": nccl}


Problem = tuple[str, str] | None  # what is wrong, and the remedy


def version_problem(node: NodeReport, mine: dict[str, Any]) -> Problem:
    """What keeps a node's Python, libraries and this package from being those of this machine."""
    for name in ("python", *VERSIONS):
        if node.metadata[name] != mine[name]:
            found = f"{name} {node.metadata[name]}" if node.metadata[name] else f"no {name}"
            return f"node {node.name} has {found}, and this machine {mine[name]}", "use one image on all nodes"
    if node.metadata["package"] != mine["package"]:
        has = "another version of" if node.metadata["package"] else "not"
        return f"node {node.name} has {has} this package, job", INSTALL
    return None


def storage_problem(node: NodeReport, storage: str) -> Problem:
    """What keeps a node from using the storage that this machine uses."""
    if node.metadata["writable"]:
        return f"run.storage = {storage}: node {node.name} cannot write there: {node.metadata['writable']}", "grant it"
    if not node.metadata["seen"]:
        return (
            f"run.storage = {storage}: node {node.name} does not see what this machine writes there",
            "give a folder that all nodes share, or an object store",
        )
    return None


def find_problem(node: NodeReport, mine: dict[str, Any], question: ProbeRequest) -> Problem:
    """What keeps a worker from running on a node; None where nothing does."""
    if node.silent:
        return f"node {node.name} {node.silent}", "see ray status, or remove the node"
    different = version_problem(node, mine)
    if different:
        return different
    if missing := node.metadata["cells_missing"]:
        return f"node {node.name} cannot import model.cell = {missing[0]}", INSTALL
    return storage_problem(node, question.storage)


def check_nodes(placement: Placement, storage: str, *cells: str) -> None:
    """UserError where a node on which a worker may run could not do its work."""
    folder = Folder.resolve(storage)
    with folder.probe_file() as marker:
        question = ProbeRequest(folder.address, marker, cells)
        mine = probe_local(question)
        for node in probe_nodes(question):
            problem = placement.capacity([node.resources]) and find_problem(node, mine, question)
            if problem:
                raise UserError(f"{problem[0]}: {problem[1]}")
