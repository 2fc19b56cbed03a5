"""A search's trials to a table, pictures, Parquet, TensorBoard, and the winner's configuration."""

import io
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from pyarrow import parquet
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import hparams, scalar

from job.config.schema import format_value
from job.config.search_space import Range
from job.config.toml import config_to_toml
from job.console import Console, python_command
from job.errors import RunFailed
from job.inference.generate import generate_text
from job.run.metrics import MAX_PLOTTED_PERPLEXITY
from job.run.run_dir import open_checkpoint, read_existing_run
from job.tuning.trials import BEST_FILE, Trial, Trials, baseline_params, trial_name

SAMPLE_FILE, CURVES_FILE, SPACE_FILE, PARQUET_FILE = "sample.txt", "curves.png", "space.png", "trials.parquet"


# --- text ----


def banner(trials: Trials, room: int) -> str:
    """What begins."""
    search, count = trials.search, num_pending(trials)
    of = f"{count} of {search.num_trials}" if count < search.num_trials else f"{count}"
    stops = {"none": "", "asha": ", the hopeless stopped early", "pbt": ", winners replace losers"}[search.scheduler]
    fields = ", ".join(f"{name} = {domain}" for name, domain in search.space.domains.items())
    return f"search {trials.base.run.name}: {of} trials, {room} at once{stops}; {fields}"


def num_pending(trials: Trials) -> int:
    """Trials that are not over."""
    return trials.search.num_trials - sum(trial.is_over for trial in trials)


def metric_name(metric: str) -> str:
    """The metric as a person calls it."""
    return metric.replace("_", " ")


def format_params(trial: Trial) -> str:
    """A trial's point, in a line."""
    return ", ".join(f"{name} {_short(value)}" for name, value in trial.point.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_trial(trials: Trials, trial: Trial) -> str:
    """How a trial ended."""
    best = trials.best_of(trial)
    value = f", {metric_name(trials.search.metric)} {best:.4g}" if best is not None else ""
    why = f" ({trial.why})" if trial.why else ""
    after = f" after {trial.scores[-1][0]} epochs" if trial.state == "stopped" and trial.scores else ""
    return f"trial {trial.number} {trial.state}{after}{value}: {format_params(trial)}{why}"


def format_table(trials: Trials) -> list[str]:
    """All trials, the best first."""
    names = list(trials.search.space.domains)
    winner = trials.winner
    head = ["", "trial", "state", "epochs", metric_name(trials.search.metric), *names]
    body = []
    for trial in ranked_trials(trials):
        best = trials.best_of(trial)
        values = [_short(trial.point[name]) for name in names]
        epochs = str(trial.scores[-1][0]) if trial.scores else "0"
        mark = "*" if trial is winner else ""
        body.append([mark, str(trial.number), trial.state, epochs, f"{best:.4g}" if best is not None else "", *values])
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *body]
    ]


def ranked_trials(trials: Trials) -> list[Trial]:
    """The trials, best first, those without a score last."""
    unknown = float("inf")

    def place(trial: Trial) -> tuple[float, int]:
        best = trials.best_of(trial)
        return (unknown if best is None else best, trial.number)

    return sorted(trials, key=place)


def show_progress(trials: Trials, console: Console) -> None:
    """What a person sees while the search runs."""
    winner = trials.winner
    running = sum(trial.state == "running" for trial in trials)
    best = f"; best {trials.best_of(winner):.4g} with {format_params(winner)}" if winner else ""
    total = trials.search.num_trials
    text = f"{total - num_pending(trials)} of {total} trials over, {running} running{best}"
    if console.is_tty:
        console.redraw([*format_table(trials), text])
    else:
        console.progress(text)


def print_results(trials: Trials, console: Console) -> None:
    """What came of the search."""
    winner, folder = trials.winner, trials.folder
    assert winner
    for row in format_table(trials):
        console.print(row)
    console.print()
    best = f"{metric_name(trials.search.metric)} {trials.best_of(winner):.4g}"
    console.print(f"best is trial {winner.number}: {best} with {format_params(winner)}")
    if (own := baseline_trial(trials)) and own is not winner and (value := trials.best_of(own)) is not None:
        console.print(f"the configuration's own, trial {own.number}: {value:.4g} with {format_params(own)}")
    console.print()
    console.print(f"    {folder.read(SAMPLE_FILE).decode().rstrip()}")
    console.print()
    found = trials.checkpoint_of(winner)
    assert found
    files = (("best", BEST_FILE), ("curves", CURVES_FILE), ("space", SPACE_FILE), ("results", PARQUET_FILE))
    for name, place in [*((name, folder / file) for name, file in files), ("checkpoint", found.folder / found.name)]:
        console.print(f"{name:<11}{place}")
    console.print(f"{'train':<11}{python_command()} -m job train {(folder / BEST_FILE).shell_quoted}")


def baseline_trial(trials: Trials) -> Trial | None:
    """The trial that is the configuration as it was written."""
    point = baseline_params(trials.base, trials.search)
    return next((trial for trial in trials if trial.point == point), None)


# --- files ----


