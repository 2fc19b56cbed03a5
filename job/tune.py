"""A search on Ray Tune: trials side by side, each an ordinary run, and what is told of them.

Ray Tune places the trials, and its schedulers stop or move them. What is known of a trial is in its
run's folder, never in Ray Tune's own records: a search that is started again makes a new experiment
of what is left to do.
"""

import contextlib
import logging
import math
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGTERM
from types import SimpleNamespace
from typing import Any

import numpy as np

from job import cluster, inprocess, onray  # isort: skip  first: they set what Ray reads when it is imported

# Ray Tune reads these when it starts.
os.environ |= {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a trial's paths are those of the command
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails at once has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # its own records are not used
}

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from job import checkpoint, driver, events, lease, parse, runs, search, summary, trials
from job.config import Config
from job.driver import Follow, Launcher, Wishes
from job.errors import Diverged, RunFailed, UserError
from job.gradients import Signals
from job.record import Recorder
from job.screen import Screen
from job.search import Search, Space
from job.storage import Folder
from job.suggest import Suggester
from job.trainer import Plan
from job.trials import Trial, Trials
from job.worker import in_a_line

RAY_FOLDER = "ray"  # Ray Tune's own records
TRIES = 5  # how often a trial is taken up again after its process died
LOOK = 0.2  # seconds between two looks at signals and the clock
KEPT = 5  # checkpoints of a trial that others may go on from
BEST_OF = 3  # a trial that survives a rung of ASHA is among the best third
PERTURBATIONS = 8  # how often population-based training compares, over a run


@dataclass(frozen=True)
class Task:
    """What all trials share."""

    base: Config
    search: Search
    folder: Folder
    mailbox: Any  # brings the order to stop


# --- one trial, in an actor of its own ---------------------------------------------------------


class Actor(tune.Trainable):
    """Runs one trial after another: each an ordinary run, which waits at each report for the word to go on."""

    def setup(self, config: dict[str, Any], task: Task) -> None:
        """Called by Ray Tune once."""
        self.task = task
        self.attempt: Attempt | None = None
        self.told_to_stop = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the search's driver is gone, and soon this process
            ray.get(self.task.mailbox.orders_after.remote(0))
            self.told_to_stop = True
            if self.attempt:
                self.attempt.ask_to_stop()

    @property
    def options(self) -> Config:
        """The run's configuration; the trial is known by its name, since its point may be another's."""
        return trials.options_of(self.task.base, self.task.folder, int(self.trial_name), self.config["trial"]["point"])

    @property
    def place(self) -> Folder:
        """The run's folder."""
        return self.task.folder / trials.RUNS / self.trial_name

    def step(self) -> dict[str, Any]:
        """Goes on to the next report."""
        if self.attempt is None:
            self.attempt = Attempt(self.options, self.place, self.task.search)
            if self.told_to_stop:
                self.attempt.ask_to_stop()
        return self.attempt.next_report()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copies the checkpoint of the last report, for the trials that will go on from it."""
        assert self.attempt and self.attempt.recorder
        checkpoint.copy(self.attempt.recorder.committed[-1], Folder(checkpoint_dir))

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        """Makes a checkpoint, this trial's or another's, the one that the run goes on from."""
        adopt(Folder(checkpoint_dir), self.place, self.options)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends this trial's run; the actor takes another."""
        self.cleanup()
        return True

    def cleanup(self) -> None:
        """Ends the run, with a checkpoint, and whatever it has started."""
        if self.attempt:
            self.attempt.end()
            self.attempt = None


def adopt(source: Folder, place: Folder, options: Config) -> None:
    """Has the run in ``place`` go on from the one checkpoint in ``source``, with these options.

    Whatever is interrupted, the run goes on from its own last checkpoint or from this one.
    """
    (name,) = source.names()
    checkpoint.copy(checkpoint.read_manifest(source, name), place / "checkpoints")
    for other in (place / "checkpoints").names():
        if other != name:
            (place / "checkpoints" / other).remove(checkpoint.MANIFEST)
            (place / "checkpoints").remove(other)
    place.write(runs.CONFIG, parse.to_toml(options).encode())


