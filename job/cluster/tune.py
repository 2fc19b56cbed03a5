"""A search on Ray Tune: trials side by side, each an ordinary run, and what is told of them.

Ray Tune places the trials, and its schedulers stop or move them. What is known of a trial is in its
run's folder, never in Ray Tune's own records: a search that is started again makes a new experiment
of what is left to do.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune

from job.cluster.connection import connect_for_trials, ray_address
from job.cluster.event_channel import dumps
from job.cluster.launcher import create_event_channel
from job.cluster.node_probe import check_nodes
from job.cluster.ray_extensions import HEAD_NODE_RESOURCE
from job.cluster.resources import Placement
from job.cluster.schedulers import OptunaSearcher, StopOnRequest, TrialCallback, build_scheduler
from job.cluster.train_worker import one_line
from job.cluster.trainable import TrialContext, TrialTrainable
from job.cluster.waiting import WaitingNotice
from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.config.toml import search_config_to_toml
from job.console import Console
from job.distributed.gradient_sync import ControlFlags
from job.errors import RunFailed
from job.run.lease import Lease, acquire_lease, wait_until_expired
from job.run.run_dir import SEARCH_FILE
from job.run.signals import StopRequest
from job.tuning.optuna_sampler import OptunaSampler
from job.tuning.report import banner, num_pending, print_results, show_progress, write_reports
from job.tuning.trials import (
    BEST_FILE,
    TERMINAL_STATES,
    Trials,
    check_search,
    is_trial_finished,
    resolve_search,
    trial_name,
)

RAY_FOLDER = "ray"  # Ray Tune's own records
MAX_TRIAL_FAILURES = 5  # how often a trial is taken up again after its process died with nothing new
STATUS_INTERVAL_S = 0.2  # seconds between two looks at signals and the clock
NUM_EXCHANGE_CHECKPOINTS = 5  # checkpoints of a trial that others may go on from


@dataclass(frozen=True)
class TrialResources:
    """What Ray sets aside for a trial, and how many trials have room at once."""

    resources: dict[str, float]
    room: int
    workers: Placement


class Experiment(threading.Thread):
    """Ray Tune at work on what is left to do; the main thread is left to hear signals."""

    def __init__(
        self, trials: Trials, place: TrialResources, ear: TrialCallback, stop: StopOnRequest, task: TrialContext
    ) -> None:
        super().__init__(daemon=True)
        self.trials, self.place, self.ear, self.stop, self.task = trials, place, ear, stop, task
        self.error: Exception | None = None

    def run(self) -> None:
        """Called by the thread."""
        try:
            self._run()
        except Exception as error:  # told by the main thread
            self.error = error

    def _run(self) -> None:
        trials, search = self.trials, self.trials.search
        left = [{"number": trial.number, "point": trial.point} for trial in trials if not trial.is_over]
        asker = (
            OptunaSearcher(trials, OptunaSampler(search.space, trials.base.run.seed))
            if search.searcher == "optuna"
            else None
        )
        actor = tune.with_parameters(TrialTrainable, task=self.task)
        tune.run(
            tune.with_resources(actor, tune.PlacementGroupFactory([self.place.resources])),
            name=RAY_FOLDER,
            storage_path=trials.folder.address,
            config={} if asker else {"trial": tune.grid_search(left)},
            search_alg=asker,
            num_samples=len(asker.left) if asker else 1,
            scheduler=build_scheduler(trials, self.stop),
            # A population is compared as a whole; there the resources alone bound how many run at once.
            max_concurrent_trials=None if search.scheduler == "pbt" else self.place.room,
            reuse_actors=True,
            max_failures=MAX_TRIAL_FAILURES,
            # The runs keep their own checkpoints; these go from winners to losers.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=NUM_EXCHANGE_CHECKPOINTS, checkpoint_at_end=False),
            raise_on_failed_trial=False,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            callbacks=[self.ear],
            stop=self.stop,
            verbose=0,
        )


def _name(trial: Any) -> str:
    return trial_name(trial.config["trial"]["number"])


@contextmanager
def _cluster(base: Config, search: SearchConfig, console: Console) -> Iterator[tuple[Config, TrialResources]]:
    """Connects; gives the configuration as the cluster can hold it, and a trial's place."""
    scale = replace(base.scale, cpus_per_worker=base.scale.cpus_per_worker or 1)
    # A trial without workers is itself the one that works.
    placement, room = connect_for_trials(scale if scale.max_workers else replace(scale, workers=1), search.concurrent)
    try:
        if placement.notice:
            console.print(placement.notice)
        if not scale.max_workers:
            _check_nodes(placement, base, search)
            yield replace(base, scale=scale), TrialResources(placement.resources, room, placement)
            return
        if placement.max_workers < scale.max_workers:
            scale = replace(scale, workers=placement.max_workers)
        # All trials on the same kind of hardware, whatever nodes an autoscaler has brought by then.
        scale = replace(scale, accelerator="gpu" if placement.use_gpu else "cpu")
        # The workers have a place of their own. Who drives them takes a share of the head, so that
        # never more trials begin than have room for all their workers.
        _check_nodes(placement, base, search)
        share = math.floor(0.9 / room * 1e4) / 1e4
        yield replace(base, scale=scale), TrialResources({HEAD_NODE_RESOURCE: share}, room, placement)
    finally:
        ray.shutdown()


