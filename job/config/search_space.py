"""What a search looks for: the metric, the space and its points. Pure; no run, no Ray."""

import difflib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from job.config.schema import FIELDS, SECTIONS, Section, at_least, config_field, defines_run, format_value, one_of
from job.errors import UserError

Params = dict[str, Any]  # a field such as optimizer.learning_rate, and its value

# What may be minimised, and the rows of metrics that report it.
METRIC_SPLITS = {"validation_perplexity": "validation", "perplexity": "epoch"}
# What population-based training may change in the middle of a run.
PBT_MUTABLE = ("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.grad_clip_norm", "model.dropout")
DEFAULT_NUM_TRIALS = 16  # trials of a search that draws, where nothing else is said
_PERTURBATION_FACTORS = (0.8, 1.25)  # by what an explored value changes
_RESAMPLE_PROBABILITY = 0.25  # how often it is drawn anew


# --- what a field may be -----------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Values from ``low`` to ``high``, both included; drawn evenly, or evenly in the logarithm."""

    kind: str  # uniform, loguniform, randint
    low: float
    high: float

    @property
    def endpoints(self) -> tuple[Any, ...]:
        """The values that are checked for all."""
        return (self.low, self.high)

    def sample(self, rng: random.Random) -> Any:
        """A random value, rounded to four digits so that a person can read and type it."""
        if self.kind == "randint":
            return rng.randint(int(self.low), int(self.high))
        if self.kind == "loguniform":
            return self._held(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self._held(rng.uniform(self.low, self.high))

    def contains(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def perturb(self, value: Any, rng: random.Random) -> Any:
        """A value near another."""
        return (
            self.sample(rng)
            if rng.random() < _RESAMPLE_PROBABILITY
            else self._held(value * rng.choice(_PERTURBATION_FACTORS))
        )

    def _held(self, value: float) -> float:
        found = min(max(float(f"{value:.4g}"), self.low), self.high)
        return round(found) if self.kind == "randint" else found

    def __str__(self) -> str:
        return f"{{ {self.kind} = {format_value([*self.endpoints])} }}"


@dataclass(frozen=True)
class Choice:
    """One of some values; a ``grid`` is gone through, of a ``choice`` one is drawn."""

    kind: str  # choice, grid
    endpoints: tuple[Any, ...]

    def sample(self, rng: random.Random) -> Any:
        """One of the values."""
        return rng.choice(self.endpoints)

    def contains(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return value in self.endpoints

    def perturb(self, value: Any, rng: random.Random) -> Any:
        """The one before or after another."""
        place = self.endpoints.index(value) + rng.choice((-1, 1))
        return self.endpoints[min(max(place, 0), len(self.endpoints) - 1)]

    def __str__(self) -> str:
        return f"{{ {self.kind} = {format_value(self.endpoints)} }}"


Domain = Range | Choice
_DISTRIBUTIONS = ("uniform", "loguniform", "randint", "choice", "grid")


def _domain(written: Any, place: str) -> Domain:
    """What a user wrote, such as ``{ loguniform = [0.01, 4] }``."""
    if not isinstance(written, Mapping) or len(written) != 1 or next(iter(written)) not in _DISTRIBUTIONS:
        raise UserError(
            f"{place} = {_as_toml(written)}: must be one of {', '.join(f'{{ {k} = […] }}' for k in _DISTRIBUTIONS)}"
        )
    ((kind, values),) = written.items()
    place = f"{place} = {_as_toml(written)}"
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"{place}: a list of values is wanted")
    if kind in ("choice", "grid"):
        frozen = tuple(tuple(value) if isinstance(value, list) else value for value in values)
        if any(frozen.count(value) > 1 for value in frozen):
            raise UserError(f"{place}: holds a value twice")
        return Choice(kind, frozen)
    return _range(kind, values, place)


def _range(kind: str, values: Any, place: str) -> Range:
    number = int if kind == "randint" else (int, float)
    if len(values) != 2 or not all(isinstance(v, number) and not isinstance(v, bool) for v in values):
        raise UserError(f"{place}: must be two {'integers' if kind == 'randint' else 'numbers'}, low and high")
    low, high = values if kind == "randint" else map(float, values)
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
        raise UserError(f"{place}: the range is upside down or empty; write the lower end first")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{place}: a logarithm needs a lower end above 0")
    return Range(kind, low, high)


def _as_toml(written: Any) -> str:
    if isinstance(written, Mapping):
        return f"{{ {', '.join(f'{key} = {_as_toml(value)}' for key, value in written.items())} }}"
    return format_value(written)


# --- the space and the section -----------------------------------------------------------------


@dataclass(frozen=True)
class SearchSpace:
    """The fields that are searched, each with the values it may take."""

    domains: dict[str, Domain]

    @classmethod
    def read(cls, written: Any) -> "SearchSpace":
        """``[search.space]`` as TOML gives it; UserError for what no run can be made of."""
        if not isinstance(written, Mapping):
            raise UserError("search.space must be a section, written [search.space]")
        fields_of = _flat(written)
        # By name: the order of a file's lines shall not decide which trial has which point.
        return cls({_searchable(n): _domain(value, f'search.space "{n}"') for n, value in sorted(fields_of.items())})

    @property
    def grid_size(self) -> int:
        """How many combinations the lists have that are gone through."""
        return math.prod(len(domain.endpoints) for domain in self.domains.values() if domain.kind == "grid")

    @property
    def is_sampled(self) -> bool:
        """Whether any field is drawn."""
        return any(domain.kind != "grid" for domain in self.domains.values())

    @property
    def endpoints(self) -> list[Params]:
        """Each field's ends, or each of its choices, by itself."""
        return [{name: value} for name, domain in self.domains.items() for value in domain.endpoints]

    def sample(self, seed: int, number: int) -> Params:
        """The parameters of a trial, a pure function of the seed and its number."""
        params, quotient = Params(), number
        for name, domain in reversed(self.domains.items()):
            if domain.kind == "grid":  # mixed-radix digits of the number: the last grid changes fastest
                quotient, index = divmod(quotient, len(domain.endpoints))
                params[name] = domain.endpoints[index]
            else:
                params[name] = domain.sample(random.Random(f"{seed} {number} {name}"))
        return {name: params[name] for name in self.domains}

    def contains(self, params: Params) -> bool:
        """Whether these parameters could be sampled; False if the space has a grid."""
        return all(domain.kind != "grid" and domain.contains(params[name]) for name, domain in self.domains.items())

    def perturb(self, params: Params, rng: random.Random) -> Params:
        """Parameters near others, as population-based training explores."""
        return {name: domain.perturb(params[name], rng) for name, domain in self.domains.items()}


def _flat(written: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their full names: without quotes TOML makes ``optimizer.learning_rate`` a table in a table."""
    found: dict[str, Any] = {}
    for name, value in written.items():
        if name in SECTIONS and isinstance(value, Mapping):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def _searchable(name: str) -> str:
    """The field's name; UserError where it is unknown, or does not define what a run computes."""
    if name not in FIELDS:
        found = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)
        raise UserError(f"search.space: unknown field {name}; did you mean {found[0]}?")
    if not defines_run(name):
        raise UserError(f"search.space: {name} does not change what a run computes; leave it out")
    return name


@dataclass(frozen=True)
class SearchConfig(Section):
    """What ``tune`` looks for, and how."""

    section_name: ClassVar[str] = "search"
    metric: str = config_field(
        "validation_perplexity", f"what to minimise: {', '.join(METRIC_SPLITS)}", one_of(*METRIC_SPLITS)
    )
    trials: int = config_field(
        0, f"how many; 0: the whole grid, {DEFAULT_NUM_TRIALS} where values are drawn", at_least(0)
    )
    minutes: float = config_field(0.0, "how long; 0: no bound. The same command goes on", at_least(0))
    searcher: str = config_field("random", "random, grid or optuna", one_of("random", "grid", "optuna"))
    scheduler: str = config_field("none", "none, asha (stops the hopeless) or pbt", one_of("none", "asha", "pbt"))
    concurrent: int = config_field(0, "trials side by side; 0: as many as have room", at_least(0))
    space: SearchSpace = field(default_factory=lambda: SearchSpace({}), metadata={"meaning": "values to try"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.space, SearchSpace):
            object.__setattr__(self, "space", SearchSpace.read(self.space))
        if self.searcher == "grid":
            object.__setattr__(self, "space", _with_lists(self.space, "grid"))
        if self.searcher == "optuna":
            object.__setattr__(self, "space", _with_lists(self.space, "choice"))
        if self.scheduler == "pbt":
            _check_population(self)

    @property
    def num_trials(self) -> int:
        """How many trials there are."""
        grid_size = self.space.grid_size
        if self.space.is_sampled:
            return self.trials or max(DEFAULT_NUM_TRIALS, grid_size)
        return min(self.trials or grid_size, grid_size)


SEARCH_FIELDS = [f"search.{option.name}" for option in fields(SearchConfig) if option.name != "space"]


def _with_lists(space: SearchSpace, kind: str) -> SearchSpace:
    """The space with every list gone through, or drawn from."""
    for name, domain in space.domains.items():
        if kind == "grid" and isinstance(domain, Range):
            raise UserError(f'search.searcher = "grid": {name} = {domain} has no end of values; write {{ grid = […] }}')
    return SearchSpace({n: Choice(kind, d.endpoints) if isinstance(d, Choice) else d for n, d in space.domains.items()})


def _check_population(search: SearchConfig) -> None:
    if search.searcher == "optuna":
        raise UserError('search.searcher = "optuna": scheduler = "pbt" explores by itself; use random')
    for name in search.space.domains:
        if name not in PBT_MUTABLE:
            raise UserError(
                f'search.space "{name}": cannot change in the middle of a run, as scheduler = "pbt" does; '
                f"{', '.join(PBT_MUTABLE)} can"
            )


def search_to_toml(search: SearchConfig) -> str:
    """The sections as TOML that reads back to the same search."""
    lines = ["[search]", *(f"{name[7:]} = {format_value(getattr(search, name[7:]))}" for name in SEARCH_FIELDS)]
    lines += ["", "[search.space]", *(f'"{name}" = {domain}' for name, domain in search.space.domains.items()), ""]
    return "\n".join(lines)


# What may differ when a search goes on.
_FREE = ("trials", "minutes", "concurrent")


def search_differences(old: SearchConfig, new: SearchConfig) -> list[str]:
    """What keeps ``new`` from going on with the search ``old``, as ``field (old → new)``."""
    kept = [name[7:] for name in SEARCH_FIELDS if name[7:] not in _FREE]
    found = [
        f"search.{n} ({format_value(getattr(old, n))} → {format_value(getattr(new, n))})"
        for n in kept
        if getattr(old, n) != getattr(new, n)
    ]
    before, after = old.space.domains, new.space.domains
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            found.append(
                f"search.space {name} ({before.get(name, 'not searched')} → {after.get(name, 'not searched')})"
            )
    return found
