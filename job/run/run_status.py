"""Whether a run's workers are running and whether the run has ended; shows its progress on the console."""

import logging
from collections.abc import Sequence
from typing import Any

from job.config.schema import Config
from job.console import LARGEST_COUNT, Console, format_count, format_duration
from job.errors import UnrecoverableError
from job.run.peak import share_of_peak
from job.training.events import Event, Finished, Started
from job.training.progress import perplexity

MAX_CONSECUTIVE_FAILURES = 6
_logger = logging.getLogger(__name__)


class RunStatus:
    """The state of a run's worker groups; reports its changes on the console."""

    def __init__(self, config: Config, console: Console) -> None:
        self.config, self.console = config, console
        self.attempts: list[str] = []
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.failed: UnrecoverableError | None = None
        self.has_workers = False
        self.failure_reported = False  # by one of the current workers
        self.last_sample = ""
        self.consecutive_failures = 0  # of worker groups, without a checkpoint in between

    def is_stale(self, event: Event) -> bool:
        """Whether an event is from workers that have been replaced."""
        return event.attempt in self.attempts[:-1]

    def start_attempt(self, event: Started) -> None:
        """Makes a new worker group the current one."""
        self.attempts.append(event.attempt)
        self.started, self.finished, self.has_workers, self.failure_reported = event, None, True, False
        place = f"on {event.device}, {event.precision}"
        _logger.info("attempt starts: workers = %d %s, step = %d", event.workers, place, event.step)

    def report_crash(self, message: str) -> None:
        """Shows the error of a worker."""
        self.failure_reported = True
        self.console.warn(message)

    def end_attempt(self, message: str) -> None:
        """Records that no worker group is running. Fails the run after too many failures without a checkpoint.

        Args:
            message: what failed; empty if the group was only resized. It is shown unless a worker has reported
                its error, which a killed worker cannot.
        """
        _logger.info("attempt ended: %s", message or "it is replaced by workers of another number")
        if message and not self.failure_reported:
            self.console.warn(message)
        self.has_workers = self.failure_reported = False
        self.consecutive_failures += bool(message)
        if self.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            self.failed = UnrecoverableError(
                f"the workers failed {MAX_CONSECUTIVE_FAILURES} times without reaching a checkpoint; last: {message}"
            )

    def print_start(self) -> None:
        """Shows the model and the workers, and the step at which they resume."""
        assert self.started
        event, config = self.started, self.config
        workers = f"{event.workers} worker{'s' * (event.workers != 1)}"
        if len(self.attempts) > 1:
            return self.console.print(f"resuming from step {event.step:,} on {workers}")
        sizes = config.model.layer_sizes
        layers = f"{len(sizes)} × {sizes[0]}" if 1 == len(set(sizes)) < len(sizes) else "-".join(map(str, sizes))
        self.console.print(
            f"{config.model.cell} {layers}, {event.num_weights:,} weights; "
            f"{config.stream.batch_size} lanes × {config.stream.num_steps} steps; "
            f"{workers} on {event.device}, {event.precision}"
        )
        if event.step:
            self.console.print(f"resuming from step {event.step:,} of {format_count(event.total_steps)}")

    def show_row(self, row: dict[str, Any]) -> None:
        """Shows the row of an epoch or a validation."""
        if row["split"] != "train":
            label = "validation " if row["split"] == "validation" else ""
            self.show_progress(row["epoch"], row["step"], row["nats"], row["tokens_per_second"], label)

    def show_samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Shows the last of some samples with the progress from now on."""
        self.last_sample = "".join(row["prefix"] + row["continuation"] for row in rows[-1:]) or self.last_sample

    def show_progress(self, epoch: int, step: int, nats: float, tokens_per_second: float, label: str = "") -> None:
        """Shows where the run is, and the time that is left at this speed."""
        assert self.started
        tokens_per_step = self.config.stream.batch_size * self.config.stream.num_steps
        tokens_left = min((self.started.total_steps - step) * tokens_per_step, LARGEST_COUNT)
        seconds_left = tokens_left / max(tokens_per_second, 1.0)
        value = perplexity(nats)
        value_text = f"{value:.2f}" if value < 1e6 else f"{value:.3g}"
        share = share_of_peak(self.started, tokens_per_second)
        peak_text = "" if share is None or label else f"{100 * share:.3g}% of peak  "
        self.console.progress(
            f"epoch {format_count(epoch)}/{format_count(self.config.train.epochs)}  "
            f"step {format_count(step)}/{format_count(self.started.total_steps)}  "
            f"{label}perplexity {value_text}  {format_count(round(tokens_per_second))} tokens/s  "
            f"{peak_text}{format_duration(seconds_left)} left",
            min(step, LARGEST_COUNT) / max(1, min(self.started.total_steps, LARGEST_COUNT)),
            self.last_sample,
        )