def _check_nodes(placement: Placement, base: Config, search: SearchConfig) -> None:
    """UserError where a node of the cluster that is asked for could not run a trial."""
    if ray_address():
        searched = search.space.domains.get("model.cell")
        check_nodes(placement, base.run.storage, *(searched.endpoints if searched else [base.model.cell]))


def run_search(config: Config, search: SearchConfig, stem: str, console: Console) -> int:
    """Searches as configured, or goes on with what is there; gives the exit status."""
    folder, config = resolve_search(config, search, stem)
    if is_trial_finished(folder, config, search):
        console.print(f"{folder} is finished; to search longer, raise search.trials")
        print_results(Trials(folder, config, search), console)
        return 0
    wait_until_expired(folder, console.print)
    stop_request = StopRequest()
    with stop_request.heard():
        base = check_search(config, search, folder)
        folder.check_writable()
        if stop_request.status:
            return stop_request.status
        if search.searcher == "optuna":
            OptunaSampler(search.space, base.run.seed)  # tells where it is not installed
        with _cluster(base, search, console) as (placed, place), stop_request.heard():
            lease = acquire_lease(folder)
            try:
                folder.write(SEARCH_FILE, search_config_to_toml(base, search).encode())
                folder.remove(BEST_FILE)
                trials = Trials(folder, placed, search)
                if num_pending(trials):
                    _search(trials, place, lease, stop_request, console)
                if stop_request.status:
                    console.print(f"stopped; the same command goes on with {folder}")
                    return stop_request.status
                lease.check()
                trials = Trials(folder, base, search)  # as it stands on the disk
                write_reports(trials)
                print_results(trials, console)
                return 0
            finally:
                lease.release()


def _search(trials: Trials, place: TrialResources, lease: Lease, stop_request: StopRequest, console: Console) -> None:
    """Has Ray Tune run what is left to do, and shows it, until all is done, time is up or a stop is wanted."""
    console.print(banner(trials, place.room))
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what matters comes through the ear
    ear = TrialCallback(trials)
    stop = StopOnRequest(ear)
    event_channel = create_event_channel()
    trials.folder.remove(RAY_FOLDER)
    experiment = Experiment(
        trials, place, ear, stop, TrialContext(trials.base, trials.search, trials.folder, os.getcwd(), event_channel)
    )
    waiting = WaitingNotice(place.workers, console)
    until = time.monotonic() + (60 * trials.search.minutes or math.inf)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # Ray Tune's own talk
        experiment.start()
        while experiment.is_alive():
            experiment.join(STATUS_INTERVAL_S)
            if not stop.search and (stop_request.status or time.monotonic() > until):
                stop.search = True
                event_channel.send_command.remote(dumps(ControlFlags(stop=True)))
            lease.check_if_stale()
            ear.tell(console)
            show_progress(trials, console)
            waiting.poll(has_workers=time.monotonic() - ear.heard < 2 * STATUS_INTERVAL_S)
        ear.tell(console)
    trials.folder.remove(RAY_FOLDER)
    if experiment.error:
        raise RunFailed(f"Ray Tune ended: {one_line(experiment.error)}; the same command goes on")
    if stop.search and not stop_request.status:
        waits = trials.search.num_trials - sum(trial.state in TERMINAL_STATES for trial in trials)
        console.print(f"time is up with {waits} trials left; the same command goes on")
