"""All uses of Ray's private API: subclasses, internal functions and internal names.

Each one states what Ray does, why that is not enough, and its source below
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/. The bounds on ray in pyproject.toml
exist because of this file; tests/test_ray_extensions.py checks every name and signature.
"""

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import ray.util
import torch.distributed as dist
import yaml
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private import services as ray_services
from ray._private import worker as ray_worker
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS, PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET
from ray._private.state import available_resources_per_node
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.autoscaler._private.util import format_readonly_node_type
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.cloudpickle import dumps
from ray.experimental.internal_kv import _internal_kv_get
from ray.train import ControllerError, ScalingConfig, WorkerGroupError
from ray.train._internal.session import _TrainingResult
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal import exceptions as train_errors
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, ResizingState, RestartingState
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as coordinator
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from job.cluster.resources import Placement, Resources
from job.cluster.train_worker import one_line, worker_device
from job.training.events import WorkerGroupEnded

LOOPBACK = "127.0.0.1"
SHARED_MEMORY, OBJECT_STORE_BYTES = "/dev/shm", 1 << 30  # noqa: S108  the size of a store outside of shared memory
ESSENTIAL_PROCESSES = (PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET)
HEAD_NODE_RESOURCE = HEAD_NODE_RESOURCE_NAME  # tasks that need some of it run on the head node
AUTOSCALER_SCRIPT, CLUSTER_FLAG, CONFIG_FLAG = "monitor.py", "--gcs-address=", "--autoscaling-config="
_SIOCGIFADDR = 0x8915  # netdevice(7), Linux


# --- a run's own cluster ---


def start_private_cluster(num_cpus: int, folder: str) -> None:
    """Starts a cluster on this machine that other users and machines cannot use, and connects to it.

    Ray replaces a loopback address by an outer one, listens on all interfaces then, and writes a token that it draws
    to ~/.ray/auth_token, readable for all. This cluster listens on loopback only, and its token is in the environment
    of its processes only.

    Args:
        num_cpus: the CPUs that it offers
        folder: for Ray's files

    Source: _private/services.py (resolve_ip_for_localhost), _private/worker.py (init),
    _private/authentication/authentication_token_setup.py
    """
    object_store: dict[str, Any] = {}
    if not os.access(SHARED_MEMORY, os.W_OK):  # Ray would fail or wait forever
        os.makedirs(folder)
        object_store = {"_plasma_directory": folder, "object_store_memory": OBJECT_STORE_BYTES}
    # An inherited port may be in use.
    with _environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_GCS_SERVER_PORT=""):
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        resolve, ray_services.resolve_ip_for_localhost = ray_services.resolve_ip_for_localhost, lambda host: host
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                _node_ip_address=LOOPBACK,
                _temp_dir=folder,
                **object_store,
            )
        finally:
            ray_services.resolve_ip_for_localhost = resolve


def shutdown() -> None:
    """Ends the connection to a cluster, and a cluster that this process has started.

    Ray's core would use the token of a run's own cluster for the next cluster that this process joins.
    """
    ray.shutdown()
    reset_authentication()


def reset_authentication() -> None:
    """Makes Ray's core read RAY_AUTH_MODE and the token again when this process connects to its next cluster.

    Source: _private/authentication/authentication_token_setup.py
    """
    if not ray.is_initialized():
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def ended_processes() -> list[str]:
    """The names of processes without which a cluster of this process cannot run, and which have ended.

    Ray notices that after up to a minute, and its core then ends this process without an error. Empty for a cluster
    that this process has only joined.

    Source: _private/node.py, _private/ray_constants.py
    """
    node = ray_worker._global_node
    return [name for name, _ in node.dead_processes() if name in ESSENTIAL_PROCESSES] if node else []


def dashboard_address() -> str:
    """Returns the address of the dashboard of the cluster to which this process is connected; empty without one.

    ``ray.init`` returns it only when it connects, and a program may have called that.

    Source: _private/node.py
    """
    node = ray_worker._global_node
    return f"http://{node.webui_url}" if node and node.webui_url else ""


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets environment variables within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


# --- Ray Train: the trainer ---


class ElasticTorchTrainer(TorchTrainer):
    """Ray's trainer with ``FreeResourceScalingPolicy`` and without the actor for Ray Data.

    Ray chooses both itself and has no argument for them. The actor starts with each worker group, even
    without datasets, and takes one to two seconds on a small machine.

    Source: train/v2/api/data_parallel_trainer.py, train/v2/_internal/callbacks/datasets.py and
    https://github.com/ray-project/ray/pull/63309
    """

    def __init__(self, *args: Any, placement: Placement, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.placement = placement

    @property
    def run_id(self) -> str:
        """Ray's identifier of this run, for ``cancel_autoscaler_request``."""
        return str(self.train_run_context.run_id)

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            kwargs["scaling_policy"] = FreeResourceScalingPolicy(self.scaling_config, self.placement)
        return super()._initialize_and_run_controller(**kwargs)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]


