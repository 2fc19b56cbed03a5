"""A run on Ray: the launcher that has Ray Train start the workers, and carries their events."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray
import ray.util
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from job.cluster.connection import connect, living_nodes, ray_address
from job.cluster.event_channel import EventChannel, dumps, loads
from job.cluster.node_probe import check_nodes
from job.cluster.ray_extensions import (
    ElasticTorchTrainer,
    GlooInterfaceTorchConfig,
    WorkerGroupFailureCallback,
    cancel_autoscaler_request,
)
from job.cluster.resources import UNKNOWN_AUTOSCALER, Placement, cluster_placement
from job.cluster.train_worker import train_worker
from job.cluster.waiting import WaitingNotice
from job.config.schema import Config
from job.console import Console
from job.distributed.gradient_sync import ControlFlags
from job.errors import RunFailed
from job.run.recorder import Recorder
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.events import Event
from job.training.run_spec import RunSpec

POLL_INTERVAL_S = 1.0  # seconds that a signal, or the end of Ray Train, may go unnoticed
SHUTDOWN_TIMEOUT_S = 10.0  # seconds for Ray to end in
RAY_FOLDER = "ray"  # Ray Train's own records; a run's truth is in its checkpoints
AUTOSCALER_REQUESTER = (
    "requester"  # the file in it with Ray's identifier of the run, which names its autoscaler request
)


class RayLauncher:
    """Starts the workers by Ray Train: on the cluster at ``RAY_ADDRESS``, or on a local one that ends with the run."""

    def __init__(self) -> None:
        self.placement: Placement | None = None
        self.thread: threading.Thread | None = None  # runs Ray Train
        self.redirection = contextlib.ExitStack()

    def connect(self, config: Config, console: Console) -> None:
        """Connects to the cluster. Raises UserError if it can never place the workers or a node cannot run them."""
        self.placement = self._connect(config, console)
        _set_ray_timeouts(config)
        self.redirection.enter_context(_discard_stdout())

    def _connect(self, config: Config, console: Console) -> Placement:
        placement = connect(config.scale)
        if placement.notice:
            console.print(placement.notice)
        if ray_address():
            check_nodes(placement, config.run.storage, config.model.cell)
        return placement

    def run(self, spec: RunSpec, recorder: Recorder, stop_request: StopRequest) -> None:
        """Runs Ray Train in a thread and passes its workers' events to the recorder until the run is over.

        Raises RunFailed if Ray ends the run before.
        """
        assert self.placement
        ray_run = _RayRun(spec, self.placement, recorder, stop_request)
        ray_run.start()
        self.thread = ray_run.thread
        ray_run.wait()

    def close(self) -> None:
        """Waits a moment for Ray Train to end, and disconnects.

        Does not call ``ray.shutdown()`` while a thread is blocked in Ray. A thread stuck on deadlocked workers is a
        daemon and dies with this process, which also ends the local cluster or job.
        """
        if self.thread:
            self.thread.join(SHUTDOWN_TIMEOUT_S)
        self.redirection.close()
        if not (self.thread and self.thread.is_alive()):
            self._disconnect()

    def _disconnect(self) -> None:
        ray.shutdown()


class TrialLauncher(RayLauncher):
    """Starts the workers of a search's trial, whose process already belongs to a cluster that can place them."""

    def _connect(self, config: Config, console: Console) -> Placement:
        return cluster_placement(config.scale, living_nodes(), UNKNOWN_AUTOSCALER)

    def _disconnect(self) -> None:
        pass  # the connection is that of the trial's process


@contextmanager
def _discard_stdout() -> Iterator[None]:
    """Keeps off the terminal what Ray prints: pages of advice whenever a worker dies. Events carry what matters."""
    with open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        yield


def _set_ray_timeouts(config: Config) -> None:
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.scale.hang_timeout)
    if config.scale.min_workers < config.scale.max_workers:
        # For some time Ray counts on a node that has gone; fewer workers are tried after this.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")


def _saved_within(config: Config) -> float:
    """Seconds in which a group of workers that trains has saved; 0 where that goes by steps."""
    seconds = config.train.checkpoint_seconds
    return 2 * seconds if math.isfinite(seconds) else 0.0


