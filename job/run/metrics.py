"""A run's metrics: the rows of ``metrics.jsonl``, the same for TensorBoard, and the curve."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tensorboardX.event_file_writer import EventsWriter

from job.run.tensorboard import add_row, create_events
from job.storage import Folder

METRICS_FILE = "metrics.jsonl"
MAX_PLOTTED_PERPLEXITY = 1e6  # larger ones are drawn there


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and to the TensorBoard events.

    If the storage cannot append, both files grow in a local folder and ``sync`` uploads them.

    Args:
        folder: the run's folder
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.local_dir = folder.local_path or Path(tempfile.mkdtemp(prefix="lanes-"))  # where the files grow
        self.events: EventsWriter | None = None  # since the first call of truncate

    def rows(self) -> list[dict[str, Any]]:
        """Reads all rows."""
        path = self.local_dir / METRICS_FILE
        if path.exists():
            return parse_rows(path.read_bytes())
        return parse_rows(self.folder.read(METRICS_FILE)) if self.folder.has(METRICS_FILE) else []

    def truncate(self, step: int) -> None:
        """Removes the rows after a step, since workers that resume there report them again.

        Called whenever a worker group starts, before any row is appended.
        """
        rows = [row for row in self.rows() if row["step"] <= step]
        lines = [f"{json.dumps(row)}\n" for row in rows]
        Folder(str(self.local_dir)).write(METRICS_FILE, "".join(lines).encode())
        if self.folder.local_path is None:  # the new events file has another name
            self.folder.remove("tensorboard")
        self._close_events()
        self.events = create_events(self.local_dir / "tensorboard", rows)

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row to both files."""
        with (self.local_dir / METRICS_FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.events:
            add_row(self.events, row)

    def sync(self) -> None:
        """Makes all rows durable: on the disk, or in the storage if it cannot append."""
        if self.events:
            self.events.flush()
        path = self.local_dir / METRICS_FILE
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if self.folder.local_path is None:
            self.folder.upload(self.local_dir)

    def close(self) -> None:
        """Closes the files and removes local copies."""
        self._close_events()
        if self.folder.local_path is None:
            shutil.rmtree(self.local_dir, ignore_errors=True)

    def _close_events(self) -> None:
        if self.events:
            with contextlib.suppress(OSError):  # all that matters was flushed with the last checkpoint
                self.events.close()


def parse_rows(data: bytes) -> list[dict[str, Any]]:
    """Parses ``metrics.jsonl``. Ignores what follows a line that a crash has cut off."""
    rows = []
    with contextlib.suppress(ValueError):
        for line in data.splitlines():
            rows.append(json.loads(line))
    return rows


def plot_perplexity(rows: list[dict[str, Any]], title: str) -> bytes:
    """Draws perplexity, a line for each of training and validation. Returns a PNG file.

    The axis is epochs. It is steps, and the rows of ``train`` are drawn, if these alone make a line.
    """
    figure, (axes,) = new_figure(1)
    splits = [row["split"] for row in rows]
    has_steps_only = splits.count("epoch") < 2 <= splits.count("train")
    x, train_split = ("step", "train") if has_steps_only else ("epoch", "epoch")
    for split, label in ((train_split, "training"), ("validation", "validation")):
        points = [(row[x], min(row["perplexity"], MAX_PLOTTED_PERPLEXITY)) for row in rows if row["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 25 else None, markersize=4, label=label)
            axes.annotate(f"{points[-1][1]:.2f}", points[-1], xytext=(0, 6), textcoords="offset points", ha="right")
    axes.set(title=title, xlabel=x, ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, which="both", alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    return to_png(figure)


def new_figure(num_plots: int) -> tuple[Figure, list[Axes]]:
    """A figure with plots side by side."""
    figure = Figure(figsize=(max(7, 4.2 * num_plots), 4.2), layout="constrained")
    plots = figure.subplots(1, num_plots, squeeze=False)[0]
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(plots)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
