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

from job import cluster, onray  # isort: skip  first: they set what Ray reads when it is imported

# Ray Tune reads these when it starts. What a user has set stays.
_QUIET = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a trial's paths are those of the command
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails at once has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # its own records are not used
}
for _variable, _value in _QUIET.items():
    os.environ.setdefault(_variable, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402

from job import lease, parse, probe, runs, search, summary, trials  # noqa: E402
from job.attempt import Actor, Task  # noqa: E402
from job.config import Config  # noqa: E402
from job.driver import Wishes  # noqa: E402
from job.errors import RunFailed  # noqa: E402
from job.gradients import Signals  # noqa: E402
from job.mailbox import sealed  # noqa: E402
from job.placement import Placement  # noqa: E402
from job.screen import Screen  # noqa: E402
from job.search import Search  # noqa: E402
from job.steering import Asker, Ear, Stop, scheduler_of  # noqa: E402
from job.suggest import Suggester  # noqa: E402
from job.trials import Trials  # noqa: E402
from job.watch import Waiting  # noqa: E402
from job.worker import in_a_line  # noqa: E402

RAY_FOLDER = "ray"  # Ray Tune's own records
TRIES = 5  # how often a trial is taken up again after its process died with nothing new
LOOK = 0.2  # seconds between two looks at signals and the clock
KEPT = 5  # checkpoints of a trial that others may go on from


@dataclass(frozen=True)
class Place:
    """What Ray sets aside for a trial, and how many trials have room at once."""

    resources: dict[str, float]
    room: int
    workers: Placement


class Experiment(threading.Thread):
    """Ray Tune at work on what is left to do; the main thread is left to hear signals."""

    def __init__(self, known: Trials, place: Place, ear: Ear, stop: Stop, task: Task) -> None:
        super().__init__(daemon=True)
        self.known, self.place, self.ear, self.stop, self.task = known, place, ear, stop, task
        self.error: Exception | None = None

    def run(self) -> None:
        """Called by the thread."""
        try:
            self._run()
        except Exception as error:  # told by the main thread
            self.error = error

    def _run(self) -> None:
        known, wanted = self.known, self.known.search
        left = [{"number": trial.number, "point": trial.point} for trial in known if not trial.is_over]
        asker = Asker(known, Suggester(wanted.space, known.base.run.seed)) if wanted.searcher == "optuna" else None
        actor = tune.with_parameters(Actor, task=self.task)
        tune.run(
            tune.with_resources(actor, tune.PlacementGroupFactory([self.place.resources])),
            name=RAY_FOLDER,
            storage_path=known.folder.address,
            config={} if asker else {"trial": tune.grid_search(left)},
            search_alg=asker,
            num_samples=len(asker.left) if asker else 1,
            scheduler=scheduler_of(known, self.stop),
            # A population is compared as a whole; there the resources alone bound how many run at once.
            max_concurrent_trials=None if wanted.scheduler == "pbt" else self.place.room,
            reuse_actors=True,
            max_failures=TRIES,
            # The runs keep their own checkpoints; these go from winners to losers.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT, checkpoint_at_end=False),
            raise_on_failed_trial=False,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            callbacks=[self.ear],
            stop=self.stop,
            verbose=0,
        )


def _name(trial: Any) -> str:
    return trials.name_of(trial.config["trial"]["number"])


@contextmanager
def _cluster(base: Config, wanted: Search, screen: Screen) -> Iterator[tuple[Config, Place]]:
    """Connects; gives the configuration as the cluster can hold it, and a trial's place."""
    scale = replace(base.scale, cpus_per_worker=base.scale.cpus_per_worker or 1)
    # A trial without workers is itself the one that works.
    placement, room = cluster.connect_for_many(
        scale if scale.max_workers else replace(scale, workers=1), wanted.concurrent
    )
    try:
        if placement.notice:
            screen.line(placement.notice)
        if not scale.max_workers:
            _check_nodes(placement, base, wanted)
            yield replace(base, scale=scale), Place(placement.resources, room, placement)
            return
        if placement.max_workers < scale.max_workers:
            scale = replace(scale, workers=placement.max_workers)
        # All trials on the same kind of hardware, whatever nodes an autoscaler has brought by then.
        scale = replace(scale, accelerator="gpu" if placement.use_gpu else "cpu")
        # The workers have a place of their own. Who drives them takes a share of the head, so that
        # never more trials begin than have room for all their workers.
        _check_nodes(placement, base, wanted)
        share = math.floor(0.9 / room * 1e4) / 1e4
        yield replace(base, scale=scale), Place({"node:__internal_head__": share}, room, placement)
    finally:
        ray.shutdown()


def _check_nodes(placement: Placement, base: Config, wanted: Search) -> None:
    """UserError where a node of the cluster that is asked for could not run a trial."""
    if cluster.address():
        searched = wanted.space.domains.get("model.cell")
        probe.check_nodes(placement, base.run.storage, *(searched.corners if searched else [base.model.cell]))


def run(options: Config, wanted: Search, stem: str, screen: Screen) -> int:
    """Searches as configured, or goes on with what is there; gives the exit status."""
    folder, options = trials.choose(options, wanted, stem)
    if trials.is_finished(folder, options, wanted):
        screen.line(f"{folder} is finished; to search longer, raise search.trials")
        summary.show(Trials(folder, options, wanted), screen)
        return 0
    lease.refuse_unless_dead(folder, screen.line)
    wishes = Wishes()
    with wishes.heard():
        base = trials.check(options, wanted, folder)
        folder.check_writable()
        if wishes.status:
            return wishes.status
        if wanted.searcher == "optuna":
            Suggester(wanted.space, base.run.seed)  # tells where it is not installed
        with _cluster(base, wanted, screen) as (placed, place), wishes.heard():
            owned = lease.acquire(folder)
            try:
                folder.write(runs.SEARCH, f"{parse.to_toml(base)}\n{search.to_toml(wanted)}".encode())
                folder.remove(trials.BEST)
                known = Trials(folder, placed, wanted)
                if summary.left(known):
                    _search(known, place, owned, wishes, screen)
                if wishes.status:
                    screen.line(f"stopped; the same command goes on with {folder}")
                    return wishes.status
                owned.check()
                known = Trials(folder, base, wanted)  # as it stands on the disk
                summary.write(known)
                summary.show(known, screen)
                return 0
            finally:
                owned.release()


def _search(known: Trials, place: Place, owned: lease.Lease, wishes: Wishes, screen: Screen) -> None:
    """Has Ray Tune run what is left to do, and shows it, until all is done, time is up or a stop is wanted."""
    screen.line(summary.about(known, place.room))
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what matters comes through the ear
    ear = Ear(known)
    stop = Stop(ear)
    mailbox = onray.mailbox_here()
    known.folder.remove(RAY_FOLDER)
    experiment = Experiment(known, place, ear, stop, Task(known.base, known.search, known.folder, os.getcwd(), mailbox))
    waiting = Waiting(place.workers, screen)
    until = time.monotonic() + (60 * known.search.minutes or math.inf)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # Ray Tune's own talk
        experiment.start()
        while experiment.is_alive():
            experiment.join(LOOK)
            if not stop.wanted and (wishes.status or time.monotonic() > until):
                stop.wanted = True
                mailbox.order.remote(sealed(Signals(stop=True)))
            owned.check_now_and_then()
            ear.tell(screen)
            summary.progress(known, screen)
            waiting.look(standing=time.monotonic() - ear.heard < 2 * LOOK)
        ear.tell(screen)
    known.folder.remove(RAY_FOLDER)
    if experiment.error:
        raise RunFailed(f"Ray Tune ended: {in_a_line(experiment.error)}; the same command goes on")
    if stop.wanted and not wishes.status:
        waits = known.search.total - sum(trial.state in trials.ENDS for trial in known)
        screen.line(f"time is up with {waits} trials left; the same command goes on")