class FreeResourceScalingPolicy(ElasticScalingPolicy):
    """Ray's elastic policy, limited to resources that are free.

    Ray counts what the nodes have, whether or not other jobs use it. It would stop a healthy worker group
    to grow onto a node that other jobs occupy, and the larger group could never start.

    Source: train/v2/_internal/execution/scaling_policy/elastic.py
    """

    def __init__(self, scaling_config: ScalingConfig, placement: Placement) -> None:
        super().__init__(scaling_config)
        self.placement = placement
        self.start_pending = False  # a group was requested and has not run since
        self.current_workers: int | None = None  # workers whose resources this run holds; None: no limit

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Called by Ray before a group starts. Not limited the first time: an old group may still hold resources."""
        self.current_workers = 0 if self.start_pending else None
        decision = super().make_decision_for_non_running_worker_group()
        self.start_pending = self.start_pending or isinstance(decision, ResizeDecision)
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Called by Ray while a group trains."""
        self.start_pending, self.current_workers = False, worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        count = super()._count_possible_workers(reserved_resources)
        if self.current_workers is None:
            return count
        return min(count, self.current_workers + self.placement.capacity(free_resources()))


class WorkerGroupFailureCallback(ControllerCallback):
    """Reports each end of a worker group to the driver, from Ray's controller.

    Ray's public UserCallback is called when workers fail, but not when they cannot be started.

    Source: train/v2/_internal/execution/callback.py, train/v2/_internal/execution/controller/state.py
    """

    def __init__(self, event_channel: Any) -> None:
        self.event_channel = event_channel
        self.sequence = itertools.count()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called by Ray at each change of the controller's state. Posts an event if the worker group ended."""
        if isinstance(current_state, RestartingState | ReschedulingState | ResizingState):
            error = getattr(current_state, "training_failed_error", None)  # a resize has none
            event = WorkerGroupEnded("", _describe_failure(error))
            self.event_channel.post.remote("controller", next(self.sequence), dumps(event))


