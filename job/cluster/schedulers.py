"""What Ray Tune asks of a search as it goes: what trials come to, which comes next, which may go on."""

import contextlib
import queue
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from job.cluster import connection
from job.config.search_space import SearchSpace
from job.console import Console
from job.tuning.optuna_sampler import OptunaSampler
from job.tuning.report import format_trial
from job.tuning.trials import Trial, Trials, with_params

assert connection

GRACE_FRACTION = 4  # no trial is stopped in the first quarter of its epochs: what learns fast may begin badly
REDUCTION_FACTOR = 3  # a trial that survives a rung of ASHA is among the best third
RUNNING, PAUSED = "RUNNING", "PAUSED"  # Ray Tune's words for a trial's state
NUM_PERTURBATIONS = 8  # how often population-based training compares, over a run


class _NotPickled:
    """Stays in the driver: Ray Tune would write it into its own records, which nobody reads."""

    def __reduce__(self) -> Any:
        return (object, ())


def trial_number(trial: Any) -> int:
    """Ray Tune's trial, as ours: by its name, since its point may be another's."""
    return int(str(trial))


class TrialCallback(_NotPickled, tune.Callback):
    """Hears from Ray Tune how trials begin, get on and end."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.heard = time.monotonic()
        self.taken: dict[int, Any] = {}  # Ray Tune's trials that have been begun
        self.ended: queue.SimpleQueue[Trial] = queue.SimpleQueue()  # for the main thread to tell of

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """An actor takes a trial."""
        self.taken[trial_number(trial)] = trial
        self.trials.begin(trial_number(trial), trial.config["trial"]["point"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports."""
        self.heard = time.monotonic()
        if "score" in result and self.trials.report(trial_number(trial), result["epoch"], result["score"]):
            trial.run_metadata.num_failures = 0  # only deaths with nothing new between them add up

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended by itself, or was stopped by the scheduler, which leaves no state."""
        result = trial.last_result
        self._end(trial, result.get("state", "stopped"), result.get("why", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has died too often."""
        self._end(trial, "failed", _last_line(trial.error_file))

    def _end(self, trial: Any, state: str, why: str) -> None:
        number = trial_number(trial)
        if state == "interrupted":
            return
        self.trials.end(number, state, why)
        self.ended.put(self.trials.found[number])

    def tell(self, console: Console) -> None:
        """A line for each trial that has ended."""
        while not self.ended.empty():
            console.print(format_trial(self.trials, self.ended.get()))


def _last_line(file: str | None) -> str:
    """The end of a traceback, which says what went wrong."""
    with contextlib.suppress(OSError, TypeError, IndexError):
        return [line for line in Path(str(file)).read_text().splitlines() if line.strip()][-1].strip()[:200]
    return "its process died"


class StopOnRequest(_NotPickled, tune.Stopper):
    """Ends the search once it is wanted, and the trials that run have saved."""

    def __init__(self, ear: TrialCallback) -> None:
        self.ear, self.search = ear, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped by itself."""
        return False

    def stop_all(self) -> bool:
        """Asked by Ray Tune again and again."""
        return self.search and not any(trial.status == RUNNING for trial in self.ear.taken.values())


class SyncPBT(_NotPickled, PopulationBasedTraining):
    """Ray Tune's own, but that it goes on where the one whom the others wait for ends without a report."""

    def __init__(self, stop: StopOnRequest, *options: Any, **more: Any) -> None:
        super().__init__(*options, **more)
        self.stop = stop

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Asked by Ray Tune whenever it may have room."""
        chosen = super().choose_trial_to_run(tune_controller)
        alive = tune_controller.get_live_trials()
        if chosen or self.stop.search or not alive or any(trial.status != PAUSED for trial in alive):
            return chosen
        # All wait: the comparison comes with a report, so the last one is given again.
        last = max(alive, key=lambda trial: self._trial_state[trial].last_train_time)
        self.on_trial_result(tune_controller, last, self._trial_state[last].last_result)
        return super().choose_trial_to_run(tune_controller)


class OptunaSearcher(_NotPickled, Searcher):
    """Has a model choose the points; trials that were begun before come first."""

    def __init__(self, trials: Trials, suggester: OptunaSampler) -> None:
        super().__init__()
        self.trials, self.suggester = trials, suggester
        self.numbers: dict[str, int] = {}
        before = list(trials)
        for trial in before:
            suggester.replay(trial.number, trial.point)
            if trial.is_over:
                suggester.tell(trial.number, _told(trials, trial, trial.state))
        new = [number for number in range(trials.search.num_trials) if number not in trials.found]
        self.left = [trial.number for trial in before if not trial.is_over] + new

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial."""
        if not self.left:
            return str(Searcher.FINISHED)
        number = self.numbers[trial_id] = self.left.pop(0)
        begun = self.trials.found.get(number)
        return {"trial": {"number": number, "point": begun.point if begun else self.suggester.ask(number)}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended."""
        number = self.numbers.pop(trial_id)
        state = "failed" if error else (result or {}).get("state", "stopped")  # not yet told to our trials
        if state != "interrupted":
            self.suggester.tell(number, _told(self.trials, self.trials.found[number], state))


def _told(trials: Trials, trial: Trial, state: str) -> float | None:
    return None if state in ("diverged", "failed") else trials.best_of(trial)


def build_scheduler(trials: Trials, stop: StopOnRequest) -> TrialScheduler:
    """Ray Tune's scheduler, which has been shown what an earlier start of the search found."""
    search, base = trials.search, trials.base
    epochs = max(with_params(base, corner).train.epochs for corner in [{}, *search.space.endpoints])
    if search.scheduler == "asha" and epochs > 1:
        # The last epoch has no rung: who gets there has ended by itself.
        asha = ASHAScheduler(
            "epoch",
            "score",
            "min",
            max_t=epochs - 1,
            grace_period=max(1, epochs // GRACE_FRACTION),
            reduction_factor=REDUCTION_FACTOR,
            stop_last_trials=False,
        )
        for trial in trials:
            if trial.is_over:
                _replay(asha, trial)
        return asha
    if search.scheduler == "pbt":
        rng = random.Random(f"{base.run.seed} explore")
        return SyncPBT(
            stop,
            "epoch",
            "score",
            "min",
            perturbation_interval=max(1, epochs // NUM_PERTURBATIONS),
            custom_explore_fn=lambda config: {"trial": _perturbed(config["trial"], search.space, rng)},
            log_config=False,
            synch=True,  # else who begins later is compared with whom it never met
        )
    return FIFOScheduler()


def _perturbed(trial: dict[str, Any], space: SearchSpace, rng: random.Random) -> dict[str, Any]:
    return {**trial, "point": space.perturb(trial["point"], rng)}


def _replay(scheduler: TrialScheduler, trial: Trial) -> None:
    """Shows the scheduler a trial of an earlier start of the search."""
    stub = SimpleNamespace(trial_id=f"before-{trial.number}")
    scheduler.on_trial_add(None, stub)
    for epoch, value in trial.scores:
        scheduler.on_trial_result(None, stub, {"epoch": epoch, "score": value})
