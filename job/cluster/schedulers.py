"""Ray Tune's schedulers and searchers, set up for a search that may be resumed."""

import random
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from job.cluster.tune_callbacks import NotPickled, TrialCallback
from job.tuning.optuna_sampler import OptunaSampler
from job.tuning.rungs import first_rung, max_epochs
from job.tuning.trials import Trial, Trials

REDUCTION_FACTOR = 3  # at each rung ASHA keeps the best 1/3


class SyncPBT(NotPickled, PopulationBasedTraining):
    """Synchronous population-based training that does not deadlock when the last running trial ends.

    It is synchronous because otherwise a late trial is compared with scores of trials that never ran alongside
    it. Ray Tune compares the population when a running trial reports, and pauses the others until then. If the
    last running trial ends without a report, all others stay paused. In that case the most recent report is
    passed to the scheduler again. (on_trial_result in ray/tune/schedulers/pbt.py)

    Ray Tune also keeps a failed trial among the live ones, whose reports the others wait for.
    (_process_trial_failure in ray/tune/execution/tune_controller.py)
    """

    def __init__(self, callback: TrialCallback, interval: int) -> None:
        trials = callback.trials
        rng = random.Random(f"{trials.base.run.seed} explore")

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            trial = config["trial"]
            return {"trial": {**trial, "params": trials.search.space.perturb(trial["params"], rng)}}

        options = {"perturbation_interval": interval, "custom_explore_fn": explore, "log_config": False}
        super().__init__("epoch", "score", "min", synch=True, **options)
        self.callback = callback
        self.last_results: dict[RayTrial, dict[str, Any]] = {}

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Called by Ray Tune when a trial reports."""
        self.last_results[trial] = result
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        """Called by Ray Tune when a trial fails. If it is restarted, Ray Tune adds it to the live trials again."""
        tune_controller.get_live_trials().discard(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """Called by Ray Tune whenever resources may be free."""
        chosen = super().choose_trial_to_run(tune_controller)
        live = tune_controller.get_live_trials()
        if chosen or self.callback.stop_requested or not live or any(trial.status != RayTrial.PAUSED for trial in live):
            return chosen
        latest = max(live, key=lambda trial: self.last_results[trial]["epoch"])
        super().on_trial_result(tune_controller, latest, self.last_results[latest])
        # Ray Tune chooses none if all trials have passed the next comparison, as after a report that was missed.
        earliest = min(live, key=lambda trial: self.last_results[trial]["epoch"])
        return super().choose_trial_to_run(tune_controller) or earliest


class OptunaSearcher(NotPickled, Searcher):
    """Lets Optuna choose the parameters of new trials. Trials that were started earlier keep theirs."""

    def __init__(self, trials: Trials, sampler: OptunaSampler) -> None:
        super().__init__()
        self.trials, self.sampler = trials, sampler
        self.numbers: dict[str, int] = {}  # of running trials, by Ray Tune's identifier
        for trial in trials:
            sampler.replay(trial.number, trial.params)
            if trial.is_done:
                sampler.tell(trial.number, _objective(trials, trial, trial.state))
        done = {trial.number for trial in trials if trial.is_done}
        self.pending = [number for number in range(trials.search.num_trials) if number not in done]

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Returns the configuration of the next trial. Called by Ray Tune."""
        if not self.pending:
            return str(Searcher.FINISHED)
        number = self.numbers[trial_id] = self.pending.pop(0)
        trial = self.trials.by_number.get(number)
        return {"trial": {"number": number, "params": trial.params if trial else self.sampler.ask(number)}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Called by Ray Tune when a trial has ended, before the callbacks are."""
        number = self.numbers.pop(trial_id)
        state = "failed" if error else (result or {}).get("state", "stopped")
        if state != "interrupted":
            self.sampler.tell(number, _objective(self.trials, self.trials.by_number[number], state))


def _objective(trials: Trials, trial: Trial, state: str) -> float | None:
    return None if state in ("diverged", "failed") else trials.score(trial)


def build_scheduler(callback: TrialCallback) -> TrialScheduler:
    """The scheduler that the search names. ASHA is given the scores of trials that ended in earlier runs."""
    trials = callback.trials
    name, epochs = trials.search.scheduler, max_epochs(trials.base, trials.search)
    if name == "none":
        return FIFOScheduler()
    rung = first_rung(name, epochs)
    if name == "pbt":
        return SyncPBT(callback, rung)
    asha = ASHAScheduler(
        "epoch",
        "score",
        "min",
        max_t=epochs - 1,  # no rung at the last epoch: a trial that reaches it ends by itself
        grace_period=rung,
        reduction_factor=REDUCTION_FACTOR,
        stop_last_trials=False,
    )
    for trial in trials:
        if trial.is_done:
            stand_in: Any = SimpleNamespace(trial_id=f"before-{trial.number}")  # for Ray Tune's trial
            asha.on_trial_add(None, stand_in)
            for epoch, score in trial.scores:
                asha.on_trial_result(None, stand_in, {"epoch": epoch, "score": score})
    return asha