def _describe_failure(error: Exception | None) -> str:
    """The cause of a failure. Empty after a resize, and if resources for the workers were not free in time."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, failure = min(error.worker_failures.items())
        if isinstance(
            failure, train_errors.WorkerHealthCheckFailedError
        ):  # wraps the error of a worker that was killed
            failure = failure.health_check_failure
        return f"worker {rank}: {one_line(failure)}"
    failure = error.controller_failure if isinstance(error, ControllerError) else error
    if failure is None or isinstance(failure, train_errors.WorkerGroupStartupTimeoutError):
        return ""
    return one_line(failure.__cause__ or failure)


# --- Ray Train: torch.distributed ---


class _NodeAddressBackend(_TorchBackend):
    """Sets up torch.distributed on the address by which each node joined the cluster, and retries.

    Ray's own lets torch's store listen on all interfaces, and gloo on the address that the host's own name resolves
    to. On many machines that is loopback, which workers on other hosts cannot reach
    (https://github.com/ray-project/ray/issues/37461); on others it is an outer one, although the cluster is local.

    A worker may die during rendezvous. Ray retries only on WorkerGroupStartupFailedError, and does not tear
    down the failed group, so its resources would block the next one.

    Source: train/torch/config.py; for the shutdown Ray has fixed the same in
    https://github.com/ray-project/ray/pull/63143
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        timeout = timedelta(seconds=backend_config.timeout_s)
        try:
            host, port = worker_group.execute_single(0, _start_store, timeout)
            devices = worker_group.execute(_device_of_worker)
            has_gpus_of_their_own = None not in devices and len(set(devices)) == len(devices)
            backend = "nccl" if has_gpus_of_their_own else "gloo"  # NCCL refuses workers that share a GPU
            worker_group.execute(_join_process_group, backend, host, port, timeout)
        except ray.exceptions.RayTaskError as error:
            worker_group.abort()
            cause = error.cause or error
            raise train_errors.WorkerGroupStartupFailedError("the workers could not connect to each other") from cause


class NodeAddressTorchConfig(TorchConfig):
    """Ray's configuration of torch.distributed, with ``_NodeAddressBackend``."""

    @property
    def backend_cls(self) -> type[_NodeAddressBackend]:
        """The class that Ray calls when a worker group starts."""
        return _NodeAddressBackend


_stores: list[Any] = []  # of this worker; a store ends with its object


def _start_store(timeout: timedelta) -> tuple[str, int]:
    """Starts torch's store on rank 0. Returns its address and port."""
    host = ray.util.get_node_ip_address()
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    descriptor = listener.detach()
    _stores.append(TCPStore(host, port, None, True, timeout, False, master_listen_fd=descriptor))
    return host, port


def _device_of_worker() -> tuple[str, str] | None:
    """The node of a worker and Ray's name of its GPU there; None if torch computes on the CPU."""
    return (ray.util.get_node_ip_address(), str(ray.get_gpu_ids())) if worker_device().type == "cuda" else None


def _join_process_group(backend: str, host: str, port: int, timeout: timedelta) -> None:
    """Starts torch.distributed on a worker, with the store of rank 0."""
    address = ray.util.get_node_ip_address()
    if name := _interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if address == LOOPBACK:  # the user's variables are meant for a cluster
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
    context = ray.train.get_context()
    dist.init_process_group(
        backend,
        store=TCPStore(host, port, timeout=timeout),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timeout,
    )


def _interface_of(address: str) -> str | None:
    """The network interface with an IPv4 address. None if there is none, or this is not Linux."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(query, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # no address, or not Linux
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


# --- Ray Tune ---

# A checkpoint of a trial with the metrics of its report, which Trainable.save returns and Trainable.restore takes.
# Source: tune/trainable/trainable.py
TrainingResult = _TrainingResult


# --- the cluster's resources ---


def free_resources() -> list[Resources]:
    """The free resources of each node that is alive.

    Ray's public ``available_resources`` has only their sum over all nodes. Source: _private/state.py
    """
    return list(available_resources_per_node().values())


def workers_are_placed() -> bool:
    """Whether Ray has reserved resources for workers of this job, which are then starting.

    Placement groups have no owner in Ray's public API; the end of an identifier is the job's.
    The group of a trial's driver has no CPUs.

    Source: util/placement_group.py, includes/unique_ids.pxi
    """
    job_id = ray.get_runtime_context().get_job_id()
    return any(
        group["state"] == "CREATED" and "CPU" in next(iter(group["bundles"].values()))
        for group_id, group in ray.util.placement_group_table().items()
        if group_id.endswith(job_id)
    )


def is_autoscaled() -> bool | None:
    """Whether an autoscaler adds nodes to this cluster. None if nothing has been reported.

    Ray has no public API for it. Without an autoscaler, Ray reports each node as a node type of its own.

    Source: autoscaler/_private/monitor.py, autoscaler/_private/readonly/node_provider.py
    """
    if is_autoscaler_v2():
        return True
    with contextlib.suppress(ValueError, LookupError, TypeError):
        node_types = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS))["autoscaler_report"]["node_type_mapping"]
        if node_types:
            return any(node_type != format_readonly_node_type(node) for node, node_type in node_types.items())
    return None


def read_cluster_config(timeout_s: float) -> dict[str, Any] | None:
    """The configuration of the autoscaler, from the head node. Empty if it has none, None if it runs elsewhere.

    Ray has no API for the autoscaler's limits. Its process has the configuration file as an argument.

    Source: _private/services.py, start_monitor
    """

    # A nested function travels with its code: the head may not have this package.
    def read(gcs_address: str) -> dict[str, Any] | None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                arguments = path.read_bytes().decode(errors="replace").split("\0")
                is_autoscaler = any(word.endswith(AUTOSCALER_SCRIPT) and "autoscaler" in word for word in arguments)
                # The heads of other clusters may run on the same machine.
                if is_autoscaler and CLUSTER_FLAG + gcs_address in arguments:
                    files = [word.removeprefix(CONFIG_FLAG) for word in arguments if word.startswith(CONFIG_FLAG)]
                    return dict(yaml.safe_load(Path(files[0]).read_text())) if files else {}
        return None

    on_head = ray.remote(num_cpus=0, resources={HEAD_NODE_RESOURCE: 0.001}, max_retries=0)(read)
    return ray.get(on_head.remote(ray.get_runtime_context().gcs_address), timeout=timeout_s)


def cancel_autoscaler_request(run_id: str) -> None:
    """Withdraws the request for resources of a run whose driver died.

    Ray lets it expire after three minutes. Until then the autoscaler holds the resources for the dead run.

    Source: train/v2/_internal/execution/scaling_policy/autoscaling_coordinator_client.py
    """
    coordinator.TrainAutoscalingCoordinatorClient(f"train-{run_id}").cancel_resource_request()
