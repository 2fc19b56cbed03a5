"""The trials of a search: parameters, states and scores, read from the search's folder.

A trial's own run folder is the source of truth. Only what it cannot show (that a scheduler stopped the
trial, or that it failed, and why) is in ``trials.json``, which the driver of the search alone writes.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from job.config.config_file import read_config_text
from job.config.schema import Config
from job.config.search_space import METRIC_SPLITS, Params, SearchConfig
from job.config.toml import override_config, search_config_from_toml
from job.documents import parse_json
from job.errors import UserError, report_os_error
from job.run.metrics import read_rows
from job.run.run_dir import SEARCH_FILE, ExistingRun, read_existing_run
from job.storage import Folder
from job.training.checkpoint import Checkpoint, list_checkpoints
from job.training.progress import MAX_PERPLEXITY

TRIALS_DIR = "trials"  # in a search's folder: one run per trial
TRIALS_FILE = "trials.json"
BEST_FILE = "best.toml"  # the winner; written last: it marks the search as finished
DONE_STATES = ("finished", "stopped", "diverged")  # never run again
TERMINAL_STATES = (*DONE_STATES, "failed")  # failed trials run again when the search is restarted
_MAX_RECORDS_BYTES = 64 << 20

Records = dict[str, dict[str, Any]]  # how trials ended, by trial name; the content of trials.json


# --- the parameters of a trial and the configuration of its run ---


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


# --- the state of all trials ---


@dataclass
class Trial:
    """A trial's parameters, and what its run has reported."""

    number: int
    params: Params
    state: str = "waiting"  # waiting, running, or one of TERMINAL_STATES
    reason: str = ""  # why it diverged or failed
    scores: list[tuple[int, float]] = field(default_factory=list)  # (epoch, metric)

    @property
    def is_done(self) -> bool:
        """Whether it will not run again."""
        return self.state in DONE_STATES

    @property
    def last_epoch(self) -> int:
        """The epoch of the last score, or 0."""
        return self.scores[-1][0] if self.scores else 0


class Trials:
    """A search's trials, iterated in the order of their numbers. Safe to use from several threads.

    Trials whose parameters Optuna has not chosen yet are absent.
    """

    def __init__(self, folder: Folder, base: Config, search: SearchConfig, records: Records) -> None:
        self.folder, self.base, self.search, self.records = folder, base, search, records
        self.by_number: dict[int, Trial] = {}
        self.lock = threading.Lock()  # Ray Tune calls back in a thread of its own

    def __iter__(self) -> Iterator[Trial]:
        with self.lock:
            return iter(sorted(self.by_number.values(), key=lambda trial: trial.number))

    @property
    def num_pending(self) -> int:
        """How many trials are not done."""
        return self.search.num_trials - sum(trial.is_done for trial in self)

    # --- changes, as the trials run ---

    def start(self, number: int, params: Params) -> None:
        """Marks a trial as running, possibly again and with new parameters."""
        with self.lock:
            trial = self.by_number.setdefault(number, Trial(number, params))
            trial.params, trial.state, trial.reason = params, "running", ""

    def report(self, number: int, epoch: int, score: float) -> bool:
        """Stores a score and drops those of this and later epochs, which an earlier attempt reported.

        Returns whether the epoch is beyond all that were reported before.
        """
        with self.lock:
            trial = self.by_number[number]
            is_new = not trial.scores or epoch > trial.last_epoch
            trial.scores = [entry for entry in trial.scores if entry[0] < epoch] + [(epoch, score)]
            return is_new

    def end(self, number: int, state: str, reason: str = "") -> None:
        """Sets a trial's terminal state, which the next ``write_records`` stores."""
        with self.lock:
            trial = self.by_number[number]
            trial.state, trial.reason = state, reason
            record = {"state": state, "why": reason, "point": trial.params}
            score = self.score(trial)
            self.records[trial_name(number)] = record if score is None else {**record, "score": score}

    def write_records(self) -> None:
        """Writes ``trials.json``."""
        with self.lock:
            data = json.dumps(dict(sorted(self.records.items())), indent=1, ensure_ascii=False).encode()
        self.folder.write(TRIALS_FILE, data)

    # --- the best trial ---

    @property
    def uses_best_checkpoint(self) -> bool:
        """Whether a trial's result is its best checkpoint rather than its last.

        False for population-based training: a trial that copied another's weights no longer has the
        weights of its earlier scores.
        """
        return self.search.metric == "validation_perplexity" and self.search.scheduler != "pbt"

    def score(self, trial: Trial) -> float | None:
        """The metric of a trial's result, or None if it has not reported one."""
        values = [value for _, value in trial.scores]
        if not values:
            return None
        return min(values) if self.uses_best_checkpoint else values[-1]

    def ranked(self) -> list[Trial]:
        """The trials, best first, those without a score last."""
        return sorted(self, key=lambda trial: (not trial.scores, self.score(trial) or 0.0, trial.number))

    @property
    def winner(self) -> Trial | None:
        """The trial with the lowest score, the first of equals, without those that diverged or failed."""
        valid = (trial for trial in self.ranked() if trial.scores and trial.state not in ("diverged", "failed"))
        return next((trial for trial in valid if (self.score(trial) or 0.0) < MAX_PERPLEXITY), None)

    def checkpoint(self, trial: Trial) -> Checkpoint | None:
        """The checkpoint of a trial's result, or None if it has written none."""
        checkpoints, _ = list_checkpoints(trial_folder(self.folder, trial.number) / "checkpoints")
        validated = [checkpoint for checkpoint in checkpoints if checkpoint.validation_nats is not None]
        if self.uses_best_checkpoint and validated:
            return min(validated, key=lambda checkpoint: checkpoint.validation_nats or 0.0)
        return checkpoints[-1] if checkpoints else None


