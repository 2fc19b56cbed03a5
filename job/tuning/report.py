"""A search as text: the banner, the table of trials, the line of progress."""

from textwrap import shorten
from typing import Any

from job.console import Console, format_table
from job.tuning.trials import Trial, Trials


def banner(trials: Trials) -> str:
    """The line that announces a search."""
    search, pending = trials.search, trials.num_pending
    count = f"{pending} of {search.num_trials}" if pending < search.num_trials else f"{pending}"
    space = ", ".join(f"{name} = {domain}" for name, domain in search.space.domains.items())
    note = {"none": "", "asha": ", ASHA stops poor trials early", "pbt": ", poor trials copy good ones (PBT)"}
    size = f"{count} trials, {search.concurrent} at a time{note[search.scheduler]}"
    return f"search {trials.base.run.name}: {size}; {shorten(space, 1000, placeholder=' …')}"


def display_name(metric: str) -> str:
    """The metric in words."""
    return metric.replace("_", " ")


def format_params(trial: Trial) -> str:
    """A trial's parameters in one line."""
    return ", ".join(f"{name} {_format_short(value)}" for name, value in trial.params.items())


def _format_short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_trial(trials: Trials, trial: Trial) -> str:
    """The line that reports the end of a trial."""
    score = trials.score(trial)
    value = f", {display_name(trials.search.metric)} {score:.4g}" if score is not None else ""
    reason = f" ({trial.reason})" if trial.reason else ""
    after = f" after {trial.last_epoch} epochs" if trial.state == "stopped" and trial.scores else ""
    return f"trial {trial.number} {trial.state}{after}{value}: {format_params(trial)}{reason}"


def format_trials(trials: Trials) -> list[str]:
    """All trials as the lines of a table, best first; the winner has a star."""
    names, winner = list(trials.search.space.domains), trials.winner
    rows = [["", "trial", "state", "epochs", display_name(trials.search.metric), *names]]
    for trial in trials.ranked():
        score = trials.score(trial)
        value = f"{score:.4g}" if score is not None else ""
        mark = "*" if trial is winner else ""
        params = [_format_short(trial.params[name]) for name in names]
        rows.append([mark, str(trial.number), trial.state, str(trial.last_epoch), value, *params])
    return format_table(rows)


def show_progress(trials: Trials, console: Console) -> None:
    """Redraws the table of a running search, or prints a line now and then if there is no terminal."""
    winner, total = trials.winner, trials.search.num_trials
    running = sum(trial.state == "running" for trial in trials)
    best = f"; best {trials.score(winner):.4g} with {format_params(winner)}" if winner else ""
    text = f"{total - trials.num_pending} of {total} trials done, {running} running{best}"
    if console.is_tty:
        console.redraw([*format_trials(trials), text])
    else:
        console.progress(text)
