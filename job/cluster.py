"""Which Ray cluster, what it can hold, and Ray's own talk kept away."""

import contextlib
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator

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
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Raylet is terminated",  # with pages of its log, where a node died
    "RAY_worker_niceness": "0",  # else Ray's own housekeeping goes before training
}
# These concern Ray's processes on the nodes.
_ON_NODES = {
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # seconds to wait for a worker that hangs
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what cuBLAS needs to be reproducible
    "OMP_WAIT_POLICY": "PASSIVE",  # as in __init__
}
for _name, _value in (_QUIET | _ON_NODES).items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import torch  # noqa: E402

from job import autoscaler, placement  # noqa: E402
from job.config import Scale  # noqa: E402
from job.errors import UserError  # noqa: E402
from job.placement import Growth, Placement, Resources  # noqa: E402
from job.world import cores  # noqa: E402

LISTENS_WITHIN, REACHED_WITHIN = 10.0, 60.0  # seconds that a cluster may take to answer, and to be joined


def address() -> str:
    """The cluster that is asked for; empty for one of this job's own."""
    wanted = os.environ.get("RAY_ADDRESS", "")
    return "" if wanted == "local" else wanted


def connect(scale: Scale) -> Placement:
    """Connects to a cluster (``RAY_ADDRESS`` where it is set, else one of its own on this machine).

    Gives the workers' place on it; UserError where it can never hold them.
    """
    if address():
        return _joined(scale)[0]
    found = placement.on_this_machine(scale, cores(), torch.cuda.device_count())
    _start(max(cores(), found.max_workers * found.cpus_per_worker))
    return found


def connect_for_many(scale: Scale, runs: int) -> tuple[Placement, int]:
    """Connects as ``connect`` does; the place of one run, and how many of so many have room at once.

    0 asks for as many as there is room for, also on nodes that an autoscaler may bring.
    """
    if address():
        found, growth = _joined(scale)
        # Where an autoscaler's limits are not known, it can be asked for what the user asks for.
        all_workers = math.inf if growth is None and runs else found.room(nodes()) + found.room_to_come(growth or [])
        return found, int(max(1, min(all_workers // found.max_workers, runs or math.inf)))
    gpus = torch.cuda.device_count()
    found = placement.on_this_machine(scale, cores(), gpus)
    each = found.max_workers * found.cpus_per_worker
    room = runs or max(1, cores() // each)
    if found.use_gpu:
        room = min(room, gpus // found.max_workers)
    _start(each * room)
    return found, room


def _joined(scale: Scale) -> tuple[Placement, list[Growth] | None]:
    """The workers' place on the cluster that is asked for, and what its autoscaler may bring."""
    join(address())
    try:
        growth = autoscaler.growth()
        return placement.on_cluster(scale, nodes(), growth), growth
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


def join(where: str) -> None:
    """Connects to the cluster at an address; UserError where that cannot be."""
    if where != "auto":
        _check_that_something_listens(where)
    with _nothing_on_standard_error():
        error = _within(REACHED_WITHIN, lambda: _init(where))
    if error is not None:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"RAY_ADDRESS = {where}: {_why(reason)}")


def _check_that_something_listens(where: str) -> None:
    """Ray itself would try for a quarter of an hour."""
    host, colon, port = where.rpartition(":")
    if "://" in where or not (host and colon and port.isdigit()):
        raise UserError(
            f"RAY_ADDRESS = {where}: must be HOST:PORT of the cluster's head (6379 is usual), auto, or local; "
            "from elsewhere use ray job submit"
        )
    try:
        socket.create_connection((host, int(port)), LISTENS_WITHIN).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"RAY_ADDRESS = {where}: nothing answers there: {reason}; is the cluster up?") from None


def _init(where: str) -> None:
    ray.init(address=where, log_to_driver=False, logging_level="error", runtime_env={"env_vars": _ON_NODES})


def _within(seconds: float, action: Callable[[], None]) -> Exception | None:
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


def _why(reason: str) -> str:
    """What Ray says, with what helps."""
    if "version mismatch" in reason.lower():
        return f"{reason}; use the versions that the cluster has"
    if "failed to connect" in reason.lower():  # all that Ray says of a wrong token
        return f"{reason}; is Ray's head there, and is its token in RAY_AUTH_TOKEN or ~/.ray/auth_token?"
    return f"no cluster can be joined there: {reason}"


@contextlib.contextmanager
def _nothing_on_standard_error() -> Iterator[None]:
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


def nodes() -> list[Resources]:
    """What each living node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free() -> list[Resources]:
    """What is free on each living node."""
    return list(ray._private.state.available_resources_per_node().values())
