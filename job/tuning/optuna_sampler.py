"""Chooses a trial's parameters with Optuna's tree-structured Parzen estimator."""

import importlib
import random
import warnings
from typing import Any

from job.config.search_space import Domain, Params, Range, SearchSpace
from job.errors import UserError


def import_optuna() -> Any:
    """The optional dependency Optuna, with its log output off. Raises UserError if it is not installed."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise UserError('search.searcher = "optuna": is not installed', "pip install optuna, or use random") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", "Choices for a categorical distribution")  # lists are possible without a database
    return optuna


class OptunaSampler:
    """An Optuna study in memory; a resumed search rebuilds it from its trials."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.optuna = import_optuna()
        self.space, self.seed = space, seed
        self.study = self.optuna.create_study()
        self.open_trials: dict[int, Any] = {}  # Optuna's trials without a result, by trial number

    def ask(self, number: int) -> Params:
        """Chooses the parameters of a new trial."""
        # The seed depends on the trial's number, so that a resumed search does not draw the same values again.
        seed = random.Random(f"{self.seed} {number} suggest").getrandbits(32)
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)
        trial = self.study.ask({name: self._distribution(domain) for name, domain in self.space.domains.items()})
        self.open_trials[number] = trial
        return {name: trial.params[name] for name in self.space.domains}

    def replay(self, number: int, params: Params) -> None:
        """Adds a trial that was started earlier, with the parameters it had."""
        self.study.enqueue_trial(params)
        self.ask(number)

    def tell(self, number: int, score: float | None) -> None:
        """Reports a trial's result, or None if it failed."""
        state = self.optuna.trial.TrialState.FAIL if score is None else None
        self.study.tell(self.open_trials.pop(number), score, state=state)

    def _distribution(self, domain: Domain) -> Any:
        distributions = self.optuna.distributions
        if not isinstance(domain, Range):
            return distributions.CategoricalDistribution(domain.values)
        if domain.distribution == "randint":
            return distributions.IntDistribution(*domain.values)
        return distributions.FloatDistribution(*domain.values, log=domain.distribution == "loguniform")
