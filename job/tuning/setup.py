"""Checks a search before its first trial starts: the folder, the configuration and the space."""

from dataclasses import replace
from operator import attrgetter

from job.config.compatibility import config_differences
from job.config.config_file import CONFIG_FILE, read_config_text
from job.config.field import format_value
from job.config.schema import Config
from job.config.search_space import MAX_TRIALS, Params, SearchConfig, search_differences
from job.config.toml import override_config, search_config_from_toml
from job.console import Console
from job.errors import UserError
from job.run.resume_from import SourceCheckpoint, open_source_checkpoint
from job.run.run_dir import (
    SEARCH_FILE,
    check_resume,
    check_same_text,
    resolve_storage,
    slugify,
    with_resolved_fields,
)
from job.run.setup import build_run_spec, run_warnings
from job.run.text_cache import TextCache
from job.storage import Folder
from job.training.checkpoint import list_checkpoints
from job.tuning.rungs import check_scheduler
from job.tuning.trials import trial_folder, trial_params

_setup_inputs = attrgetter("corpus", "vocabulary", "stream", "model", "train.epochs")  # what build_run_spec reads


def resolve_search(config: Config, search: SearchConfig, default_name: str) -> tuple[Folder, Config]:
    """Returns the folder of the search, and the configuration with its name and what it resolved earlier.

    Raises:
        UserError: the search has too many trials, the name is used by a run or by another search, or ``run.resume``
            forbids to resume or to start the search.
    """
    if search.num_trials > MAX_TRIALS:
        problem = f"search.trials = {search.trials}: {search.num_trials:,} trials, of at most {MAX_TRIALS:,}"
        raise UserError(problem, "set a smaller number" if search.trials else "set a number, or give smaller grids")
    config = replace(config, run=replace(config.run, name=config.run.name or slugify(default_name)))
    folder = resolve_storage(config.run.storage) / config.run.name
    if folder.has(CONFIG_FILE):
        raise UserError(f"{folder}: is a run, not a search", "choose another run.name")
    text = read_config_text(folder, SEARCH_FILE)
    check_resume(config.run.resume, folder, "search", exists=text is not None)
    if text is None:
        return folder, config
    old_config, old_search = search_config_from_toml(text, f"{folder}/{SEARCH_FILE}")
    config = with_resolved_fields(config, old_config)
    differing = search_differences(old_search, search)
    for params in [{}, *search.space.endpoints]:  # trials may have a schedule where the configuration has none
        differing += config_differences(override_config(old_config, params), override_config(config, params))
    if differing:
        raise UserError(
            f"{folder}: is another search: {', '.join(dict.fromkeys(differing))}", "choose another run.name"
        )
    return folder, config


def check_search(
    base: Config, search: SearchConfig, folder: Folder, console: Console, cache: TextCache | None = None
) -> Config:
    """Returns the configuration with its corpus resolved, once every trial is known to be able to start.

    The text and the model are built for the configuration itself and for each endpoint of each field. All
    trials whose parameters are known in advance are checked as configurations.

    Raises:
        UserError: there is nothing to search, the scheduler has no effect, or some parameters do not make a valid run.
    """
    if not search.space.domains:
        raise UserError("search.space: is empty", 'write lines such as "model.dropout" = { uniform = [0, 0.5] } in it')
    if "corpus.validation_fraction" not in search.space.domains:
        _check_metric(base, search)
    spec = build_run_spec(base, folder, cache=cache)
    for warning in run_warnings(spec):
        console.warn(warning)
    base = replace(spec.config, generate=base.generate)  # a trial with another vocabulary has another prefix
    if not any(name.startswith(("corpus.", "vocabulary.")) for name in search.space.domains):
        check_same_text(list_checkpoints(trial_folder(folder, 0) / "checkpoints")[0], spec.dataset)
    source = open_source_checkpoint(spec.config, spec.dataset, trial_folder(folder, 0))
    for count, endpoint in enumerate(search.space.endpoints, 1):
        _check_params(base, search, endpoint, source, folder, cache)
        if count % 10 == 0:
            console.progress(f"checked {count:,} of {len(search.space.endpoints):,} values in search.space")
    for number in range(search.num_trials):
        if params := trial_params(base, search, number):
            _check_params(base, search, params, source)
    check_scheduler(base, search, spec.dataset)
    return base


def _check_params(
    base: Config, search: SearchConfig, params: Params, source: SourceCheckpoint | None, folder: Folder | None = None,
    cache: TextCache | None = None,
) -> None:  # fmt: skip
    """Raises UserError if there can be no run with these parameters; builds the text and model if given a folder."""
    try:
        config = override_config(base, params)
        _check_metric(config, search)
        if source:
            source.check(config)
        if folder and _setup_inputs(config) != _setup_inputs(base):
            build_run_spec(config, folder, cache=cache)
    except UserError as error:
        values = ", ".join(f"{name} = {format_value(value)}" for name, value in params.items())
        raise UserError(f"search.space, at {values}: {error.problem}", error.remedy) from None


def _check_metric(config: Config, search: SearchConfig) -> None:
    if search.metric == "validation_perplexity" and not config.corpus.validation_setting:
        raise UserError(
            "search.metric = validation_perplexity: is never reported, as corpus.validation_fraction = 0",
            "set corpus.validation_fraction = 0.1 or corpus.validation_source, or search.metric = perplexity",
        )
