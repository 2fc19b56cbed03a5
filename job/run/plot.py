"""The curve of a run's perplexity."""

import io
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_PLOTTED_PERPLEXITY = 1e6  # larger ones are drawn there


def plot_perplexity(rows: Iterable[dict[str, Any]], title: str) -> Figure:
    """Draws perplexity, a line for each of training and validation.

    The axis is epochs; it is steps if there are validations within an epoch. It is steps, too, and the rows of
    ``train`` are drawn, if these alone make a line.
    """
    figure, (axes,) = new_figure(1)
    points = defaultdict[str, list[tuple[int, int, float]]](list)
    for row in rows:
        points[row["split"]].append((row["epoch"], row["step"], min(row["perplexity"], MAX_PLOTTED_PERPLEXITY)))
    training_split = "train" if len(points["epoch"]) < 2 <= len(points["train"]) else "epoch"
    by_step = training_split == "train" or len(points["validation"]) > len(points["epoch"])
    for split, label in ((training_split, "training"), ("validation", "validation")):
        if points[split]:
            epochs, steps, values = zip(*points[split], strict=True)
            x = steps if by_step else epochs
            axes.plot(x, values, marker="o" if len(x) < 25 else None, markersize=4, label=label)
            last, text = (x[-1], values[-1]), f"{values[-1]:.2f}"
            axes.annotate(text, last, xytext=(6, 0), textcoords="offset points", va="center")
    axes.set(title=title, xlabel="step" if by_step else "epoch", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, which="both", alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


class NotebookFigure(Figure):
    """A figure that a notebook shows as a picture, also if pyplot is not imported."""

    def _repr_png_(self) -> bytes:
        return to_png(self)


def new_figure(num_plots: int) -> tuple[Figure, list[Axes]]:
    """A figure with plots side by side."""
    figure = NotebookFigure(figsize=(max(7, 4.2 * num_plots), 4.2), layout="constrained")
    plots = figure.subplots(1, num_plots, squeeze=False)[0]
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(plots)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
