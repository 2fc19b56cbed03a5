"""A run on Ray: the launcher that has Ray Train start the workers, and carries their events."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np

from job import cluster  # isort: skip  first: it sets what Ray reads when it is imported
import ray
import ray.util
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from job import probe
from job.config import Config
from job.driver import Follow, Wishes
from job.elastic import Frugal
from job.errors import RunFailed
from job.events import Event
from job.gradients import Signals
from job.mailbox import Mailbox, opened, sealed
from job.network import Networked
from job.placement import Placement, on_cluster
from job.record import Recorder
from job.screen import Screen
from job.storage import Folder
from job.trainer import Plan
from job.watch import Waiting, Watch
from job.worker import train_worker

POLL = 1.0  # seconds that a signal, or the end of Ray Train, may go unnoticed
PATIENCE = 10.0  # seconds for Ray to end in
RAY_FOLDER = "ray"  # Ray Train's own records; a run's truth is in its checkpoints
REQUESTER = "requester"  # the file in it with the name under which workers are asked for


@contextmanager
def launch(options: Config, screen: Screen) -> Iterator[Follow]:
    """A launcher for workers on a cluster: the one that is asked for, or one of the run's own."""
    placement = cluster.connect(options.scale)
    fits: list[threading.Thread] = []
    try:
        if placement.notice:
            screen.line(placement.notice)
        if cluster.address():
            probe.check_nodes(placement, options.run.storage, options.model.cell)
        with _launch(options, placement, fits) as follow:
            yield follow
    finally:
        # Ray must not be shut down under a thread that waits for it. One that waits for workers
        # which wait for each other ends with this process, and the cluster or job with it.
        if not any(fit.is_alive() for fit in fits):
            ray.shutdown()


@contextmanager
def launch_within(options: Config, screen: Screen) -> Iterator[Follow]:
    """A launcher for a process of the cluster itself, as a search's trial is; its workers' place was found before."""
    with _launch(options, on_cluster(options.scale, cluster.nodes(), None), []) as follow:
        yield follow


@contextmanager
def _launch(options: Config, placement: Placement, fits: list[threading.Thread]) -> Iterator[Follow]:
    """The launcher once a cluster is joined; ``fits`` gets the thread that is in Ray Train's hands."""
    _tell_ray_how_patient_to_be(options)

    def follow(plan: Plan, tokens: np.ndarray, recorder: Recorder, wishes: Wishes) -> None:
        following = _Following(plan, tokens, placement, recorder, wishes)
        fits.append(following.thread)
        following.to_the_end()

    try:
        # Ray prints pages of advice on each death of a worker; what matters comes as an event.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield follow
    finally:
        for fit in fits:
            fit.join(PATIENCE)


def _tell_ray_how_patient_to_be(options: Config) -> None:
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(options.scale.hang_timeout)
    if options.scale.min_workers < options.scale.max_workers:
        # For some time Ray counts on a node that has gone; fewer workers are tried after this.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")


def _saved_within(options: Config) -> float:
    """Seconds in which a group of workers that trains has saved; 0 where that goes by steps."""
    seconds = options.train.checkpoint_seconds
    return 2 * seconds if math.isfinite(seconds) else 0.0


def mailbox_here() -> Any:
    """A mailbox that lives and dies with this node, as its driver does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class _Trainer(TorchTrainer):
    """Ray's trainer with our word on how many workers there may be.

    And without an actor for Ray Data at each start of workers: a second or two on a small machine.
    """

    placement: Placement

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = Frugal(self.scaling_config, self.placement)
        return super()._initialize_and_run_controller(**options)

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)
        ]


class _Following:
    """One run of Ray Train, whose events the driver's main thread takes as they come."""

    def __init__(
        self, plan: Plan, tokens: np.ndarray, placement: Placement, recorder: Recorder, wishes: Wishes
    ) -> None:
        self.plan, self.placement, self.recorder, self.wishes = plan, placement, recorder, wishes
        self.mailbox = mailbox_here()
        self.trainer = self._trainer(ray.put(tokens))
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._fit, daemon=True)

    def _trainer(self, tokens: Any) -> TorchTrainer:
        options, placement = self.plan.config, self.placement
        elastic = placement.min_workers < placement.max_workers
        workers: Any = (placement.min_workers, placement.max_workers) if elastic else placement.max_workers
        task = {
            "plan": self.plan,
            "tokens": tokens,
            "mailbox": self.mailbox,
            "threads": placement.cpus_per_worker,
        }
        trainer = _Trainer(
            train_worker,
            train_loop_config=task,
            torch_config=Networked(timeout_s=math.ceil(options.scale.hang_timeout)),
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
                callbacks=[Watch(self.mailbox)],
            ),
        )
        trainer.placement = placement
        return trainer

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # told by the main thread
            self.error = error

    def to_the_end(self) -> None:
        """Takes events until the run is over; RunFailed where Ray ends it before."""
        _cancel_request_of_dead_driver(self.recorder.folder / RAY_FOLDER)
        self.recorder.folder.remove(RAY_FOLDER)
        (self.recorder.folder / RAY_FOLDER).write(REQUESTER, self.trainer.train_run_context.run_id.encode())
        self.thread.start()
        try:
            self._take_events()
            self.recorder.lease.check()
            self.recorder.folder.remove(RAY_FOLDER)
        except ray.exceptions.RayError as error:
            raise RunFailed(f"Ray ended: {_first_line(error)}") from None
        finally:
            self.mailbox.end.remote()

    def _collected(self) -> list[Event]:
        """What has come; waits a moment for it."""
        return [opened(letter) for letter in ray.get(self.mailbox.collect.remote(POLL))]

    def _take_events(self) -> None:
        waiting, asked = Waiting(self.placement, self.recorder.screen), False
        while not self.recorder.over:
            events = self._collected()
            for event in events:
                self.recorder.handle(event)
            if self.wishes.save:
                self.wishes.save = False
                ray.get(self.mailbox.order.remote(sealed(Signals(checkpoint=True))))
            if self.wishes.status and not self.recorder.standing:
                raise KeyboardInterrupt  # no worker stands that could save anything
            if self.wishes.status and not asked:
                ray.get(self.mailbox.order.remote(sealed(Signals(stop=True))))
                asked = True
            if not self.thread.is_alive() and not events and not self.recorder.over:
                raise RunFailed(f"Ray Train ended: {_first_line(self.error)}")
            waiting.look(standing=self.recorder.standing)
        if self.recorder.failed:  # parts that were written before may still be on their way
            for event in self._collected():
                self.recorder.handle(event)


def _cancel_request_of_dead_driver(folder: Folder) -> None:
    """Takes back what a dead driver asked of the cluster for its elastic workers.

    Ray would hold the dead run's resources for it for three minutes.
    """
    coordinator = "AutoscalingCoordinator"  # Ray's own actor, by the name that Ray gives it
    with contextlib.suppress(OSError, ValueError, ray.exceptions.RayError):
        requester = folder.read(REQUESTER, 100).decode()
        actor = ray.get_actor(coordinator, namespace=coordinator)
        ray.get(actor.cancel_request.remote(f"train-{requester}"), timeout=PATIENCE)


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip() if error else "without an error"
    return text.splitlines()[0] if text else type(error).__name__
