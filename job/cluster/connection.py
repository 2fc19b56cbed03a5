"""Which Ray cluster, what it can hold, and Ray's own talk kept away."""

import contextlib
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import ray
import torch

from job.cluster import NODE_ENV_DEFAULTS
from job.cluster.autoscaler import scalable_node_types
from job.cluster.resources import NodeType, Placement, Resources, cluster_placement, local_placement
from job.config.schema import ScaleConfig
from job.distributed.context import available_cpus
from job.errors import UserError

TCP_TIMEOUT_S, INIT_TIMEOUT_S = 10.0, 60.0  # seconds that a cluster may take to answer, and to be joined


def ray_address() -> str:
    """The cluster that is asked for; empty for one of this job's own."""
    wanted = os.environ.get("RAY_ADDRESS", "")
    return "" if wanted == "local" else wanted


def connect(scale: ScaleConfig) -> Placement:
    """Connects to a cluster (``RAY_ADDRESS`` where it is set, else one of its own on this machine).

    Gives the workers' place on it; UserError where it can never hold them.
    """
    if ray_address():
        return _joined(scale)[0]
    found = local_placement(scale, available_cpus(), torch.cuda.device_count())
    _start(max(available_cpus(), found.max_workers * found.cpus_per_worker))
    return found


def connect_for_trials(scale: ScaleConfig, runs: int) -> tuple[Placement, int]:
    """Connects as ``connect`` does; the place of one run, and how many of so many have room at once.

    0 asks for as many as there is room for, also on nodes that an autoscaler may bring.
    """
    if ray_address():
        found, growth = _joined(scale)
        # Where an autoscaler's limits are not known, it can be asked for what the user asks for.
        all_workers = (
            math.inf
            if growth is None and runs
            else found.room(living_nodes()) + found.autoscaled_capacity(growth or [])
        )
        return found, int(max(1, min(all_workers // found.max_workers, runs or math.inf)))
    gpus = torch.cuda.device_count()
    found = local_placement(scale, available_cpus(), gpus)
    each = found.max_workers * found.cpus_per_worker
    room = runs or max(1, available_cpus() // each)
    if found.use_gpu:
        room = min(room, gpus // found.max_workers)
    _start(each * room)
    return found, room


def _joined(scale: ScaleConfig) -> tuple[Placement, list[NodeType] | None]:
    """The workers' place on the cluster that is asked for, and what its autoscaler may bring."""
    join_cluster(ray_address())
    try:
        growth = scalable_node_types()
        return cluster_placement(scale, living_nodes(), growth), growth
    except UserError:
        ray.shutdown()
        raise


def _start(slots: int) -> None:
    ray.init(
        address="local",
        num_cpus=slots,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
    )


def join_cluster(where: str) -> None:
    """Connects to the cluster at an address; UserError where that cannot be."""
    if where != "auto":
        _check_that_something_listens(where)
    with _suppress_stderr():
        error = _run_with_timeout(INIT_TIMEOUT_S, lambda: _init(where))
    if error is not None:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"RAY_ADDRESS = {where}: {_explain(reason)}")


def _check_that_something_listens(where: str) -> None:
    """Ray itself would try for a quarter of an hour."""
    host, colon, port = where.rpartition(":")
    if "://" in where or not (host and colon and port.isdigit()):
        raise UserError(
            f"RAY_ADDRESS = {where}: must be HOST:PORT of the cluster's head (6379 is usual), auto, or local; "
            "from elsewhere use ray job submit"
        )
    try:
        socket.create_connection((host, int(port)), TCP_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"RAY_ADDRESS = {where}: nothing answers there: {reason}; is the cluster up?") from None


def _init(where: str) -> None:
    ray.init(address=where, log_to_driver=False, logging_level="error", runtime_env={"env_vars": NODE_ENV_DEFAULTS})


def _run_with_timeout(seconds: float, action: Callable[[], None]) -> Exception | None:
    """What an action raised, or a TimeoutError where it takes longer; it is not waited for then."""
    found: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"no answer within {seconds:.0f} s")
    return found[0] if found else None


def _explain(reason: str) -> str:
    """What Ray says, with what helps."""
    if "version mismatch" in reason.lower():
        return f"{reason}; use the versions that the cluster has"
    if "failed to connect" in reason.lower():  # all that Ray says of a wrong token
        return f"{reason}; is Ray's head there, and is its token in RAY_AUTH_TOKEN or ~/.ray/auth_token?"
    return f"no cluster can be joined there: {reason}"


@contextlib.contextmanager
def _suppress_stderr() -> Iterator[None]:
    """Ray's core writes to the file itself, not through Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def living_nodes() -> list[Resources]:
    """What each living node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_resources() -> list[Resources]:
    """What is free on each living node."""
    return list(ray._private.state.available_resources_per_node().values())
