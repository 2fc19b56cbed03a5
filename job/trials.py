"""A search's folder: its trials, which are ordinary runs, what each came to, and which is best.

The truth about a trial is its own run's folder. What that cannot tell (that a scheduler stopped the
trial, or that it failed, and why) stands in ``trials.json``, which the search's driver alone writes.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from job import checkpoint, config, parse, report, runs, search
from job.config import Config
from job.errors import UserError
from job.prepare import prepare
from job.record import METRICS
from job.search import Point, Search
from job.storage import Folder

RECORD = "trials.json"
BEST = "best.toml"  # the winner's configuration, as train takes it; written when all else is
RUNS = "trials"  # the folder with a run for each trial
EXCHANGED = "exchanged"  # in a run's folder: the checkpoint that it last gave or took
OVER = ("finished", "stopped", "diverged")  # a trial that is over is not taken up again
ENDS = (*OVER, "failed")  # one that failed is, when the search is started again
_LARGEST = 64 << 20  # bytes of a record


@dataclass
class Trial:
    """One point of the space, and what is known of its run."""

    number: int
    point: Point
    state: str = "waiting"  # waiting, running, or one of ENDS
    why: str = ""
    scores: list[tuple[int, float]] = field(default_factory=list)  # (epoch, the metric)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.state in OVER


def name_of(number: int) -> str:
    """The name of a trial's run."""
    return f"{number:05d}"


def at(base: Config, point: Point) -> Config:
    """The configuration at a point of the space; UserError where there can be none."""
    values: parse.Values = {}
    for name, value in point.items():
        section, key = name.split(".")
        values.setdefault(section, {})[key] = value
    return parse.override(base, values)


def value_of(options: Config, name: str) -> Any:
    """The value of a field such as ``optimizer.learning_rate``."""
    section, key = name.split(".")
    return getattr(getattr(options, section), key)


def own_point(base: Config, wanted: Search) -> Point | None:
    """The configuration's own point, where it lies in a space that is drawn from: it is tried first."""
    own = {name: value_of(base, name) for name in wanted.space.domains}
    return own if wanted.space.holds(own) else None


def point_of(base: Config, wanted: Search, number: int) -> Point | None:
    """The point of a trial; None where a model chooses it when it is time."""
    if number == 0 and (own := own_point(base, wanted)):
        return own
    return None if wanted.searcher == "optuna" else wanted.space.point(base.run.seed, number)


def options_of(base: Config, folder: Folder, number: int, point: Point) -> Config:
    """The configuration of a trial's run."""
    run = replace(base.run, name=name_of(number), storage=(folder / RUNS).address, resume="auto")
    return at(replace(base, run=run), point)


def score(row: dict[str, Any], metric: str) -> float | None:
    """What a row of metrics says of the metric; None where it is of another kind."""
    return float(row["perplexity"]) if row["split"] == search.METRICS[metric] else None


# --- before the first trial --------------------------------------------------------------------


def choose(options: Config, wanted: Search, stem: str) -> tuple[Folder, Config]:
    """The search's folder and the configuration, in which what was resolved before stays so.

    UserError where the name is taken by another search, or ``run.resume`` does not allow what is
    found.
    """
    runs.refuse_storage_that_a_job_loses(options.run.storage)
    name = options.run.name or runs.plain(stem)
    folder = Folder.at(options.run.storage) / name
    options = replace(options, run=replace(options.run, name=name))
    try:
        text = folder.read(runs.SEARCH, _LARGEST).decode()
    except (FileNotFoundError, NotADirectoryError):
        if folder.has(runs.CONFIG):
            raise UserError(f"{folder}: is a run and not a search; choose another run.name") from None
        if options.run.resume == "must":
            raise UserError(f"run.resume = must: there is no search at {folder} to go on with") from None
        return folder, options
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{runs.SEARCH}: cannot be read: {error}") from None
    if options.run.resume == "never":
        raise UserError(f"run.resume = never: {folder} exists; choose another run.name or remove it")
    earlier, before = parse.search_from_toml(text, f"{folder}/{runs.SEARCH}")
    options = runs.as_resolved(options, earlier)
    differing = config.differences(earlier, options) + search.differences(before, wanted)
    if differing:
        raise UserError(f"{folder}: is another search: {', '.join(differing)}; choose another run.name")
    return folder, options


def check(base: Config, wanted: Search, folder: Folder) -> Config:
    """The configuration with its text resolved; UserError for whatever keeps a trial from running.

    Tried are the configuration itself and each field at its ends, with text and model; every point
    that is known before is made a configuration of.
    """
    if not wanted.space.domains:
        raise UserError('nothing to search: write [search.space] with lines such as "optimizer.learning_rate" = …')
    if "corpus.validation_fraction" not in wanted.space.domains:
        _check_metric(base, wanted)
    plan, _ = prepare(base, folder)
    base = plan.config
    if not any(name.startswith(("corpus.", "vocabulary.")) for name in wanted.space.domains):
        runs.check_same_text(folder / RUNS / name_of(0) / "checkpoints", plan.corpus)
    corners = wanted.space.corners
    known = [point_of(base, wanted, number) for number in range(wanted.total)]
    for point in [*corners, *(point for point in known if point)]:
        try:
            options = at(base, point)
            _check_metric(options, wanted)
            if point in corners and _text_and_model(options) != _text_and_model(base):
                prepare(options, folder)
        except UserError as error:
            where = ", ".join(f"{name} = {config.shown(value)}" for name, value in point.items())
            raise UserError(f"search.space, at {where}: {error}") from None
    return base


