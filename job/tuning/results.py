"""The results of a finished search: the winner's configuration and sample, pictures, Parquet, TensorBoard."""

import io
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import hparams, scalar

from job.config.field import format_value
from job.config.toml import config_to_toml
from job.console import Console, program_command
from job.errors import RunFailed
from job.inference.generate import generate_text
from job.run.run_dir import open_checkpoint
from job.tuning.plots import plot_curves, plot_score_by_param
from job.tuning.report import display_name, format_params, format_trials
from job.tuning.trials import (
    BEST_FILE,
    Trial,
    Trials,
    baseline_params,
    read_score_rows,
    read_trial_run,
    trial_folder,
    trial_name,
)

SAMPLE_FILE = "sample.txt"  # in the search's folder, as the following
CURVES_FILE, SPACE_FILE, PARQUET_FILE = "curves.png", "space.png", "trials.parquet"


def has_results(trials: Trials) -> bool:
    """Whether the search has been finished and what ``print_results`` reads still exists."""
    winner, names = trials.winner, trials.folder.names()
    return bool(winner and {BEST_FILE, SAMPLE_FILE} <= set(names) and trials.checkpoint(winner))


def write_results(trials: Trials) -> None:
    """Writes all result files to the search's folder. Raises RunFailed if no trial has a score and a checkpoint."""
    winner, folder = trials.winner, trials.folder
    if winner is None:
        reasons = [f": trial {trial.number}: {trial.reason}" for trial in trials if trial.reason]
        raise RunFailed(f"{folder}: no trial produced a result{''.join(reasons[:1])}")
    checkpoint = trials.checkpoint(winner)
    if checkpoint is None:
        raise RunFailed(f"{trial_folder(folder, winner.number)}: has no checkpoint", "remove it to run it again")
    loaded = open_checkpoint(checkpoint.path)
    run = read_trial_run(folder, trials.base, trials.search, winner.number)
    assert run
    config = replace(
        run.config, run=replace(run.config.run, name="", storage=trials.base.run.storage), scale=trials.base.scale
    )
    folder.write(SAMPLE_FILE, (generate_text(loaded, config) + "\n").encode())
    folder.write(CURVES_FILE, plot_curves(trials))
    folder.write(SPACE_FILE, plot_score_by_param(trials))
    folder.write(PARQUET_FILE, to_parquet(trials))
    for trial in trials:
        _write_tensorboard(trials, trial)
    score = f"{display_name(trials.search.metric)} {trials.score(winner):.6g}"
    folder.write(BEST_FILE, f"# Trial {winner.number} of {folder}: {score}.\n{config_to_toml(config)}".encode())


def to_parquet(trials: Trials) -> bytes:
    """Returns a Parquet table with one row per trial: its state, its score, and each parameter by its name."""
    winner = trials.winner
    columns = {
        "trial": [trial.number for trial in trials],
        "state": [trial.state for trial in trials],
        "why": [trial.reason for trial in trials],
        "epochs": [trial.last_epoch for trial in trials],
        trials.search.metric: [trials.score(trial) for trial in trials],
        "best": [trial is winner for trial in trials],
    }
    columns |= {name: _column([trial.params[name] for trial in trials]) for name in trials.search.space.domains}
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _column(values: list[Any]) -> list[Any]:
    """The values of a Parquet column, which has one type: unchanged, or as TOML text if their types differ."""
    if len({type(value) for value in values}) > 1:
        return [format_value(value) for value in values]
    return [list(value) if isinstance(value, tuple) else value for value in values]


def _write_tensorboard(trials: Trials, trial: Trial) -> None:
    """Writes a trial as a session of TensorBoard's hyperparameter view."""
    metric, score = trials.search.metric, trials.score(trial)
    params = {name: value if isinstance(value, int | float) else str(value) for name, value in trial.params.items()}
    summaries = hparams(params, {metric: math.nan if score is None else score})
    events = [Event(wall_time=time.time(), summary=summary) for summary in summaries]
    for row in read_score_rows(trial_folder(trials.folder, trial.number), metric):
        wall_time = row.get("time") or time.time()  # rows of earlier versions have no time
        events.append(Event(wall_time=wall_time, step=row["epoch"], summary=scalar(metric, row["perplexity"])))
    with tempfile.TemporaryDirectory() as directory:
        writer = EventsWriter(f"{directory}/events")
        for event in events:
            writer.write_event(event)
        writer.close()
        (file,) = Path(directory).iterdir()
        target = trials.folder / "tensorboard" / trial_name(trial.number)
        target.write("events.out.tfevents.search", file.read_bytes())


def print_results(trials: Trials, console: Console) -> None:
    """Prints the table, the winner, its sample and the paths of the result files."""
    winner, folder = trials.winner, trials.folder
    checkpoint = trials.checkpoint(winner) if winner else None
    assert winner
    assert checkpoint
    score = f"{display_name(trials.search.metric)} {trials.score(winner):.4g}"
    lines = [*format_trials(trials), "", f"best is trial {winner.number}: {score} with {format_params(winner)}"]
    params = baseline_params(trials.base, trials.search)
    baseline = next((trial for trial in trials if trial.params == params), None)
    if baseline and baseline is not winner and baseline.scores:
        value = f"{trials.score(baseline):.4g} with {format_params(baseline)}"
        lines.append(f"the configuration itself, trial {baseline.number}: {value}")
    lines += ["", f"    {folder.read(SAMPLE_FILE).decode(errors='replace').rstrip()}", ""]
    files = (("best", BEST_FILE), ("curves", CURVES_FILE), ("space", SPACE_FILE), ("results", PARQUET_FILE))
    lines += [f"{name:<11}{folder / file}" for name, file in files]
    lines.append(f"{'checkpoint':<11}{checkpoint.path}")
    lines.append(f"{'train':<11}{program_command()} train {(folder / BEST_FILE).shell_quoted}")
    console.print("\n".join(lines), wrap=False)
