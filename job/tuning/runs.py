"""The runs and searches of a storage, as the ``runs`` verb lists them."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pyarrow import fs

from job.config.config_file import CONFIG_FILE, read_config_text
from job.config.toml import search_config_from_toml
from job.console import Console, format_duration, format_table
from job.errors import UserError, report_os_error
from job.run.driver_log import LOG_FILE, last_level
from job.run.lease import HEARTBEAT_FILE, LEASE_TIMEOUT_S, OWNER_FILE, LeaseObserver
from job.run.metrics import read_last_rows
from job.run.run_dir import RESULT_FILE, SEARCH_FILE, read_result
from job.storage import Folder
from job.training.checkpoint import last_step
from job.tuning.trials import BEST_FILE, DONE_STATES, read_records

NUM_THREADS = 32  # that wait for an object store

Infos = dict[str, fs.FileInfo]  # of the files and folders of a run or search, by name


@dataclass(frozen=True)
class ListedRun:
    """A run or a search. What is unknown or does not apply is None."""

    name: str
    kind: str  # run, search, or unknown
    state: str  # running, finished, failed, stopped, interrupted (its driver died) or unreadable
    changed_at: float | None = None  # Unix seconds of the last change
    step: int | None = None
    perplexity: float | None = None  # of a search: that of its best trial, if the search's metric is this one
    validation_perplexity: float | None = None
    trials_done: int | None = None
    trials: int | None = None
    best_trial: str | None = None


def list_runs(storage: Folder) -> list[ListedRun]:
    """Returns the runs and searches of a storage, the one that changed last first.

    Reads a few small files of each. Folders that are neither a run nor a search are left out.

    Raises:
        UserError: the storage does not exist or cannot be read
    """
    with report_os_error(f"{storage}: cannot be read"):
        if not storage.exists():
            raise UserError(f"{storage}: no such folder", "give the storage whose runs are to be listed")
        folders = [storage / info.base_name for info in storage.infos() if info.type == fs.FileType.Directory]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        runs = [*filter(None, pool.map(_read_folder, folders))]
    return sorted(runs, key=lambda run: (-(run.changed_at or 0.0), run.name))


def _read_folder(folder: Folder) -> ListedRun | None:
    kind, changed_at = "unknown", None
    try:
        infos = {info.base_name: info for info in folder.infos()}
        kind = "search" if SEARCH_FILE in infos else "run" if CONFIG_FILE in infos else ""
        changed_at = max((info.mtime.timestamp() for info in infos.values() if info.mtime), default=None)
        read = {"search": _read_search, "run": _read_run}.get(kind)
        return read(folder, infos, partial(ListedRun, folder.name, kind, changed_at=changed_at)) if read else None
    except (OSError, UserError):
        return ListedRun(folder.name, kind, "unreadable", changed_at)


def _read_run(folder: Folder, infos: Infos, listed: partial[ListedRun]) -> ListedRun:
    if RESULT_FILE in infos and (result := read_result(folder)):
        names = ("perplexity", "validation_perplexity")
        return listed("finished", step=result["steps"], **{name: result.get(name) for name in names})
    rows = read_last_rows(folder)
    steps = [row["step"] for row in rows.values()] + [last_step(folder / "checkpoints")]
    row, validation = rows.get("epoch") or rows.get("train") or {}, rows.get("validation", {})
    return listed(
        _unfinished_state(folder, infos),
        step=max((step for step in steps if step is not None), default=None),
        perplexity=row.get("perplexity"),
        validation_perplexity=validation.get("perplexity"),
    )


def _read_search(folder: Folder, infos: Infos, listed: partial[ListedRun]) -> ListedRun:
    _, search = search_config_from_toml(read_config_text(folder, SEARCH_FILE) or "", SEARCH_FILE)
    records = {name: record for name, record in read_records(folder).items() if record["state"] in DONE_STATES}
    scores = {
        name: record["score"]
        for name, record in records.items()
        if isinstance(record.get("score"), float) and record["state"] != "diverged"
    }
    best = min(scores, key=lambda name: scores[name], default=None)
    return listed(
        "finished" if BEST_FILE in infos else _unfinished_state(folder, infos),
        trials_done=len(records),
        trials=search.num_trials,
        best_trial=best,
        **({search.metric: scores[best]} if best else {}),
    )


def _unfinished_state(folder: Folder, infos: Infos) -> str:
    """Whether a driver holds the lease. Of another host's driver only the age of its last heartbeat is known."""
    if OWNER_FILE not in infos:
        return "failed" if LOG_FILE in infos and last_level(folder) == "ERROR" else "stopped"
    is_held = LeaseObserver(folder).is_held()
    if is_held is None:
        files = [infos[name] for name in (OWNER_FILE, HEARTBEAT_FILE) if name in infos]
        is_held = time.time() - max(info.mtime.timestamp() for info in files) < LEASE_TIMEOUT_S
    return "running" if is_held else "interrupted"


def describe_runs(storage: Folder, runs: list[ListedRun]) -> dict[str, Any]:
    """Returns the runs as a value of JSON."""
    return {"storage": storage.address, "runs": [{**asdict(run), "changed_at": _iso_time(run)} for run in runs]}


def _iso_time(run: ListedRun) -> str | None:
    return None if run.changed_at is None else datetime.fromtimestamp(run.changed_at, UTC).isoformat()


def print_runs(storage: Folder, runs: list[ListedRun], console: Console) -> None:
    """Prints a table of the runs."""
    if not runs:
        return console.print(f"no runs in {storage}")
    header = ["name", "kind", "state", "step", "perplexity", "validation", "age"]
    for line in format_table([header, *map(_table_row, runs)], 3):
        console.print(line, wrap=False)


def _table_row(run: ListedRun) -> list[str]:
    name = run.name if run.name.isprintable() else repr(run.name)
    step = "" if run.step is None else f"{run.step:,}"
    if run.trials is not None:
        step = f"{run.trials_done:,} of {run.trials:,} trials"
    perplexities = [f"{value:.4g}" if value else "" for value in (run.perplexity, run.validation_perplexity)]
    age = "" if run.changed_at is None else format_duration(max(0.0, time.time() - run.changed_at))
    return [name, run.kind, run.state, step, *perplexities, age]