def create_event_channel() -> Any:
    """Starts the channel on this node, so that it lives as long as its driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return EventChannel.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class _RayRun:
    """One run of Ray Train in a thread; the main thread takes its workers' events and handles signals."""

    def __init__(self, spec: RunSpec, placement: Placement, recorder: Recorder, stop_request: StopRequest) -> None:
        self.spec, self.placement, self.recorder, self.stop_request = spec, placement, recorder, stop_request
        self.event_channel = create_event_channel()
        self.trainer = self._trainer()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._fit, daemon=True)

    def _trainer(self) -> ElasticTorchTrainer:
        options, placement = self.spec.config, self.placement
        elastic = placement.min_workers < placement.max_workers
        workers: Any = (placement.min_workers, placement.max_workers) if elastic else placement.max_workers
        task = {
            "spec": ray.put(self.spec),
            "event_channel": self.event_channel,
            "threads": placement.cpus_per_worker,
        }
        return ElasticTorchTrainer(
            train_worker,
            train_loop_config=task,
            torch_config=GlooInterfaceTorchConfig(timeout_s=math.ceil(options.scale.hang_timeout)),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=placement.use_gpu,
                resources_per_worker=placement.resources,
                placement_strategy=placement.strategy,
                # Not before a checkpoint: else nodes that keep coming would keep a run from getting on.
                elastic_resize_monitor_interval_s=max(options.scale.hang_timeout, _saved_within(options)),
            ),
            run_config=RunConfig(
                name=RAY_FOLDER,
                storage_path=self.recorder.folder.address,
                failure_config=FailureConfig(max_failures=-1),
                logging_config=LoggingConfig(log_level="ERROR"),
                callbacks=[WorkerGroupFailureCallback(self.event_channel)],
            ),
            placement=placement,
        )

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # raised in the main thread
            self.error = error

    def start(self) -> None:
        """Starts Ray Train, after withdrawing what an earlier driver of this run had requested."""
        _cancel_request_of_dead_driver(self.recorder.folder / RAY_FOLDER)
        self.recorder.folder.remove(RAY_FOLDER)
        (self.recorder.folder / RAY_FOLDER).write(AUTOSCALER_REQUESTER, self.trainer.run_id.encode())
        self.thread.start()

    def wait(self) -> None:
        """Handles events until the run is over. Raises RunFailed if Ray ends it before."""
        try:
            self._handle_events()
            self.recorder.lease.check()
            self.recorder.folder.remove(RAY_FOLDER)
        except ray.exceptions.RayError as error:
            raise RunFailed(f"Ray ended: {_first_line(error)}") from None
        finally:
            self.event_channel.close.remote()

    def _poll_events(self) -> list[Event]:
        """Waits for events for at most ``POLL_INTERVAL_S``."""
        return [loads(payload) for payload in ray.get(self.event_channel.poll_events.remote(POLL_INTERVAL_S))]

    def _handle_events(self) -> None:
        waiting, stop_sent = WaitingNotice(self.placement, self.recorder.console), False
        while not self.recorder.over:
            events = self._poll_events()
            for event in events:
                self.recorder.handle(event)
            if self.stop_request.pop_checkpoint_request():
                ray.get(self.event_channel.send_command.remote(dumps(ControlFlags(checkpoint=True))))
            if self.stop_request.exit_code and not self.recorder.standing:
                raise KeyboardInterrupt  # no worker is running that could save anything
            if self.stop_request.exit_code and not stop_sent:
                ray.get(self.event_channel.send_command.remote(dumps(ControlFlags(stop=True))))
                stop_sent = True
            if not self.thread.is_alive() and not events and not self.recorder.over:
                raise RunFailed(f"Ray Train ended: {_first_line(self.error)}")
            waiting.poll(has_workers=self.recorder.standing)
        if self.recorder.failed:  # receipts of parts written before may still be on their way
            for event in self._poll_events():
                self.recorder.handle(event)


def _cancel_request_of_dead_driver(folder: Folder) -> None:
    """Withdraws the autoscaler request of an earlier driver of this run that died."""
    with contextlib.suppress(OSError, ValueError):
        cancel_autoscaler_request(folder.read(AUTOSCALER_REQUESTER, 100).decode())


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip() if error else "without an error"
    return text.splitlines()[0] if text else type(error).__name__
