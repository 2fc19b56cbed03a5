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

from job import config, driver, parse, runs
from job.errors import RunFailed
from job.report import HIGHEST
from job.screen import Screen
from job.search import Range
from job.trials import BEST, Trial, Trials, name_of, own_point

SAMPLE, CURVES, SPACE, PARQUET = "sample.txt", "curves.png", "space.png", "trials.parquet"


# --- text ----


def about(known: Trials, room: int) -> str:
    """What begins."""
    wanted, count = known.search, left(known)
    of = f"{count} of {wanted.total}" if count < wanted.total else f"{count}"
    stops = {"none": "", "asha": ", the hopeless stopped early", "pbt": ", winners replace losers"}[wanted.scheduler]
    fields = ", ".join(f"{name} = {domain}" for name, domain in wanted.space.domains.items())
    return f"search {known.base.run.name}: {of} trials, {room} at once{stops}; {fields}"


def left(known: Trials) -> int:
    """Trials that are not over."""
    return known.search.total - sum(trial.is_over for trial in known)


def spoken(metric: str) -> str:
    """The metric as a person calls it."""
    return metric.replace("_", " ")


def of_point(trial: Trial) -> str:
    """A trial's point, in a line."""
    return ", ".join(f"{name} {_short(value)}" for name, value in trial.point.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line(known: Trials, trial: Trial) -> str:
    """How a trial ended."""
    best = known.best_of(trial)
    value = f", {spoken(known.search.metric)} {best:.4g}" if best is not None else ""
    why = f" ({trial.why})" if trial.why else ""
    after = f" after {trial.scores[-1][0]} epochs" if trial.state == "stopped" and trial.scores else ""
    return f"trial {trial.number} {trial.state}{after}{value}: {of_point(trial)}{why}"


def table(known: Trials) -> list[str]:
    """All trials, the best first."""
    names = list(known.search.space.domains)
    winner = known.winner
    head = ["", "trial", "state", "epochs", spoken(known.search.metric), *names]
    body = []
    for trial in ranked(known):
        best = known.best_of(trial)
        values = [_short(trial.point[name]) for name in names]
        epochs = str(trial.scores[-1][0]) if trial.scores else "0"
        mark = "*" if trial is winner else ""
        body.append([mark, str(trial.number), trial.state, epochs, f"{best:.4g}" if best is not None else "", *values])
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *body]
    ]


def ranked(known: Trials) -> list[Trial]:
    """The trials, best first, those without a score last."""
    unknown = float("inf")

    def place(trial: Trial) -> tuple[float, int]:
        best = known.best_of(trial)
        return (unknown if best is None else best, trial.number)

    return sorted(known, key=place)


def progress(known: Trials, screen: Screen) -> None:
    """What a person sees while the search runs."""
    winner = known.winner
    running = sum(trial.state == "running" for trial in known)
    best = f"; best {known.best_of(winner):.4g} with {of_point(winner)}" if winner else ""
    text = f"{known.search.total - left(known)} of {known.search.total} trials over, {running} running{best}"
    if screen.moving:
        screen.block([*table(known), text])
    else:
        screen.progress(text)


def show(known: Trials, screen: Screen) -> None:
    """What came of the search."""
    winner, folder = known.winner, known.folder
    assert winner
    for row in table(known):
        screen.line(row)
    screen.line()
    best = f"{spoken(known.search.metric)} {known.best_of(winner):.4g}"
    screen.line(f"best is trial {winner.number}: {best} with {of_point(winner)}")
    if (own := configurations_own(known)) and own is not winner and (value := known.best_of(own)) is not None:
        screen.line(f"the configuration's own, trial {own.number}: {value:.4g} with {of_point(own)}")
    screen.line()
    screen.line(f"    {folder.read(SAMPLE).decode().rstrip()}")
    screen.line()
    found = known.checkpoint_of(winner)
    assert found
    files = (("best", BEST), ("curves", CURVES), ("space", SPACE), ("results", PARQUET))
    for name, place in [*((name, folder / file) for name, file in files), ("checkpoint", found.folder / found.name)]:
        screen.line(f"{name:<11}{place}")
    screen.line(f"{'train':<11}{driver.python()} -m job train {(folder / BEST).typed}")


def configurations_own(known: Trials) -> Trial | None:
    """The trial that is the configuration as it was written."""
    point = own_point(known.base, known.search)
    return next((trial for trial in known if trial.point == point), None)


# --- files ----


