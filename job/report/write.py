"""Writes the report of runs and searches, as the verb ``report`` does and as each run and search does at its end."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from job.config.config_file import read_config_text
from job.config.model import ModelConfig
from job.config.toml import search_config_from_toml
from job.console import Console
from job.errors import UserError, report_os_error
from job.inference.generate import NO_CUSTOM_CELL
from job.report.page import NoLibrary, check_library, render_page
from job.report.run_data import NothingToShow, ReportedRun
from job.run.driver import RunOutcome
from job.run.run_dir import SEARCH_FILE, ExistingRun, read_existing_run
from job.run.text_cache import TextCache
from job.storage import Folder
from job.tuning.report import display_name
from job.tuning.trials import Trials, load_trials, read_trial_run, trial_folder, trial_name

REPORT_FILE = "report.html"  # in the folder of a run or search
MAX_TRIALS = 20  # of a search: the best ones
MAX_TEXTS = 6  # runs of which the losses of a text are computed


def write_report(targets: Sequence[str], output: str | None, console: Console) -> str:
    """Writes a report of runs and searches and returns its path.

    Args:
        targets: the folders, at least one
        output: the file; None: ``report.html`` in the folder of the first one
        console: shows the preparation of a large text

    Raises:
        UserError: a folder contains neither a run with metrics nor a search with such a trial, the file cannot be
            written, or the plotting library is not installed
    """
    check_library()
    folders = [Folder.resolve(target) for target in targets]
    file = Folder.resolve(output) if output is not None else folders[0] / REPORT_FILE
    runs = [run for folder in folders for run in _find_runs(folder)]
    names = Counter(run.name for run in runs)
    runs = [replace(run, name=str(run.folder)) if names[run.name] > 1 else run for run in runs]
    with report_os_error(f"{file}: cannot be written"):
        if not file.name or file.is_folder:
            raise UserError(f"{file}: is a folder", "name a file in it, such as report.html")
        if file.local_path and file.local_path.exists() and not file.local_path.is_file():  # it would be replaced
            raise UserError(f"{file}: is a device or pipe", "name a file, such as report.html")
        if file.parent.local_path and not file.parent.exists():  # an object store has no folders
            raise UserError(f"{file.parent}: no such folder", "create it, or choose another --output")
    page = _render(runs, ", ".join(folder.name for folder in folders), TextCache(console, is_local=True))
    with report_os_error(f"{file}: cannot be written"):
        file.parent.write(file.name, page)
    return str(file)


def report_run(outcome: RunOutcome, console: Console) -> None:
    """Writes ``report.html`` in the folder of a run that has been finished or stopped.

    A failure is shown as a warning: the run itself is complete. Does nothing without metrics, or if nothing was
    trained.
    """
    if outcome.dataset is None:
        return
    run = ReportedRun(
        outcome.folder,
        outcome.folder.name,
        ExistingRun(outcome.config, outcome.result),
        dataset=outcome.dataset,
        model_config=outcome.config.model,
    )
    _write_at_end(outcome.folder, lambda: [run], console)


def report_search(trials: Trials, console: Console) -> None:
    """Writes ``report.html`` in a search's folder at its end; as ``report_run``."""
    _write_at_end(trials.folder, lambda: _trial_runs(trials, trials.base.model), console)


def _write_at_end(folder: Folder, find_runs: Callable[[], Iterable[ReportedRun]], console: Console) -> None:
    path = folder / REPORT_FILE
    try:
        check_library()
        page = _render([*find_runs()], folder.name, TextCache(console, is_local=True))
        replace(folder, retry=False).write(REPORT_FILE, page)
        console.print(f"{'report':<11}{path}", wrap=False)
    except NoLibrary as error:
        console.print(f"report: {error.remedy}")
    except NothingToShow:
        pass
    except Exception as error:  # whatever it is, it must not fail a run that is complete
        console.warn(f"{path} was not written: {error}")


def _find_runs(folder: Folder) -> Iterator[ReportedRun]:
    """Yields the run in a folder, or the trials of the search there."""
    with report_os_error(f"{folder}: cannot be read"):
        search_text = read_config_text(folder, SEARCH_FILE)
    if search_text is not None:
        base, search = search_config_from_toml(search_text, f"{folder}/{SEARCH_FILE}")
        yield from _trial_runs(load_trials(folder, base, search))
    elif run := read_existing_run(folder):
        yield ReportedRun(folder, folder.name, run)
    else:
        raise UserError(f"{folder}: contains neither a run nor a search", "give one, such as runs/seed-1")


def _trial_runs(trials: Trials, model_config: ModelConfig = NO_CUSTOM_CELL) -> Iterator[ReportedRun]:
    """Yields the best trials, the best first; the winner's text is shown.

    Args:
        trials: of the search
        model_config: its cell as the user gave it

    Raises:
        NothingToShow: no trial has a score
    """
    ranked = [trial for trial in trials.ranked() if trial.scores][:MAX_TRIALS]
    if not ranked:
        raise NothingToShow(f"{trials.folder}: no trial of this search has a result yet", "wait for the first epoch")
    metric = f"search: {display_name(trials.search.metric)}"
    for trial in ranked:
        if run := read_trial_run(trials.folder, trials.base, trials.search, trial.number):
            yield ReportedRun(
                trial_folder(trials.folder, trial.number),
                f"{trials.folder.name}/{trial_name(trial.number)}",
                run,
                has_text=trial is trials.winner,
                model_config=model_config,
                more={"trial_state": trial.state, metric: trials.score(trial)},
            )


def _render(runs: Sequence[ReportedRun], title: str, cache: TextCache) -> bytes:
    with_text = [number for number, run in enumerate(runs) if run.has_text][:MAX_TEXTS]
    described = [replace(run, has_text=number in with_text).describe(cache) for number, run in enumerate(runs)]
    first = described[0]["config"]
    differences = [
        name for name in first if any(run["config"][name]["text"] != first[name]["text"] for run in described)
    ]
    return render_page({"title": title, "time": time.time(), "runs": described, "differences": differences})
