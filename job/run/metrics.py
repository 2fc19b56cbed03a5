"""A run's metrics to a picture."""

import io
import json
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_PLOTTED_PERPLEXITY = 1e6  # a perplexity beyond it is drawn there


def parse_rows(data: bytes) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line that a crash cut short is left out."""
    rows = []
    for line in data.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_perplexity(rows: list[dict[str, Any]], title: str) -> bytes:
    """Perplexity over epochs as a PNG: a line for each split that was measured."""
    figure, (axes,) = new_figure(1)
    named = {"epoch": "training", "validation": "validation"}
    for split, name in named.items():
        points = [
            (row["epoch"], min(row["perplexity"], MAX_PLOTTED_PERPLEXITY)) for row in rows if row["split"] == split
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 25 else None, markersize=4, label=name)
            epoch, last = points[-1]
            axes.annotate(f"{last:.2f}", (epoch, last), xytext=(0, 6), textcoords="offset points", ha="right")
    axes.set(title=title, xlabel="epoch", ylabel="perplexity")
    axes.set_yscale("log")
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
