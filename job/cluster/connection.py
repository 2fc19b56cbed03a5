"""Joins a Ray cluster or starts one, and determines how many workers it can hold."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import ray
import torch

from job.cluster import NODE_ENV_DEFAULTS
from job.cluster.autoscaler import query_autoscaler
from job.cluster.resources import Autoscaler, Placement, Resources, cluster_placement, local_placement
from job.config.schema import ScaleConfig
from job.distributed.context import available_cpus
from job.errors import UserError

TCP_TIMEOUT_S, INIT_TIMEOUT_S = 10.0, 60.0


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


def connect(scale: ScaleConfig) -> Placement:
    """Connects to the cluster at ``RAY_ADDRESS``, or starts one on this machine.

    Returns the workers' placement. Raises UserError if the cluster can never hold them.
    """
    if ray_address():
        return _join_and_place(scale)[0]
    placement = local_placement(scale, available_cpus(), torch.cuda.device_count())
    _start_cluster(max(available_cpus(), placement.max_workers * placement.cpus_per_worker))
    return placement


def connect_for_trials(scale: ScaleConfig, concurrent: int) -> tuple[Placement, int]:
    """Connects like ``connect``, for several runs at the same time.

    Args:
        scale: the workers of one run
        concurrent: the largest number of runs at the same time; 0: as many as the cluster can hold,
            including the nodes that an autoscaler can add, if its limits are known

    Returns:
        the placement of one run, and the number of runs at the same time
    """
    if ray_address():
        placement, autoscaler = _join_and_place(scale)
        if concurrent and not autoscaler.limits_known:
            return placement, concurrent
        capacity = placement.capacity(node_resources()) + placement.autoscaled_capacity(autoscaler)
        num_runs = max(1, capacity // placement.max_workers)
        return placement, min(num_runs, concurrent or num_runs)
    gpus = torch.cuda.device_count()
    placement = local_placement(scale, available_cpus(), gpus)
    cpus_per_run = placement.max_workers * placement.cpus_per_worker
    num_runs = concurrent or max(1, available_cpus() // cpus_per_run)
    if placement.use_gpu:
        num_runs = min(num_runs, gpus // placement.max_workers)
    _start_cluster(cpus_per_run * num_runs)
    return placement, num_runs


def _join_and_place(scale: ScaleConfig) -> tuple[Placement, Autoscaler]:
    join_cluster(ray_address())
    try:
        autoscaler = query_autoscaler()
        return cluster_placement(scale, node_resources(), autoscaler), autoscaler
    except UserError:
        ray.shutdown()
        raise


@contextlib.contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restores the handler after ``ray.init``: Ray installs one that prints a stack trace or ends the process."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@_keep_sigterm_handler()
def _start_cluster(num_cpus: int) -> None:
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="error")


@_keep_sigterm_handler()
def join_cluster(address: str) -> None:
    """Connects to the cluster at an address. Raises UserError if that fails or takes too long."""
    if address != "auto":
        _check_port(address)
    init = BackgroundTask(
        lambda: ray.init(
            address=address,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": NODE_ENV_DEFAULTS},
        )
    )
    with _suppress_stderr():
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
        raise UserError(f"RAY_ADDRESS = {address}: cannot connect: {reason}", "check that the cluster is up") from None


def _explain(reason: str) -> tuple[str, str]:
    """The problem and its remedy. Ray raises the same classes for all problems, so only the message differs."""
    if "version mismatch" in reason.lower():
        return reason, "use the versions that the cluster has"
    if "failed to connect" in reason.lower():  # also the only message for a wrong token
        return reason, "check that Ray's head is there and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    return f"cannot join a cluster: {reason}", ""


@contextlib.contextmanager
def _suppress_stderr() -> Iterator[None]:
    """Also for Ray's core, which writes to the file descriptor without Python."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(devnull)
        os.close(saved)


def node_resources() -> list[Resources]:
    """The total resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
