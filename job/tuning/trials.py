"""A search's folder: its trials, which are ordinary runs, what each came to, and which is best.

The truth about a trial is its own run's folder. What that cannot tell (that a scheduler stopped the
trial, or that it failed, and why) stands in ``trials.json``, which the search's driver alone writes.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from job.config.schema import Config, config_differences, format_value
from job.config.search_space import METRIC_SPLITS, Params, SearchConfig, search_differences
from job.config.toml import ConfigValues, config_to_toml, override_config, search_config_from_toml
from job.errors import UserError
from job.run.metrics import parse_rows
from job.run.recorder import METRICS_FILE
from job.run.run_dir import (
    CONFIG_FILE,
    SEARCH_FILE,
    check_same_text,
    check_storage_outlives_job,
    read_existing_run,
    slugify,
    with_resolved_corpus,
)
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.checkpoint import MANIFEST, Checkpoint, copy_checkpoint, list_checkpoints, read_manifest

TRIALS_FILE = "trials.json"
BEST_FILE = "best.toml"  # the winner's configuration, as train takes it; written when all else is
TRIALS_DIR = "trials"  # the folder with a run for each trial
EXCHANGED_FILE = "exchanged"  # in a run's folder: the checkpoint that it last gave or took
DONE_STATES = ("finished", "stopped", "diverged")  # a trial that is over is not taken up again
TERMINAL_STATES = (*DONE_STATES, "failed")  # one that failed is, when the search is started again
_MAX_FILE_BYTES = 64 << 20  # bytes of a record


@dataclass
class Trial:
    """One point of the space, and what is known of its run."""

    number: int
    point: Params
    state: str = "waiting"  # waiting, running, or one of ENDS
    why: str = ""
    scores: list[tuple[int, float]] = field(default_factory=list)  # (epoch, the metric)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.state in DONE_STATES


def trial_name(number: int) -> str:
    """The name of a trial's run."""
    return f"{number:05d}"


def with_params(base: Config, point: Params) -> Config:
    """The configuration at a point of the space; UserError where there can be none."""
    values: ConfigValues = {}
    for name, value in point.items():
        section, key = name.split(".")
        values.setdefault(section, {})[key] = value
    return override_config(base, values)


def config_value(config: Config, name: str) -> Any:
    """The value of a field such as ``optimizer.learning_rate``."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def baseline_params(base: Config, search: SearchConfig) -> Params | None:
    """The configuration's own point, where it lies in a space that is drawn from: it is tried first."""
    own = {name: config_value(base, name) for name in search.space.domains}
    return own if search.space.contains(own) else None


def trial_params(base: Config, search: SearchConfig, number: int) -> Params | None:
    """The point of a trial; None where a model chooses it when it is time."""
    if number == 0 and (own := baseline_params(base, search)):
        return own
    return None if search.searcher == "optuna" else search.space.sample(base.run.seed, number)


def trial_config(base: Config, folder: Folder, number: int, point: Params) -> Config:
    """The configuration of a trial's run."""
    run = replace(base.run, name=trial_name(number), storage=(folder / TRIALS_DIR).address, resume="auto")
    return with_params(replace(base, run=run), point)


def row_score(row: dict[str, Any], metric: str) -> float | None:
    """What a row of metrics says of the metric; None where it is of another kind."""
    return float(row["perplexity"]) if row["split"] == METRIC_SPLITS[metric] else None


# --- before the first trial --------------------------------------------------------------------


def resolve_search(config: Config, search: SearchConfig, stem: str) -> tuple[Folder, Config]:
    """The search's folder and the configuration, in which what was resolved before stays so.

    UserError where the name is taken by another search, or ``run.resume`` does not allow what is
    found.
    """
    check_storage_outlives_job(config.run.storage)
    name = config.run.name or slugify(stem)
    folder = Folder.resolve(config.run.storage) / name
    config = replace(config, run=replace(config.run, name=name))
    try:
        text = folder.read(SEARCH_FILE, _MAX_FILE_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError):
        if folder.has(CONFIG_FILE):
            raise UserError(f"{folder}: is a run and not a search; choose another run.name") from None
        if config.run.resume == "must":
            raise UserError(f"run.resume = must: there is no search at {folder} to go on with") from None
        return folder, config
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{SEARCH_FILE}: cannot be read: {error}") from None
    if config.run.resume == "never":
        raise UserError(f"run.resume = never: {folder} exists; choose another run.name or remove it")
    earlier, before = search_config_from_toml(text, f"{folder}/{SEARCH_FILE}")
    config = with_resolved_corpus(config, earlier)
    differing = config_differences(earlier, config) + search_differences(before, search)
    if differing:
        raise UserError(f"{folder}: is another search: {', '.join(differing)}; choose another run.name")
    return folder, config


