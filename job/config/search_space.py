"""The search section: its metric, its space and how parameters are sampled from it. Pure functions."""

import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

from job.config.field import FREE, choice_field, config_field, format_value
from job.config.schema import FIELDS, SECTIONS
from job.config.section import Section, unknown_name
from job.errors import UserError

Params = dict[str, Any]  # values by full field name, such as optimizer.learning_rate

# The metrics that a search may minimize, and the split of the metrics rows that report them.
METRIC_SPLITS = {"validation_perplexity": "validation", "perplexity": "epoch"}
DEFAULT_NUM_TRIALS = 16  # if values are sampled and search.trials = 0
MAX_TRIALS = 10_000  # of a search; also the most values in one list
_PERTURBATION_FACTORS = (0.8, 1.25)  # these two are Ray Tune's defaults
_RESAMPLE_PROBABILITY = 0.25
# The fields of search.space. All trials start from the same checkpoint, if from any.
SEARCHABLE = {name: option for name, option in FIELDS.items() if option.on_resume != FREE and name != "run.resume_from"}


@dataclass(frozen=True)
class _Domain:
    """The values that a field may have.

    Args:
        distribution: uniform, loguniform or randint: of a range; choice or grid: of a list
        values: the two ends of a range, between which a run is possible if it is with both; or all values of a list
    """

    distribution: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return format_value({self.distribution: self.values})


class Range(_Domain):
    """Values from a lower to an upper end, both included, uniform or log-uniform."""

    def sample(self, rng: random.Random) -> Any:
        """Returns a random value, rounded to four digits so that a person can read and type it."""
        low, high = self.values
        if self.distribution == "randint":
            return rng.randint(low, high)
        if self.distribution == "loguniform":
            return self._round(math.exp(rng.uniform(math.log(low), math.log(high))))
        return self._round(rng.uniform(low, high))

    def contains(self, value: Any) -> bool:
        """Returns whether a value is in the range."""
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def perturb(self, value: Any, rng: random.Random) -> Any:
        """Returns a value near another, or sometimes a new sample."""
        if rng.random() < _RESAMPLE_PROBABILITY:
            return self.sample(rng)
        return self._round(value * rng.choice(_PERTURBATION_FACTORS))

    def _round(self, value: float) -> float:
        clipped = min(max(float(f"{value:.4g}"), self.values[0]), self.values[1])
        return round(clipped) if self.distribution == "randint" else clipped


class Choice(_Domain):
    """A list of values: of a ``grid`` each is tried, of a ``choice`` one is sampled."""

    def sample(self, rng: random.Random) -> Any:
        """Returns a random value."""
        return rng.choice(self.values)

    def contains(self, value: Any) -> bool:
        """Returns whether a value could be sampled; False for a grid."""
        return self.distribution != "grid" and value in self.values

    def perturb(self, value: Any, rng: random.Random) -> Any:
        """Returns the value before or after another."""
        index = self.values.index(value) + rng.choice((-1, 1))
        return self.values[min(max(index, 0), len(self.values) - 1)]


Domain = Range | Choice
_DISTRIBUTIONS = ("uniform", "loguniform", "randint", "choice", "grid")


def _parse_domain(name: str, written: Any) -> Domain:
    """Parses a domain as written in TOML: ``{ loguniform = [0.01, 4] }``."""
    field_value = f'search.space "{name}" = {shorten(format_value(written), 500, placeholder=" …")}'
    if not isinstance(written, Mapping) or len(written) != 1 or next(iter(written)) not in _DISTRIBUTIONS:
        forms = ", ".join(f"{{ {name} = […] }}" for name in _DISTRIBUTIONS)
        raise UserError(f"{field_value}: must be one of {forms}")
    ((distribution, values),) = written.items()
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"{field_value}: must contain a list of values")
    if distribution in ("choice", "grid"):
        if len(values) > MAX_TRIALS:
            raise UserError(f"{field_value}: {len(values):,} values, more than {MAX_TRIALS:,}", "give a range")
        if len({repr(value) for value in values}) < len(values):
            raise UserError(f"{field_value}: contains a value twice")
        return Choice(distribution, tuple(tuple(value) if isinstance(value, list) else value for value in values))
    return _parse_range(distribution, values, field_value)


def _parse_range(distribution: str, values: Any, field_value: str) -> Range:
    number_types, plural = ((int,), "integers") if distribution == "randint" else ((int, float), "numbers")
    if len(values) != 2 or any(type(value) not in number_types for value in values):
        raise UserError(f"{field_value}: must be two {plural}, low and high")
    low, high = values
    if not -sys.float_info.max <= low < high <= sys.float_info.max:
        raise UserError(f"{field_value}: the range is empty or not finite", "write the lower end first")
    if distribution == "loguniform" and low <= 0:
        raise UserError(f"{field_value}: the lower end of a log-uniform range must be greater than 0")
    return Range(distribution, (low, high) if distribution == "randint" else (float(low), float(high)))


