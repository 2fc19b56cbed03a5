"""Which point comes next where a model of the objective chooses: Optuna's tree of Parzen estimators."""

import importlib
import random
from typing import Any

from job.config.search_space import Domain, Params, Range, SearchSpace
from job.errors import UserError


class OptunaSampler:
    """Optuna's study, asked and told; it is made anew from the trials that there are."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        try:
            self.optuna: Any = importlib.import_module("optuna")  # an extra of its own
        except ImportError:
            raise UserError('search.searcher = "optuna": is not installed; pip install optuna, or use random') from None
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        self.space, self.seed = space, seed
        self.study = self.optuna.create_study()
        self.asked: dict[int, Any] = {}

    def ask(self, number: int) -> Params:
        """The point of a new trial."""
        return self._ask(number)

    def replay(self, number: int, point: Params) -> None:
        """Takes in a trial that was begun before."""
        self.study.enqueue_trial({name: self._coded(name, value) for name, value in point.items()})
        self._ask(number)

    def _ask(self, number: int) -> Params:
        # What is drawn for a trial is of its number, so that a search that goes on draws nothing twice.
        rng = random.Random(f"{self.seed} {number} suggest").getrandbits(32)
        self.study.sampler = self.optuna.samplers.TPESampler(seed=rng)
        trial = self.study.ask({name: self._distribution(domain) for name, domain in self.space.domains.items()})
        self.asked[number] = trial
        return {name: self._decoded(name, trial.params[name]) for name in self.space.domains}

    def tell(self, number: int, value: float | None) -> None:
        """What a trial came to; None where it failed."""
        failed = self.optuna.trial.TrialState.FAIL if value is None else None
        self.study.tell(self.asked.pop(number), value, state=failed)

    # Optuna's choices are numbers, ours may be lists: it chooses among places.

    def _distribution(self, domain: Domain) -> Any:
        kinds = self.optuna.distributions
        if not isinstance(domain, Range):
            return kinds.CategoricalDistribution(range(len(domain.values)))
        if domain.kind == "randint":
            return kinds.IntDistribution(int(domain.low), int(domain.high))
        return kinds.FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform")

    def _coded(self, name: str, value: Any) -> Any:
        domain = self.space.domains[name]
        return value if isinstance(domain, Range) else domain.values.index(value)

    def _decoded(self, name: str, value: Any) -> Any:
        domain = self.space.domains[name]
        return value if isinstance(domain, Range) else domain.values[value]