def check_search(base: Config, search: SearchConfig, folder: Folder) -> Config:
    """The configuration with its text resolved; UserError for whatever keeps a trial from running.

    Tried are the configuration itself and each field at its ends, with text and model; every point
    that is known before is made a configuration of.
    """
    if not search.space.domains:
        raise UserError('nothing to search: write [search.space] with lines such as "optimizer.learning_rate" = …')
    if "corpus.validation_fraction" not in search.space.domains:
        _check_metric(base, search)
    spec = build_run_spec(base, folder)
    base = spec.config
    if not any(name.startswith(("corpus.", "vocabulary.")) for name in search.space.domains):
        check_same_text(folder / TRIALS_DIR / trial_name(0) / "checkpoints", spec.dataset.metadata)
    endpoints = search.space.endpoints
    trials = [trial_params(base, search, number) for number in range(search.num_trials)]
    for point in [*endpoints, *(point for point in trials if point)]:
        try:
            options = with_params(base, point)
            _check_metric(options, search)
            if point in endpoints and _text_and_model(options) != _text_and_model(base):
                build_run_spec(options, folder)
        except UserError as error:
            where = ", ".join(f"{name} = {format_value(value)}" for name, value in point.items())
            raise UserError(f"search.space, at {where}: {error}") from None
    return base


def _text_and_model(config: Config) -> tuple[Any, ...]:
    """What ``prepare`` looks at."""
    return (config.corpus, config.vocabulary, config.stream, config.model, config.train.epochs)


def _check_metric(config: Config, search: SearchConfig) -> None:
    if search.metric == "validation_perplexity" and not config.corpus.validation_fraction:
        raise UserError(
            "search.metric = validation_perplexity: is never reported, as corpus.validation_fraction = 0: "
            "keep some text to validate (0.1), or use search.metric = perplexity"
        )


def is_trial_finished(folder: Folder, config: Config, search: SearchConfig) -> bool:
    """Whether an earlier start has done all that is asked for, and written down what came of it."""
    trials = Trials(folder, config, search)
    return folder.has(BEST_FILE) and len(list(trials)) == search.num_trials and all(trial.is_over for trial in trials)


# --- what is known -----------------------------------------------------------------------------