def write(known: Trials) -> None:
    """Writes what the search leaves behind; RunFailed where no trial came to anything."""
    winner = known.winner
    found = known.checkpoint_of(winner) if winner else None
    if winner is None or found is None:
        whys = [f"; trial {trial.number}: {trial.why}" for trial in known if trial.why]
        raise RunFailed(f"{known.folder}: no trial came to a result{''.join(whys[:1])}")
    _, restored = runs.open_checkpoint((found.folder / found.name).address)
    run = runs.read(known.folder_of(winner))
    assert run
    options = replace(
        run.config, run=replace(run.config.run, name="", storage=known.base.run.storage), scale=known.base.scale
    )
    value = f"{spoken(known.search.metric)} {known.best_of(winner):.6g}"
    known.folder.write(SAMPLE, (driver.sample(restored, options) + "\n").encode())
    known.folder.write(CURVES, curves(known))
    known.folder.write(SPACE, against(known))
    known.folder.write(PARQUET, table_of(known))
    for trial in known:
        _write_board(known, trial)
    known.folder.write(BEST, f"# Trial {winner.number} of {known.folder}: {value}.\n{parse.to_toml(options)}".encode())


def table_of(known: Trials) -> bytes:
    """A row a trial, as Parquet: its state, its score, and each field by its name."""
    fields = {name: _column([trial.point[name] for trial in known]) for name in known.search.space.domains}
    rows = [
        {
            "trial": trial.number,
            "state": trial.state,
            "why": trial.why,
            "epochs": trial.scores[-1][0] if trial.scores else 0,
            known.search.metric: known.best_of(trial),
            "best": trial is known.winner,
            **{name: values[place] for name, values in fields.items()},
        }
        for place, trial in enumerate(known)
    ]
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _column(values: list[Any]) -> list[Any]:
    """Values of one type, as Parquet wants them: themselves, or as they are written."""
    if len({type(value) for value in values}) > 1:
        return [config.shown(value) for value in values]
    return [list(value) if isinstance(value, tuple) else value for value in values]


def _write_board(known: Trials, trial: Trial) -> None:
    """The trial as a session of TensorBoard's hyperparameter view."""
    metric, best = known.search.metric, known.best_of(trial)
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
        (known.folder / "tensorboard" / name_of(trial.number)).write("events.out.tfevents.search", file.read_bytes())


# --- pictures ----

MARKS = {"finished": "o", "diverged": "x", "failed": "x"}  # others were left or stopped


def curves(known: Trials) -> bytes:
    """The metric of all trials over epochs, the best marked, as a PNG."""
    figure, (axes,) = _figure(1)
    winner = known.winner
    for trial in sorted(known, key=lambda trial: trial is winner):  # the best above all others
        points = [(epoch, min(value, _top(known))) for epoch, value in trial.scores]
        if points:
            color, width, alpha = ("C3", 2.2, 1.0) if trial is winner else ("C0", 1.0, 0.45)
            label = of_point(trial) if trial is winner else None
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, alpha=alpha, label=label)
            axes.plot(*points[-1], marker=MARKS.get(trial.state, "|"), markersize=5, color=color)
    axes.set(title=known.base.run.name, xlabel="epoch", ylabel=spoken(known.search.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scores_upwards(axes, known)
    axes.legend(frameon=False)
    return _png(figure)


def against(known: Trials) -> bytes:
    """The score of each trial against each field that was searched, the best marked, as a PNG."""
    figure, all_axes = _figure(len(known.search.space.domains))
    winner = known.winner
    for axes, (name, domain) in zip(all_axes, known.search.space.domains.items(), strict=True):
        for trial in known:
            best = known.best_of(trial)
            if best is not None:
                value = trial.point[name] if isinstance(domain, Range) else str(trial.point[name])
                color, size = ("C3", 60) if trial is winner else ("C0", 25)
                axes.scatter(value, min(best, _top(known)), c=color, s=size, marker=MARKS.get(trial.state, "|"))
        if domain.kind == "loguniform":
            axes.set_xscale("log")
            _label(axes.xaxis, domain.corners[0], domain.corners[-1])
        axes.set(xlabel=name, ylabel=spoken(known.search.metric))
        _scores_upwards(axes, known)
    return _png(figure)


def _top(known: Trials) -> float:
    """Where a score is drawn that is beyond comparison with the best."""
    winner = known.winner
    best = known.best_of(winner) if winner else None
    return min(HIGHEST, 8 * best) if best else HIGHEST


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(7, 4.2 * columns), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _scores_upwards(axes: Axes, known: Trials) -> None:
    scores = [min(value, _top(known)) for trial in known for _, value in trial.scores]
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