def _text_and_model(options: Config) -> tuple[Any, ...]:
    """What ``prepare`` looks at."""
    return (options.corpus, options.vocabulary, options.stream, options.model, options.train.epochs)


def _check_metric(options: Config, wanted: Search) -> None:
    if wanted.metric == "validation_perplexity" and not options.corpus.validation_fraction:
        raise UserError(
            "search.metric = validation_perplexity: is never reported, as corpus.validation_fraction = 0: "
            "keep some text to validate (0.1), or use search.metric = perplexity"
        )


def is_finished(folder: Folder, options: Config, wanted: Search) -> bool:
    """Whether an earlier start has done all that is asked for, and written down what came of it."""
    known = Trials(folder, options, wanted)
    return folder.has(BEST) and len(list(known)) == wanted.total and all(trial.is_over for trial in known)


# --- what is known -----------------------------------------------------------------------------


class Trials:
    """A search's trials, by number; known from the folder, and written down as they end."""

    def __init__(self, folder: Folder, base: Config, wanted: Search) -> None:
        self.folder, self.base, self.search = folder, base, wanted
        self.lock = threading.Lock()  # Ray Tune tells in a thread of its own
        self.found: dict[int, Trial] = {}
        self.marks = self._marks()
        for number in range(wanted.total):
            trial = self._read(number, self.marks.get(name_of(number), {}))
            if trial:
                self.found[number] = trial

    def __iter__(self) -> Iterator[Trial]:
        with self.lock:
            return iter(sorted(self.found.values(), key=lambda trial: trial.number))

    def folder_of(self, trial: Trial) -> Folder:
        """The folder of a trial's run."""
        return self.folder / RUNS / name_of(trial.number)

    def _marks(self) -> dict[str, dict[str, Any]]:
        """How trials ended, also those that are not asked for this time."""
        try:
            found = json.loads(self.folder.read(RECORD, _LARGEST))
            marks = {
                name: {**mark, "state": str(mark["state"]), "why": str(mark["why"])} for name, mark in found.items()
            }
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(f"{self.folder}/{RECORD}: cannot be read: {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{self.folder}/{RECORD}: not a record of trials; remove it to try again what failed"
            ) from None
        return marks

    def _read(self, number: int, mark: dict[str, Any]) -> Trial | None:
        """A trial as an earlier start of the search left it; None where its point is not known yet."""
        place = self.folder / RUNS / name_of(number)
        run = runs.read(place)
        point = point_of(self.base, self.search, number)
        if run:
            point = {name: value_of(run.config, name) for name in self.search.space.domains}
        if not point:
            return None
        trial = Trial(number, point, scores=self._scores(place) if run else [])
        if run and run.is_finished(options_of(self.base, self.folder, number, point)):
            trial.state = "finished"
        elif mark.get("state") in ENDS and mark["state"] != "finished":
            trial.state, trial.why = mark["state"], mark["why"]
        return trial

    def _scores(self, place: Folder) -> list[tuple[int, float]]:
        return [(row["epoch"], value) for row in rows(place) if (value := score(row, self.search.metric)) is not None]

    def begin(self, number: int, point: Point) -> None:
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
            self.marks[name_of(number)] = {"state": state, "why": why, "point": trial.point}
            record = json.dumps(dict(sorted(self.marks.items())), indent=1, ensure_ascii=False).encode()
        self.folder.write(RECORD, record)

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

    def checkpoint_of(self, trial: Trial) -> checkpoint.Checkpoint | None:
        """The checkpoint that scored best, or the last one."""
        place = self.folder_of(trial) / "checkpoints"
        kept = [entry for entry in checkpoint.committed(place) if not isinstance(entry, str)]
        scored = [entry for entry in kept if entry.validation_nats is not None]
        if self.keeps_best and scored:
            return min(scored, key=lambda entry: entry.validation_nats or 0.0)
        return kept[-1] if kept else None


# --- what goes from one trial to another -------------------------------------------------------


def give(found: checkpoint.Checkpoint, place: Folder, to: Folder) -> None:
    """Copies a checkpoint of the run in ``place``, for the trials that will go on from it."""
    checkpoint.copy(found, to)
    place.write(EXCHANGED, found.name.encode())


def take(source: Folder, place: Folder, options: Config) -> None:
    """Has the run in ``place`` go on from the one checkpoint in ``source``, with these options.

    Whatever is interrupted, the run goes on from its own last checkpoint or from this one. One that
    it gave or took last comes again when its process has died, and it has gone further since.
    """
    (name,) = source.names()
    run = runs.read(place)
    if run and run.config == options and place.has(EXCHANGED) and place.read(EXCHANGED, 100).decode() == name:
        return
    checkpoint.copy(checkpoint.read_manifest(source, name), place / "checkpoints")
    for other in (place / "checkpoints").names():
        if other != name:
            (place / "checkpoints" / other).remove(checkpoint.MANIFEST)
            (place / "checkpoints").remove(other)
    place.write(runs.CONFIG, parse.to_toml(options).encode())
    place.write(EXCHANGED, name.encode())


def rows(place: Folder) -> list[dict[str, Any]]:
    """The rows of metrics that a run has written so far."""
    try:
        return report.read_rows(place.read(METRICS))
    except OSError:
        return []
