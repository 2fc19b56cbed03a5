"""Runs on Ray: starts Ray Train in a thread and passes its workers' events to the recorder."""

import contextlib
import math
import os
from typing import Any

import ray
from ray.cloudpickle import loads
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from job.cluster import NODE_ENV_DEFAULTS, set_environment_defaults
from job.cluster.connection import BackgroundTask, connect, node_resources, ray_address
from job.cluster.event_channel import EventChannel
from job.cluster.local_cluster import check_processes, disconnect
from job.cluster.node_probe import check_nodes
from job.cluster.ray_extensions import (
    ElasticTorchTrainer,
    NodeAddressTorchConfig,
    WorkerGroupFailureCallback,
    cancel_autoscaler_request,
    dashboard_address,
    ended_processes,
)
from job.cluster.resources import Placement, cluster_placement
from job.cluster.train_worker import one_line, train_worker
from job.cluster.waiting import WaitingNotice
from job.config.schema import Config
from job.console import Console
from job.errors import RunFailed
from job.run.estimate import check_workers
from job.run.recorder import Recorder
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.events import Event
from job.training.run_spec import RunSpec

POLL_INTERVAL_S = 1.0  # until a signal or the end of Ray Train is noticed
SHUTDOWN_TIMEOUT_S = 10.0  # for Ray Train to end
RAY_FOLDER = "ray"  # Ray Train's own records, which are not used; removed when the run ends
RUN_ID_FILE = "requester"  # in that folder: Ray's identifier of the run, to withdraw its autoscaler request


class RayLauncher:
    """Starts the workers by Ray Train: on the cluster to which this process is connected, and which stays so, on the
    one at ``RAY_ADDRESS``, or on a local one that ends with the run.

    Args:
        in_trial: this process belongs to a cluster that can place the workers, as that of a search's trial
        shutdown_timeout_s: how long to wait for Ray Train to end; None: shortly, because this process ends, too
        is_local: whether all workers are on this machine; None: only on a local cluster that this run starts
    """

    def __init__(
        self, in_trial: bool = False, shutdown_timeout_s: float | None = None, is_local: bool | None = None
    ) -> None:
        self.in_trial, self.shutdown_timeout_s = in_trial, shutdown_timeout_s
        self.is_connected = ray.is_initialized()
        self.is_local = not (self.is_connected or ray_address()) if is_local is None else is_local
        self.placement: Placement | None = None
        self.fit: BackgroundTask | None = None
        self.stack = contextlib.ExitStack()

    def connect(self, spec: RunSpec, console: Console) -> None:
        """Connects to the cluster. Raises UserError if it can never place the workers or a node cannot run them."""
        config = spec.config
        set_environment_defaults()
        if not self.is_connected and not ray_address():
            check_workers(spec)
        if self.in_trial:
            self.placement = cluster_placement(config.scale, node_resources(), None)
        else:
            self.placement, _ = connect(config.scale, self.stack)
            cells = [] if config.model.cell_class else [config.model.cell]
            check_placement(self.placement, console, config.run.storage, *cells, is_connected=self.is_connected)
            if address := dashboard_address():
                console.print(f"Ray dashboard: {address}")
        _set_ray_timeouts(config)
        # Ray prints pages of advice whenever a worker dies. The events have what matters.
        devnull = self.stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        self.stack.enter_context(contextlib.redirect_stdout(devnull))

    def run(self, spec: RunSpec, recorder: Recorder, stop_request: StopRequest) -> None:
        """Runs Ray Train in a thread and passes its workers' events to the recorder until the run is over.

        Raises RunFailed if Ray or Ray Train ends before the run is over.
        """
        assert self.placement
        ray_folder = recorder.folder / RAY_FOLDER
        event_channel = create_event_channel()
        trainer = _build_trainer(
            spec, self.placement, recorder.folder, event_channel, self.is_connected and not self.in_trial
        )
        with contextlib.suppress(OSError, ValueError):  # left by a driver of this run that died
            cancel_autoscaler_request(ray_folder.read(RUN_ID_FILE, 100).decode())
        recorder.folder.remove(RAY_FOLDER)
        ray_folder.write(RUN_ID_FILE, trainer.run_id.encode())
        self.fit = BackgroundTask(trainer.fit)
        self.fit.start()
        try:
            self._handle_events(event_channel, recorder, stop_request)
            recorder.folder.remove(RAY_FOLDER)
        except ray.exceptions.RayError as error:
            raise RunFailed(f"Ray ended: {one_line(error)}") from None
        finally:
            event_channel.close.remote()

    def _handle_events(self, event_channel: Any, recorder: Recorder, stop_request: StopRequest) -> None:
        assert self.placement
        assert self.fit
        notice, stop_sent = WaitingNotice(self.placement, recorder.status.console), False
        while not recorder.is_done:
            check_processes()
            events = _poll_events(event_channel)
            for event in events:
                recorder.handle(event)
                stop_sent = _send_requests(event_channel, stop_request, stop_sent)  # there may be thousands of events
            if stop_request.exit_code and not recorder.status.has_workers:
                raise KeyboardInterrupt  # no worker is running that could save anything
            stop_sent = _send_requests(event_channel, stop_request, stop_sent)
            if not self.fit.is_alive() and not events and not recorder.is_done:
                raise RunFailed(
                    f"Ray Train ended: {one_line(self.fit.error) if self.fit.error else 'without an error'}"
                )
            notice.poll(has_workers=recorder.status.has_workers)
        if recorder.status.failed:  # receipts of parts written before may still be on their way
            for event in _poll_events(event_channel):
                recorder.handle(event)

    def close(self) -> None:
        """Waits a moment for Ray Train to end, and disconnects.

        Does not call ``ray.shutdown()`` while a thread is blocked in Ray. A thread stuck on deadlocked workers is a
        daemon and dies with this process, which also ends the local cluster or job.
        """
        if self.fit:
            self.fit.join(0 if ended_processes() else self.shutdown_timeout_s or SHUTDOWN_TIMEOUT_S)
        if not self.is_connected and not (self.fit and self.fit.is_alive()):
            disconnect()
        self.stack.close()