class Attempt:
    """A trial's run in a thread; it reports when the checkpoint of an epoch is whole, and waits there."""

    def __init__(self, options: Config, place: Folder, wanted: Search) -> None:
        self.options, self.place, self.search = options, place, wanted
        self.reports: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self.may_go_on = threading.Semaphore(0)
        self.waits = self.ending = self.stop_wanted = False
        self.recorder: Recorder | None = None
        self.wishes: Wishes | None = None
        self.row: dict[str, Any] | None = None  # that waits for its checkpoint
        self.told = 0  # the step of the last report
        self.thread = threading.Thread(target=self._drive, daemon=True)

    # --- called by Ray Tune, in the actor's main thread ---

    def next_report(self) -> dict[str, Any]:
        """Lets the run go on, and waits for its next report; raises what ended it unforeseen."""
        if not self.thread.is_alive():
            self.thread.start()
        else:
            self.may_go_on.release()
        found = self.reports.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def ask_to_stop(self) -> None:
        """Has the run save and stop at its next step."""
        self.stop_wanted = True
        if self.wishes:
            self.wishes.status = 128 + SIGTERM

    def end(self) -> None:
        """Stops the run, where it is not over, and waits until it is."""
        self.ending = True
        self.ask_to_stop()
        self.may_go_on.release()
        if self.thread.ident:
            self.thread.join()

    # --- in the run's thread ---

    def _drive(self) -> None:
        try:
            self.reports.put({"done": True, **self._outcome()})
        except BaseException as error:  # told by the main thread, and tried again by Ray Tune
            self.reports.put(error)

    def _outcome(self) -> dict[str, str]:
        if self.search.scheduler == "asha":
            self._recall()
        if self.ending:
            return {"state": "interrupted"}
        launch = onray.launch if self.options.scale.max_workers else inprocess.launch
        try:
            self._wait_until_free()
            with open(os.devnull, "w") as nowhere:
                status = driver.run(self.options, "", Screen(nowhere), self._watched(launch))
        except Diverged as error:
            return {"state": "diverged", "why": _short(error)}
        except UserError as error:
            return {"state": "failed", "why": _short(error)}
        return {"state": "interrupted" if status else "finished"}

    def _recall(self) -> None:
        """Reports again what an earlier start of the search has seen, for the scheduler."""
        for row in trials.rows(self.place):
            if not self.ending:
                self._report(row)

    def _wait_until_free(self) -> None:
        """A driver of this run that is dying, or died with its node, is waited for."""
        until = time.monotonic() + lease.SILENCE + 2 * lease.BEAT
        while not self.stop_wanted and time.monotonic() < until:
            try:
                return lease.refuse_if_alive(self.place)
            except UserError:
                time.sleep(0.5)

    def _watched(self, launch: Launcher) -> Launcher:
        """The launcher, with its recorder watched and its wishes within reach."""

        @contextmanager
        def watched(options: Config, screen: Screen) -> Iterator[Follow]:
            with launch(options, screen) as follow:

                def followed(plan: Plan, tokens: np.ndarray, recorder: Recorder, wishes: Wishes) -> None:
                    self.recorder, self.wishes = recorder, wishes
                    recorder.watch = self._watch
                    if self.stop_wanted:
                        self.ask_to_stop()
                    follow(plan, tokens, recorder, wishes)

                yield followed

        return watched

    def _watch(self, event: events.Event) -> None:
        assert self.recorder
        if isinstance(event, events.Row) and event.attempt == self.recorder.attempt:
            if trials.score(event.row, self.search.metric) is not None:
                self.row = event.row
        elif self.row and self.recorder.committed and self.recorder.committed[-1].step == self.row["step"]:
            row, self.row = self.row, None
            self._report(row)

    def _report(self, row: dict[str, Any]) -> None:
        """Tells Ray Tune, once for each step, and waits for its word."""
        value = trials.score(row, self.search.metric)
        if value is None or row["step"] <= self.told or self.ending:
            return
        self.told = row["step"]
        self.reports.put({"epoch": row["epoch"], "step": row["step"], "score": value})
        self.may_go_on.acquire()


def _short(error: Exception) -> str:
    """What went wrong, without what the run's own command would say of going on."""
    return str(error).partition(";")[0]


# --- the search's driver -----------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """What Ray sets aside for a trial, and how many trials have room at once."""

    resources: dict[str, float]
    room: int


class _Kept:
    """Stays in the driver: Ray Tune would write it into its own records, which nobody reads."""

    def __reduce__(self) -> Any:
        return (object, ())