# --- reading a search's folder ---


def load_trials(folder: Folder, base: Config, search: SearchConfig) -> Trials:
    """Reads the trials that earlier runs of the search left. Raises UserError if they cannot be read."""
    records = read_records(folder)
    with report_os_error(f"{folder / TRIALS_DIR}: cannot be read"):
        started = set((folder / TRIALS_DIR).names())  # one request, however many trials have not been started
    trials = Trials(folder, base, search, records)
    for number in range(search.num_trials):
        name = trial_name(number)
        run = read_trial_run(folder, base, search, number) if name in started else None
        if trial := _load_trial(trials, number, run):
            trials.by_number[number] = trial
    return trials


def finished_checkpoints(folder: Folder) -> list[Folder]:
    """Returns the checkpoint of each finished trial's result, in the order of the trials.

    Raises:
        UserError: the search cannot be read, or no trial is finished
    """
    base, search = search_config_from_toml(read_config_text(folder, SEARCH_FILE) or "", f"{folder}/{SEARCH_FILE}")
    trials = load_trials(folder, base, search)
    with report_os_error(f"{folder}: cannot be read"):
        checkpoints = [trials.checkpoint(trial) for trial in trials if trial.state == "finished"]
    if not any(checkpoints):
        raise UserError(f"{folder}: no trial of this search is finished", "wait, or give the runs of its trials")
    return [checkpoint.path for checkpoint in checkpoints if checkpoint]


def read_records(folder: Folder) -> Records:
    """How trials ended, including those beyond the number of trials of this search."""
    try:
        items = parse_json(folder.read(TRIALS_FILE, _MAX_RECORDS_BYTES)).items()
        return {name: {**record, "state": str(record["state"]), "why": str(record["why"])} for name, record in items}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{folder}/{TRIALS_FILE}: cannot be read: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{folder}/{TRIALS_FILE}: invalid content", "remove it to retry failed trials") from None


def _load_trial(trials: Trials, number: int, run: ExistingRun | None) -> Trial | None:
    """A trial as an earlier run of the search left it, or None if its parameters are not chosen yet."""
    base, search = trials.base, trials.search
    params = params_of(run.config, search) if run else trial_params(base, search, number)
    if not params:
        return None
    rows = read_score_rows(trial_folder(trials.folder, number), search.metric) if run else []
    trial = Trial(number, params, scores=[(row["epoch"], row["perplexity"]) for row in rows])
    record = trials.records.get(trial_name(number), {})
    if run and run.is_finished(trial_config(base, trials.folder, number, params)):
        trial.state = "finished"
    elif record.get("state") == "failed" or (run and record.get("state") in ("stopped", "diverged")):
        trial.state, trial.reason = record["state"], record["why"]
    return trial


def read_trial_run(folder: Folder, base: Config, search: SearchConfig, number: int) -> ExistingRun | None:
    """The run of a trial, or None if it has not started.

    Raises UserError if its cell is not one of the search's: a stored configuration must not choose the code to import.
    """
    run = read_existing_run(trial_folder(folder, number))
    if run and run.config.model.cell not in searched_cells(base, search):
        problem = f"{trial_folder(folder, number)}: model.cell = {run.config.model.cell}: is not a cell of this search"
        raise UserError(problem, "remove the folder")
    return run


def read_score_rows(run_folder: Folder, metric: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics for a search's metric, one per epoch. Empty if they cannot be read."""
    try:
        rows = list(read_rows(run_folder))
    except OSError:
        return []
    epoch_steps = {row["step"] for row in rows if row["split"] == "epoch"}  # train.validate_every adds rows in between
    return [row for row in rows if row["split"] == METRIC_SPLITS[metric] and row["step"] in epoch_steps]