def check_placement(
    placement: Placement,
    console: Console,
    storage: str,
    *cells: str,
    is_connected: bool = False,
    field: str = "run.storage",
) -> None:
    """Prints the placement's notice. Raises UserError if a node of a cluster that exists cannot run workers.

    Args:
        placement: what ``connect`` returned
        console: shows the notice
        storage, cells: a folder in which the nodes write, and the values of ``model.cell``
        field: the field that names the folder
        is_connected: the cluster is not that at ``RAY_ADDRESS``, but one to which the caller was connected
    """
    if placement.notice:
        console.print(placement.notice)
    if is_connected or ray_address():
        check_nodes(placement, storage, *cells, field=field)


def _set_ray_timeouts(config: Config) -> None:
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.scale.hang_timeout)
    if config.scale.min_workers < config.scale.max_workers:
        # Ray counts on a dead node for some time. After this it tries with fewer workers.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")


def create_event_channel() -> Any:
    """Starts the channel on this node, so that it lives as long as its driver."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return EventChannel.options(scheduling_strategy=this_node).remote()  # type: ignore[attr-defined]


def _poll_events(event_channel: Any) -> list[Event]:
    call = event_channel.poll_events.remote(POLL_INTERVAL_S)
    while not ray.wait([call], timeout=2 * POLL_INTERVAL_S)[0]:
        check_processes()
    return [loads(payload) for payload in ray.get(call)]


def _send_requests(event_channel: Any, stop_request: StopRequest, stop_sent: bool) -> bool:
    """Sends a request for a checkpoint, and one to stop unless it was sent. Returns whether that was sent."""
    if stop_request.pop_checkpoint_request():
        ray.get(event_channel.request.remote(checkpoint=True))
    is_stopping = bool(stop_request.exit_code)
    if is_stopping and not stop_sent:
        ray.get(event_channel.request.remote(stop=True))
    return is_stopping


def _build_trainer(
    spec: RunSpec, placement: Placement, folder: Folder, event_channel: Any, sets_environment: bool
) -> ElasticTorchTrainer:
    config = spec.config
    elastic = placement.min_workers < placement.max_workers
    # A resize only after a checkpoint: otherwise a run whose nodes keep changing would make no progress.
    seconds = config.train.checkpoint_seconds
    resize_interval = max(config.scale.hang_timeout, 2 * seconds if math.isfinite(seconds) else 0.0)
    return ElasticTorchTrainer(
        train_worker,
        train_loop_config={
            "spec": ray.put(spec),
            "event_channel": event_channel,
            "threads": placement.cpus_per_worker,
        },
        torch_config=NodeAddressTorchConfig(timeout_s=math.ceil(config.scale.hang_timeout)),
        scaling_config=ScalingConfig(
            num_workers=(placement.min_workers, placement.max_workers) if elastic else placement.max_workers,
            use_gpu=placement.use_gpu,
            resources_per_worker=placement.resources,
            placement_strategy=placement.strategy,
            elastic_resize_monitor_interval_s=resize_interval,
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=folder.address,
            failure_config=FailureConfig(max_failures=-1),  # always restart the workers; RunStatus limits it
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[WorkerGroupFailureCallback(event_channel)],
            worker_runtime_env={"env_vars": NODE_ENV_DEFAULTS} if sets_environment else None,
        ),
        placement=placement,
    )