@dataclass(frozen=True)
class SearchSpace:
    """The fields that are searched, by full name, each with its domain."""

    domains: dict[str, Domain]

    @classmethod
    def parse(cls, written: Any) -> "SearchSpace":
        """Parses ``[search.space]``.

        Args:
            written: the section as tomllib returns it

        Raises:
            UserError: if a field is unknown or cannot be searched, or a domain is invalid
        """
        if not isinstance(written, Mapping):
            raise UserError("search.space must be a section, written [search.space]")
        # Sorted by name, so that the order of lines in a file does not change the samples.
        domains = sorted(_flatten(written).items())
        for name, _ in domains:
            _check_searchable(name)
        return cls({name: _parse_domain(name, domain) for name, domain in domains})

    @property
    def grid_size(self) -> int:
        """The number of combinations of the grids' values."""
        return math.prod(len(domain.values) for domain in self.domains.values() if domain.distribution == "grid")

    @property
    def endpoints(self) -> list[Params]:
        """Each endpoint of each field by itself, to check that trials are possible."""
        return [{name: value} for name, domain in self.domains.items() for value in domain.values]

    def sample(self, seed: int, number: int) -> Params:
        """Returns the parameters of trial ``number``, a pure function of it and the seed."""
        params, quotient = Params(), number
        for name, domain in reversed(self.domains.items()):
            if domain.distribution == "grid":  # mixed-radix digits of the number: the last grid changes fastest
                quotient, index = divmod(quotient, len(domain.values))
                params[name] = domain.values[index]
            else:
                params[name] = domain.sample(random.Random(f"{seed} {number} {name}"))
        return {name: params[name] for name in self.domains}

    def contains(self, params: Params) -> bool:
        """Returns whether these parameters could be sampled; False if the space has a grid."""
        return all(domain.contains(params[name]) for name, domain in self.domains.items())

    def perturb(self, params: Params, rng: random.Random) -> Params:
        """Returns parameters near others, as population-based training explores."""
        return {name: domain.perturb(params[name], rng) for name, domain in self.domains.items()}


def _flatten(written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns domains by full field name: without quotes, TOML reads ``model.dropout`` as nested tables."""
    nested = {name: table for name, table in written.items() if name in SECTIONS and isinstance(table, Mapping)}
    flat = {name: domain for name, domain in written.items() if name not in nested}
    unquoted = {f"{section}.{key}": domain for section, table in nested.items() for key, domain in table.items()}
    for name in flat.keys() & unquoted.keys():
        raise UserError(f"search.space: {name} is given twice", "remove one of them")
    return flat | unquoted


def _check_searchable(name: str) -> None:
    if name not in FIELDS:
        raise unknown_name("field of search.space", name, FIELDS)
    if name == "run.resume_from":
        raise UserError(f"search.space: all trials have the same {name}", "set it in [run]")
    if name not in SEARCHABLE:
        raise UserError(f"search.space: {name} does not affect the result of a run", "remove it")


@dataclass(frozen=True)
class SearchConfig(Section):
    """The hyperparameter search."""

    metric: str = choice_field("metric to minimize", **dict.fromkeys(METRIC_SPLITS, ""))
    trials: int = config_field(0, f"trials; 0: the grid, or {DEFAULT_NUM_TRIALS} if sampled", ge=0, on_resume=FREE)
    minutes: float = config_field(0.0, "time limit; the same command resumes; 0: none", "minutes", ge=0, on_resume=FREE)
    searcher: str = choice_field("how parameters are chosen", random="", grid="", optuna="")
    scheduler: str = choice_field("scheduler", none="", asha="stops poor trials early", pbt="population-based")
    concurrent: int = config_field(0, "trials that run at the same time; 0: what resources allow", ge=0, on_resume=FREE)
    space: SearchSpace = field(default_factory=lambda: SearchSpace({}))

    def __post_init__(self) -> None:
        super().__post_init__()
        space = self.space if isinstance(self.space, SearchSpace) else SearchSpace.parse(self.space)
        if self.searcher != "random":
            space = _convert_choices(space, self.searcher)
        object.__setattr__(self, "space", space)
        if self.scheduler == "pbt":
            _check_pbt(self)

    @property
    def num_trials(self) -> int:
        """The number of trials of the whole search."""
        grid_size = self.space.grid_size
        if all(domain.distribution == "grid" for domain in self.space.domains.values()):
            return min(self.trials or grid_size, grid_size)
        return self.trials or max(DEFAULT_NUM_TRIALS, grid_size)

    def to_toml(self) -> str:
        """Returns ``[search]`` and ``[search.space]`` as TOML."""
        domains = "".join(f'"{name}" = {domain}\n' for name, domain in self.space.domains.items())
        return f"{super().to_toml()}\n[search.space]\n{domains}"


def _convert_choices(space: SearchSpace, searcher: str) -> SearchSpace:
    """Returns the space with all lists as the searcher uses them: a grid's are tried in turn, Optuna's sampled."""
    domains = dict(space.domains)
    for name, domain in domains.items():
        if isinstance(domain, Choice):
            domains[name] = Choice("grid" if searcher == "grid" else "choice", domain.values)
        elif searcher == "grid":
            raise UserError(f'search.searcher = "grid": {name} = {domain} is not a list', "write { grid = […] }")
    return SearchSpace(domains)


def _check_pbt(search: SearchConfig) -> None:
    if search.searcher == "optuna":
        raise UserError('search.searcher = "optuna": not possible with scheduler = "pbt"', "use random")
    for name in search.space.domains:
        if not FIELDS[name].is_mutable:
            problem = f'search.space "{name}": cannot change during a run, as scheduler = "pbt" does'
            mutable = (option.name for option in FIELDS.values() if option.is_mutable)
            raise UserError(problem, f"{', '.join(mutable)} can")


def search_differences(old: SearchConfig, new: SearchConfig) -> list[str]:
    """Returns the fields that prevent ``new`` from resuming the search ``old``, as ``field (old → new)``."""
    before, after = _fixed_values(old), _fixed_values(new)
    names = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    return [f"{name} ({before.get(name, 'not searched')} → {after.get(name, 'not searched')})" for name in names]


def _fixed_values(search: SearchConfig) -> dict[str, str]:
    values = {name: format_value(value) for name, value in search.fixed_values().items()}
    return values | {f"search.space {name}": str(domain) for name, domain in search.space.domains.items()}
