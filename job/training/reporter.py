"""Metrics and progress of a worker group, posted by rank 0."""

import time
from collections.abc import Callable
from typing import Any

from job.data.text_size import bits_per_unit
from job.distributed.context import World
from job.training.events import Event, EventSink, MetricsRow, ProgressUpdate, Sampled
from job.training.loop import StepResult
from job.training.progress import LossSum, finite_or_none, perplexity
from job.training.run_spec import RunSpec
from job.training.train_state import TrainState

PROGRESS_INTERVAL_S = 0.5  # seconds between two progress updates


class Throughput:
    """A stopwatch for training speed."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.started_at = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, without excluded ones."""
        return time.monotonic() - self.started_at

    def exclude(self, seconds: float) -> None:
        """Leaves out seconds that were not spent training."""
        self.started_at += seconds

    def tokens_per_second(self, tokens: int) -> float:
        """Returns the mean speed since the start, and starts again.

        Args:
            tokens: tokens that the run has processed so far
        """
        speed = (tokens - self.tokens) / max(self.elapsed_s, 1e-9)
        self.tokens, self.started_at = tokens, time.monotonic()
        return speed


class Reporter:
    """Posts metrics rows and progress updates. All workers call it in the same way; only rank 0 posts."""

    def __init__(self, world: World, post: EventSink, train_state: TrainState, spec: RunSpec) -> None:
        self.world, self.post_event, self.train_state, self.dataset = world, post, train_state, spec.dataset
        self.log_every = spec.config.train.log_every  # steps; 0: once per epoch
        tokens = train_state.progress.tokens
        self.report_speed, self.progress_speed, self.epoch_speed = (Throughput(tokens) for _ in range(3))

    def post(self, event: Event) -> None:
        """Posts an event from rank 0."""
        if self.world.rank == 0:
            self.post_event(event)

    def report_step(self, step: StepResult) -> None:
        """Reports a step: a metrics row every ``log_every`` steps, and progress updates."""
        progress = self.train_state.progress
        if (progress.step % self.log_every == 0) if self.log_every else step.ends_epoch:
            loss, progress.report_mean = progress.report_mean, LossSum()
            self._post_row("train", progress.epoch + 1, loss, self.report_speed.tokens_per_second(progress.tokens))
        if self.progress_speed.elapsed_s >= PROGRESS_INTERVAL_S:
            speed, nats = self.progress_speed.tokens_per_second(progress.tokens), progress.epoch_mean.nats_per_token
            self.post(ProgressUpdate(self.world.attempt, progress.epoch + 1, progress.step, nats, speed))

    def report_epoch(self, epoch: int, loss: LossSum) -> None:
        """Reports the training loss of a whole epoch (from 1)."""
        self._post_row("epoch", epoch, loss, self.epoch_speed.tokens_per_second(self.train_state.progress.tokens))

    def report_validation(self, epoch: int, loss: LossSum, raw: LossSum | None, seconds: float) -> None:
        """Reports the validation loss in or after an epoch (from 1), which took ``seconds`` to compute.

        ``raw`` is that of the weights themselves if they are averaged.
        """
        self._exclude(seconds)
        more = bits_per_unit(loss.nats, self.dataset.validation_size) if self.world.rank == 0 else {}
        if raw:
            more = {"nats_raw": raw.nats_per_token, **more}
        finite = {name: finite_or_none(value) for name, value in more.items()}
        self._post_row("validation", epoch, loss, loss.tokens / seconds, **finite)

    def report_samples(self, sampler: Callable[[RunSpec, TrainState], list[dict[str, Any]]], spec: RunSpec) -> None:
        """Samples text and reports it."""
        started_at = time.monotonic()
        self.post(Sampled(self.world.attempt, tuple(sampler(spec, self.train_state))))
        self._exclude(time.monotonic() - started_at)

    def _exclude(self, seconds: float) -> None:
        """Leaves seconds that were not spent training out of all speeds."""
        for speed in (self.report_speed, self.progress_speed, self.epoch_speed):
            speed.exclude(seconds)

    def _post_row(self, split: str, epoch: int, loss: LossSum, tokens_per_second: float, **more: float | None) -> None:
        row = {
            "split": split,
            "epoch": epoch,
            "step": self.train_state.progress.step,
            "tokens": self.train_state.progress.tokens,
            "nats": loss.nats_per_token,
            "perplexity": perplexity(loss.nats_per_token),
            **more,
            "unknown_share": self.dataset.unknown_shares["validation" if split == "validation" else "training"],
            "learning_rate": self.train_state.learning_rate,
            "tokens_per_second": round(tokens_per_second, 1),
            "workers": self.world.size,
            "time": round(time.time(), 3),
        }
        self.post(MetricsRow(self.world.attempt, row))
