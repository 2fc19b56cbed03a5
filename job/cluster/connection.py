"""Joins a Ray cluster or starts one, and determines the resources that it has and those that it can add."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from functools import partial

import ray
import torch

from job.cluster import NODE_ENV_DEFAULTS
from job.cluster.local_cluster import keep_sigterm_handler, start_local_cluster, suppress_stderr
from job.cluster.ray_extensions import is_autoscaled, read_cluster_config
from job.cluster.resources import Placement, Resources, cluster_placement, local_placement, parse_cluster_config
from job.config.run import ScaleConfig
from job.distributed.context import available_cpus
from job.errors import UserError

MAX_RUNS_PER_CORE = 16  # each is a process of some hundred megabytes
TCP_TIMEOUT_S, INIT_TIMEOUT_S, QUERY_TIMEOUT_S = 10.0, 60.0, 30.0


class BackgroundTask(threading.Thread):
    """Runs a function in a daemon thread and stores its exception."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(target=function, daemon=True)
        self.error: BaseException | None = None

    def run(self) -> None:
        """Called by the thread."""
        try:
            super().run()
        except BaseException as error:
            self.error = error


def ray_address() -> str:
    """The cluster's address from the environment. Empty to start a cluster on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def is_local(scale: ScaleConfig) -> bool:
    """Returns whether all workers are known to be on this machine."""
    return not (ray_address() and scale.max_workers)


def connect(scale: ScaleConfig, stack: contextlib.ExitStack, concurrent: int = 0) -> tuple[Placement, int]:
    """Uses the cluster to which this process is connected, connects to ``RAY_ADDRESS``, or starts one on this machine.

    Args:
        scale: the workers of one run
        stack: removes the files of a cluster on this machine when it is closed
        concurrent: the largest number of runs at the same time; 0: as many as the cluster can hold,
            including the nodes that an autoscaler can add, if its limits are known

    Returns:
        the placement of one run, and the number of runs at the same time

    Raises:
        UserError: the cluster can never hold the workers of one run, or this machine the number of runs
    """
    if ray.is_initialized():
        return _place(scale, concurrent)
    if ray_address():
        return _join_and_place(scale, concurrent)
    cores, gpus = available_cpus(), torch.cuda.device_count()
    if concurrent > cores * MAX_RUNS_PER_CORE:
        problem = f"search.concurrent = {concurrent}: more than {MAX_RUNS_PER_CORE} on each of the {cores} cores here"
        raise UserError(problem, "lower it")
    placement = local_placement(scale, cores, gpus)
    cpus_per_run = placement.max_workers * placement.cpus_per_worker
    num_runs = concurrent or max(1, cores // cpus_per_run)
    if placement.use_gpu:
        num_runs = max(1, min(num_runs, gpus // placement.max_workers))
    start_local_cluster(cpus_per_run * num_runs if concurrent else max(cores, cpus_per_run), stack)
    return placement, num_runs


def _join_and_place(scale: ScaleConfig, concurrent: int) -> tuple[Placement, int]:
    join_cluster(ray_address())
    try:
        return _place(scale, concurrent)
    except UserError:
        ray.shutdown()
        raise


def _place(scale: ScaleConfig, concurrent: int) -> tuple[Placement, int]:
    nodes, addable = node_resources(), query_autoscaler()
    placement = cluster_placement(scale, nodes, addable)
    if concurrent and addable is None:
        return placement, concurrent
    num_runs = max(1, placement.capacity(nodes + (addable or [])) // placement.max_workers)
    return placement, min(num_runs, concurrent or num_runs)


def join_cluster(address: str) -> None:
    """Connects to the cluster at an address. Raises UserError if that fails or takes too long."""
    if address != "auto":
        _check_port(address)
    environment = {"env_vars": NODE_ENV_DEFAULTS}
    options = {"log_to_driver": False, "logging_level": "error", "runtime_env": environment}
    init = BackgroundTask(partial(ray.init, address, **options))
    with keep_sigterm_handler(), suppress_stderr():
        init.start()
        init.join(INIT_TIMEOUT_S)
    error = TimeoutError(f"no answer within {INIT_TIMEOUT_S:.0f} s") if init.is_alive() else init.error
    if error:
        problem, remedy = _explain(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"RAY_ADDRESS = {address}: {problem}", remedy)


def _check_port(address: str) -> None:
    """Raises UserError if nothing listens at the address. Ray itself would retry for 15 minutes."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not (host and colon and port.isdigit()):
        raise UserError(
            f"RAY_ADDRESS = {address}: must be HOST:PORT of the cluster's head (6379 is usual), auto, or local",
            "from another network use ray job submit",
        )
    try:
        socket.create_connection((host, int(port)), TCP_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"RAY_ADDRESS = {address}: cannot connect: {reason}", "check that the cluster is up, or unset RAY_ADDRESS"
        ) from None


def _explain(reason: str) -> tuple[str, str]:
    """The problem and its remedy. Ray raises the same classes for all problems, so only the message differs."""
    if "version mismatch" in reason.lower():
        return reason, "use the versions that the cluster has"
    if "failed to connect" in reason.lower():  # also the only message for a wrong token
        return reason, "check that Ray's head is there and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    return f"cannot join a cluster: {reason}", ""


def node_resources() -> list[Resources]:
    """The total resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def query_autoscaler() -> list[Resources] | None:
    """The resources of each node that this cluster's autoscaler may add: none without one, None if unknown.

    Nodes that it has already added count again, because Ray's report of them lags. If capacity is overestimated,
    a run waits with a notice; if it were underestimated, the run would be refused.
    """
    if is_autoscaled() is False:
        return []
    try:
        cluster_config = read_cluster_config(QUERY_TIMEOUT_S)
        if cluster_config is not None:
            return parse_cluster_config(cluster_config)
        return None if is_autoscaled() else []
    except (ray.exceptions.RayError, LookupError, TypeError, ValueError):
        return None