class Trials:
    """A search's trials, by number; known from the folder, and written down as they end."""

    def __init__(self, folder: Folder, base: Config, search: SearchConfig) -> None:
        self.folder, self.base, self.search = folder, base, search
        self.lock = threading.Lock()  # Ray Tune tells in a thread of its own
        self.found: dict[int, Trial] = {}
        self.marks = self._marks()
        for number in range(search.num_trials):
            trial = self._read(number, self.marks.get(trial_name(number), {}))
            if trial:
                self.found[number] = trial

    def __iter__(self) -> Iterator[Trial]:
        with self.lock:
            return iter(sorted(self.found.values(), key=lambda trial: trial.number))

    def folder_of(self, trial: Trial) -> Folder:
        """The folder of a trial's run."""
        return self.folder / TRIALS_DIR / trial_name(trial.number)

    def _marks(self) -> dict[str, dict[str, Any]]:
        """How trials ended, also those that are not asked for this time."""
        try:
            found = json.loads(self.folder.read(TRIALS_FILE, _MAX_FILE_BYTES))
            marks = {
                name: {**mark, "state": str(mark["state"]), "why": str(mark["why"])} for name, mark in found.items()
            }
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(f"{self.folder}/{TRIALS_FILE}: cannot be read: {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{self.folder}/{TRIALS_FILE}: not a record of trials; remove it to try again what failed"
            ) from None
        return marks

    def _read(self, number: int, mark: dict[str, Any]) -> Trial | None:
        """A trial as an earlier start of the search left it; None where its point is not known yet."""
        place = self.folder / TRIALS_DIR / trial_name(number)
        run = read_existing_run(place)
        point = trial_params(self.base, self.search, number)
        if run:
            point = {name: config_value(run.config, name) for name in self.search.space.domains}
        if not point:
            return None
        trial = Trial(number, point, scores=self._scores(place) if run else [])
        if run and run.is_finished(trial_config(self.base, self.folder, number, point)):
            trial.state = "finished"
        elif mark.get("state") in TERMINAL_STATES and mark["state"] != "finished":
            trial.state, trial.why = mark["state"], mark["why"]
        return trial

    def _scores(self, place: Folder) -> list[tuple[int, float]]:
        return [
            (row["epoch"], value)
            for row in read_trial_rows(place)
            if (value := row_score(row, self.search.metric)) is not None
        ]

    def begin(self, number: int, point: Params) -> None:
        """A trial runs, perhaps again, and perhaps at a new point."""
        with self.lock:
            trial = self.found.setdefault(number, Trial(number, point))
            trial.point, trial.state, trial.why = point, "running", ""

    def report(self, number: int, epoch: int, value: float) -> bool:
        """A trial's metric after an epoch; those of later epochs are of a life before. True where it is new."""
        with self.lock:
            trial = self.found[number]
            new = not trial.scores or epoch > trial.scores[-1][0]
            trial.scores = [(at, before) for at, before in trial.scores if at < epoch] + [(epoch, value)]
            return new

    def end(self, number: int, state: str, why: str = "") -> None:
        """A trial's end, written down."""
        with self.lock:
            trial = self.found[number]
            trial.state, trial.why = state, why
            self.marks[trial_name(number)] = {"state": state, "why": why, "point": trial.point}
            record = json.dumps(dict(sorted(self.marks.items())), indent=1, ensure_ascii=False).encode()
        self.folder.write(TRIALS_FILE, record)

    # --- which is best ---

    def best_of(self, trial: Trial) -> float | None:
        """A trial's score: its best validation, whose checkpoint is kept, or its last epoch's.

        What a member of a population scored before it took another's place is no longer its own.
        """
        values = [value for _, value in trial.scores]
        if not values:
            return None
        return min(values) if self.keeps_best else values[-1]

    @property
    def keeps_best(self) -> bool:
        """Whether a trial's best checkpoint is its result, and not its last one."""
        return self.search.metric == "validation_perplexity" and self.search.scheduler != "pbt"

    @property
    def winner(self) -> Trial | None:
        """The trial with the lowest score, the earlier of equals; not one that failed."""
        scored = [trial for trial in self if self.best_of(trial) is not None]
        sound = [trial for trial in scored if trial.state not in ("diverged", "failed")]
        return min(sound, key=lambda trial: (self.best_of(trial), trial.number), default=None)

    def checkpoint_of(self, trial: Trial) -> Checkpoint | None:
        """The checkpoint that scored best, or the last one."""
        place = self.folder_of(trial) / "checkpoints"
        kept, _ = list_checkpoints(place)
        scored = [entry for entry in kept if entry.validation_nats is not None]
        if self.keeps_best and scored:
            return min(scored, key=lambda entry: entry.validation_nats or 0.0)
        return kept[-1] if kept else None


# --- what goes from one trial to another -------------------------------------------------------


def export_checkpoint(found: Checkpoint, place: Folder, to: Folder) -> None:
    """Copies a checkpoint of the run in ``place``, for the trials that will go on from it."""
    copy_checkpoint(found, to)
    place.write(EXCHANGED_FILE, found.name.encode())


def import_checkpoint(source: Folder, place: Folder, config: Config) -> None:
    """Has the run in ``place`` go on from the one checkpoint in ``source``, with these options.

    Whatever is interrupted, the run goes on from its own last checkpoint or from this one. One that
    it gave or took last comes again when its process has died, and it has gone further since.
    """
    (name,) = source.names()
    run = read_existing_run(place)
    if run and run.config == config and place.has(EXCHANGED_FILE) and place.read(EXCHANGED_FILE, 100).decode() == name:
        return
    copy_checkpoint(read_manifest(source, name), place / "checkpoints")
    for other in (place / "checkpoints").names():
        if other != name:
            (place / "checkpoints" / other).remove(MANIFEST)
            (place / "checkpoints").remove(other)
    place.write(CONFIG_FILE, config_to_toml(config).encode())
    place.write(EXCHANGED_FILE, name.encode())


def read_trial_rows(place: Folder) -> list[dict[str, Any]]:
    """The rows of metrics that a run has written so far."""
    try:
        return parse_rows(place.read(METRICS_FILE))
    except OSError:
        return []
