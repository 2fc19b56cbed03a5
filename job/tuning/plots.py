"""Pictures of a search, as PNG: scores over epochs, and scores against each parameter."""

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from job.config.search_space import Range
from job.run.plot import MAX_PLOTTED_PERPLEXITY, new_figure, to_png
from job.tuning.report import display_name, format_params
from job.tuning.trials import Trial, Trials


def plot_curves(trials: Trials) -> bytes:
    """The metric of all trials over epochs, with the winner highlighted."""
    figure, (axes,) = new_figure(1)
    winner, limit = trials.winner, _score_limit(trials)
    for trial in sorted(trials, key=lambda trial: trial is winner):  # the winner on top of all others
        points = [(epoch, min(value, limit)) for epoch, value in trial.scores]
        if points:
            color, width, alpha = ("C3", 2.2, 1.0) if trial is winner else ("C0", 1.0, 0.45)
            label = _escape_math(format_params(trial)) if trial is winner else None
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, alpha=alpha, label=label)
            axes.plot(*points[-1], marker=_marker(trial), markersize=5, color=color)
    axes.set(title=trials.base.run.name, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _format_score_axis(axes, trials, limit)
    axes.legend(frameon=False)
    return to_png(figure)


def plot_score_by_param(trials: Trials) -> bytes:
    """The score of each trial against each parameter, with the winner highlighted."""
    domains = trials.search.space.domains
    figure, all_axes = new_figure(len(domains))
    winner, limit = trials.winner, _score_limit(trials)
    for axes, (name, domain) in zip(all_axes, domains.items(), strict=True):
        for trial in trials:
            score = trials.score(trial)
            if score is not None:
                value = trial.params[name] if isinstance(domain, Range) else _escape_math(str(trial.params[name]))
                color, size = ("C3", 60) if trial is winner else ("C0", 25)
                axes.scatter(value, min(score, limit), c=color, s=size, marker=_marker(trial))
        if domain.distribution == "loguniform":
            axes.set_xscale("log")
            _format_log_axis(axes.xaxis, domain.values[0], domain.values[-1])
        axes.set_xlabel(name)
        _format_score_axis(axes, trials, limit)
    return to_png(figure)


def _escape_math(text: str) -> str:
    """Returns a text whose dollars matplotlib shows as they are, such as those of a path."""
    return text.replace("$", r"\$")


def _marker(trial: Trial) -> str:
    return {"finished": "o", "diverged": "x", "failed": "x"}.get(trial.state, "|")


def _score_limit(trials: Trials) -> float:
    """Higher scores are clipped to this one: 8 times the winner's."""
    best = trials.score(trials.winner) if trials.winner else None
    return min(MAX_PLOTTED_PERPLEXITY, 8 * best) if best else MAX_PLOTTED_PERPLEXITY


def _format_score_axis(axes: Axes, trials: Trials, limit: float) -> None:
    scores = [min(value, limit) for trial in trials for _, value in trial.scores]
    axes.set_ylabel(display_name(trials.search.metric))
    axes.set_yscale("log")
    _format_log_axis(axes.yaxis, min(scores), max(scores))
    axes.grid(True, alpha=0.25)


def _format_log_axis(axis: Axis, low: float, high: float) -> None:
    """Labels a logarithmic axis with plain numbers, few enough not to overlap."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