class Ear(_Kept, tune.Callback):
    """Hears from Ray Tune how trials begin, get on and end."""

    def __init__(self, known: Trials) -> None:
        self.known = known
        self.running: set[int] = set()
        self.ended: queue.SimpleQueue[Trial] = queue.SimpleQueue()  # for the main thread to tell of

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """An actor takes a trial."""
        self.running.add(int(str(trial)))
        self.known.begin(int(str(trial)), trial.config["trial"]["point"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports."""
        if "score" in result:
            self.known.report(int(str(trial)), result["epoch"], result["score"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended by itself, or was stopped by the scheduler, which leaves no state."""
        result = trial.last_result
        self._end(trial, result.get("state", "stopped"), result.get("why", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has died too often."""
        self._end(trial, "failed", _last_line(trial.error_file))

    def _end(self, trial: Any, state: str, why: str) -> None:
        number = int(str(trial))
        self.running.discard(number)
        if state == "interrupted":
            return
        self.known.end(number, state, why)
        self.ended.put(self.known.found[number])

    def tell(self, screen: Screen) -> None:
        """A line for each trial that has ended."""
        while not self.ended.empty():
            screen.line(summary.line(self.known, self.ended.get()))


def _last_line(file: str | None) -> str:
    """The end of a traceback, which says what went wrong."""
    with contextlib.suppress(OSError, TypeError, IndexError):
        return [line for line in Path(str(file)).read_text().splitlines() if line.strip()][-1].strip()[:200]
    return "its process died"


class Stop(_Kept, tune.Stopper):
    """Ends the search once it is wanted, and the trials that run have saved."""

    def __init__(self, ear: Ear) -> None:
        self.ear, self.wanted = ear, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped by itself."""
        return False

    def stop_all(self) -> bool:
        """Asked by Ray Tune again and again."""
        return self.wanted and not self.ear.running


class Asker(_Kept, Searcher):
    """Has a model choose the points; trials that were begun before come first."""

    def __init__(self, known: Trials, suggester: Suggester) -> None:
        super().__init__()
        self.known, self.suggester = known, suggester
        self.numbers: dict[str, int] = {}
        before = list(known)
        for trial in before:
            suggester.recall(trial.number, trial.point)
            if trial.is_over:
                suggester.tell(trial.number, _told(known, trial))
        new = [number for number in range(known.search.total) if number not in known.found]
        self.left = [trial.number for trial in before if not trial.is_over] + new

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial."""
        if not self.left:
            return str(Searcher.FINISHED)
        number = self.numbers[trial_id] = self.left.pop(0)
        begun = self.known.found.get(number)
        return {"trial": {"number": number, "point": begun.point if begun else self.suggester.ask(number)}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended."""
        number = self.numbers.pop(trial_id)
        if (result or {}).get("state") != "interrupted":
            self.suggester.tell(number, None if error else _told(self.known, self.known.found[number]))


def _told(known: Trials, trial: Trial) -> float | None:
    return None if trial.state in ("diverged", "failed") else known.best_of(trial)


def _scheduler(known: Trials) -> TrialScheduler:
    wanted, base = known.search, known.base
    epochs = max(trials.at(base, corner).train.epochs for corner in [{}, *wanted.space.corners])
    if wanted.scheduler == "asha" and epochs > 1:
        # The last epoch has no rung: who gets there has ended by itself.
        asha = ASHAScheduler(
            "epoch", "score", "min", max_t=epochs - 1, reduction_factor=BEST_OF, stop_last_trials=False
        )
        for trial in known:
            if trial.is_over:
                _recall(asha, trial)
        return asha
    if wanted.scheduler == "pbt":
        luck = random.Random(f"{base.run.seed} explore")
        return PopulationBasedTraining(
            "epoch",
            "score",
            "min",
            perturbation_interval=max(1, epochs // PERTURBATIONS),
            custom_explore_fn=lambda config: {"trial": _explored(config["trial"], wanted.space, luck)},
            log_config=False,
        )
    return FIFOScheduler()


def _explored(trial: dict[str, Any], space: Space, luck: random.Random) -> dict[str, Any]:
    return {**trial, "point": space.explore(trial["point"], luck)}


def _recall(scheduler: TrialScheduler, trial: Trial) -> None:
    """Shows the scheduler a trial of an earlier start of the search."""
    stub = SimpleNamespace(trial_id=f"before-{trial.number}")
    scheduler.on_trial_add(None, stub)
    for epoch, value in trial.scores:
        scheduler.on_trial_result(None, stub, {"epoch": epoch, "score": value})


class Experiment(threading.Thread):
    """Ray Tune at work on what is left to do; the main thread is left to hear signals."""

    def __init__(self, known: Trials, place: Place, ear: Ear, stop: Stop, mailbox: Any) -> None:
        super().__init__(daemon=True)
        self.known, self.place, self.ear, self.stop, self.mailbox = known, place, ear, stop, mailbox
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
        actor = tune.with_parameters(Actor, task=Task(known.base, wanted, known.folder, self.mailbox))
        tune.run(
            tune.with_resources(actor, tune.PlacementGroupFactory([self.place.resources])),
            name=RAY_FOLDER,
            storage_path=known.folder.address,
            config={} if asker else {"trial": tune.grid_search(left)},
            search_alg=asker,
            num_samples=len(asker.left) if asker else 1,
            scheduler=_scheduler(known),
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
    scale = base.scale
    # A trial without workers is itself the one that works.
    placement, room = cluster.connect_for_many(
        scale if scale.max_workers else replace(scale, workers=1), wanted.concurrent
    )
    try:
        if placement.notice:
            screen.line(placement.notice)
        if not scale.max_workers:
            yield base, Place(placement.resources, room)
            return
        if placement.max_workers < scale.max_workers:
            scale = replace(scale, workers=placement.max_workers)
        # The workers have a place of their own. Who drives them takes a share of the head, so that
        # never more trials begin than have room for all their workers.
        share = math.floor(0.9 / room * 1e4) / 1e4
        yield replace(base, scale=scale), Place({"node:__internal_head__": share}, room)
    finally:
        ray.shutdown()


def run(options: Config, wanted: Search, stem: str, screen: Screen) -> int:
    """Searches as configured, or goes on with what is there; gives the exit status."""
    if not options.scale.cpus_per_worker:
        options = replace(options, scale=replace(options.scale, cpus_per_worker=1))
    folder, options = trials.choose(options, wanted, stem)
    if trials.is_finished(folder, options, wanted):
        screen.line(f"{folder} is finished; to search longer, raise search.trials")
        summary.show(Trials(folder, options, wanted), screen)
        return 0
    lease.refuse_if_alive(folder)
    wishes = Wishes()
    with wishes.heard():
        base = trials.check(options, wanted, folder)
        folder.check_writable()
        if wishes.status:
            return wishes.status
        with _cluster(base, wanted, screen) as (base, place), wishes.heard():
            owned = lease.acquire(folder)
            try:
                folder.write(trials.SEARCH, f"{parse.to_toml(base)}\n{search.to_toml(wanted)}".encode())
                _search(Trials(folder, base, wanted), place, owned, wishes, screen)
                known = Trials(folder, base, wanted)  # as it stands on the disk
                if wishes.status:
                    screen.line(f"stopped; the same command goes on with {folder}")
                    return wishes.status
                owned.check()
                if left := summary.left(known):
                    screen.line(f"time is up with {left} trials left; the same command goes on")
                summary.write(known)
                summary.show(known, screen)
                return 0
            finally:
                owned.release()


def _search(known: Trials, place: Place, owned: lease.Lease, wishes: Wishes, screen: Screen) -> None:
    """Has Ray Tune run what is left to do, and shows it, until all is done or a stop is wanted."""
    screen.line(summary.about(known, place.room))
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what matters comes through the ear
    ear = Ear(known)
    stop = Stop(ear)
    mailbox = onray.mailbox_here()
    known.folder.remove(RAY_FOLDER)
    experiment = Experiment(known, place, ear, stop, mailbox)
    until = time.monotonic() + (60 * known.search.minutes or math.inf)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # Ray Tune's own talk
        experiment.start()
        while experiment.is_alive():
            experiment.join(LOOK)
            if not stop.wanted and (wishes.status or time.monotonic() > until):
                stop.wanted = True
                mailbox.order.remote(Signals(stop=True))
            owned.check_now_and_then()
            ear.tell(screen)
            summary.progress(known, screen)
        ear.tell(screen)
    known.folder.remove(RAY_FOLDER)
    if experiment.error:
        raise RunFailed(f"Ray Tune ended: {in_a_line(experiment.error)}; the same command goes on")