def write_reports(trials: Trials) -> None:
    """Writes what the search leaves behind; RunFailed where no trial came to anything."""
    winner = trials.winner
    found = trials.checkpoint_of(winner) if winner else None
    if winner is None or found is None:
        whys = [f"; trial {trial.number}: {trial.why}" for trial in trials if trial.why]
        raise RunFailed(f"{trials.folder}: no trial came to a result{''.join(whys[:1])}")
    loaded = open_checkpoint(found.path.address)
    run = read_existing_run(trials.folder_of(winner))
    assert run
    options = replace(
        run.config, run=replace(run.config.run, name="", storage=trials.base.run.storage), scale=trials.base.scale
    )
    value = f"{metric_name(trials.search.metric)} {trials.best_of(winner):.6g}"
    trials.folder.write(SAMPLE_FILE, (generate_text(loaded, options) + "\n").encode())
    trials.folder.write(CURVES_FILE, plot_curves(trials))
    trials.folder.write(SPACE_FILE, plot_score_by_param(trials))
    trials.folder.write(PARQUET_FILE, to_parquet(trials))
    for trial in trials:
        _write_tensorboard(trials, trial)
    trials.folder.write(
        BEST_FILE, f"# Trial {winner.number} of {trials.folder}: {value}.\n{config_to_toml(options)}".encode()
    )


def to_parquet(trials: Trials) -> bytes:
    """A row a trial, as Parquet: its state, its score, and each field by its name."""
    fields = {name: _column([trial.point[name] for trial in trials]) for name in trials.search.space.domains}
    rows = [
        {
            "trial": trial.number,
            "state": trial.state,
            "why": trial.why,
            "epochs": trial.scores[-1][0] if trial.scores else 0,
            trials.search.metric: trials.best_of(trial),
            "best": trial is trials.winner,
            **{name: values[place] for name, values in fields.items()},
        }
        for place, trial in enumerate(trials)
    ]
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _column(values: list[Any]) -> list[Any]:
    """Values of one type, as Parquet wants them: themselves, or as they are written."""
    if len({type(value) for value in values}) > 1:
        return [format_value(value) for value in values]
    return [list(value) if isinstance(value, tuple) else value for value in values]


def _write_tensorboard(trials: Trials, trial: Trial) -> None:
    """The trial as a session of TensorBoard's hyperparameter view."""
    metric, best = trials.search.metric, trials.best_of(trial)
    fields = {
        name: value if isinstance(value, int | float | bool) else str(value) for name, value in trial.point.items()
    }
    begin, session, end = hparams(fields, {metric: best if best is not None else math.nan})
    with tempfile.TemporaryDirectory() as place:
        writer = EventsWriter(str(Path(place) / "events"))
        for summary in [begin, session, end]:
            writer.write_event(Event(wall_time=time.time(), summary=summary))
        for epoch, value in trial.scores:
            writer.write_event(Event(wall_time=time.time(), step=epoch, summary=scalar(metric, value)))
        writer.close()
        (file,) = Path(place).iterdir()
        (trials.folder / "tensorboard" / trial_name(trial.number)).write(
            "events.out.tfevents.search", file.read_bytes()
        )


# --- pictures ----

MARKERS = {"finished": "o", "diverged": "x", "failed": "x"}  # others were left or stopped


def plot_curves(trials: Trials) -> bytes:
    """The metric of all trials over epochs, the best marked, as a PNG."""
    figure, (axes,) = _figure(1)
    winner = trials.winner
    for trial in sorted(trials, key=lambda trial: trial is winner):  # the best above all others
        points = [(epoch, min(value, _clip_at(trials))) for epoch, value in trial.scores]
        if points:
            color, width, alpha = ("C3", 2.2, 1.0) if trial is winner else ("C0", 1.0, 0.45)
            label = format_params(trial) if trial is winner else None
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, alpha=alpha, label=label)
            axes.plot(*points[-1], marker=MARKERS.get(trial.state, "|"), markersize=5, color=color)
    axes.set(title=trials.base.run.name, xlabel="epoch", ylabel=metric_name(trials.search.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _format_score_axis(axes, trials)
    axes.legend(frameon=False)
    return _png(figure)


def plot_score_by_param(trials: Trials) -> bytes:
    """The score of each trial against each field that was searched, the best marked, as a PNG."""
    figure, all_axes = _figure(len(trials.search.space.domains))
    winner = trials.winner
    for axes, (name, domain) in zip(all_axes, trials.search.space.domains.items(), strict=True):
        for trial in trials:
            best = trials.best_of(trial)
            if best is not None:
                value = trial.point[name] if isinstance(domain, Range) else str(trial.point[name])
                color, size = ("C3", 60) if trial is winner else ("C0", 25)
                axes.scatter(value, min(best, _clip_at(trials)), c=color, s=size, marker=MARKERS.get(trial.state, "|"))
        if domain.kind == "loguniform":
            axes.set_xscale("log")
            _label(axes.xaxis, domain.endpoints[0], domain.endpoints[-1])
        axes.set(xlabel=name, ylabel=metric_name(trials.search.metric))
        _format_score_axis(axes, trials)
    return _png(figure)


def _clip_at(trials: Trials) -> float:
    """Where a score is drawn that is beyond comparison with the best."""
    winner = trials.winner
    best = trials.best_of(winner) if winner else None
    return min(MAX_PLOTTED_PERPLEXITY, 8 * best) if best else MAX_PLOTTED_PERPLEXITY


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(7, 4.2 * columns), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _format_score_axis(axes: Axes, trials: Trials) -> None:
    scores = [min(value, _clip_at(trials)) for trial in trials for _, value in trial.scores]
    axes.set_yscale("log")
    _label(axes.yaxis, min(scores), max(scores))
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, few enough to be read."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()
