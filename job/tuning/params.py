"""The parameters of a trial, and the configuration of its run."""

from dataclasses import replace
from operator import attrgetter

from job.config.schema import Config
from job.config.search_space import Params, SearchConfig
from job.config.toml import override_config
from job.storage import Folder

TRIALS_DIR = "trials"  # in a search's folder: one run per trial


def trial_name(number: int) -> str:
    """The name of a trial's run."""
    return f"{number:05d}"


def trial_folder(search_folder: Folder, number: int) -> Folder:
    """The folder of a trial's run."""
    return search_folder / TRIALS_DIR / trial_name(number)


def params_of(config: Config, search: SearchConfig) -> Params:
    """The values that a configuration has in the fields of the search space."""
    return {name: attrgetter(name)(config) for name in search.space.domains}


def searched_cells(base: Config, search: SearchConfig) -> tuple[str, ...]:
    """The values of ``model.cell`` that trials may have."""
    domain = search.space.domains.get("model.cell")
    return domain.values if domain else (base.model.cell,)


def baseline_params(base: Config, search: SearchConfig) -> Params | None:
    """The configuration's own values, which trial 0 uses. None if the space has a grid or does not contain them."""
    params = params_of(base, search)
    return params if search.space.contains(params) else None


def trial_params(base: Config, search: SearchConfig, number: int) -> Params | None:
    """The parameters of a trial, or None if Optuna chooses them when the trial starts."""
    if number == 0 and (baseline := baseline_params(base, search)):
        return baseline
    return None if search.searcher == "optuna" else search.space.sample(base.run.seed, number)


def trial_config(base: Config, search_folder: Folder, number: int, params: Params) -> Config:
    """The configuration of a trial's run."""
    storage = (search_folder / TRIALS_DIR).address
    run = replace(base.run, name=trial_name(number), storage=storage, resume="auto")
    return override_config(replace(base, run=run), params)
