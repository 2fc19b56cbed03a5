"""One worker's part of a run: it trains, validates, saves and reports. Independent of Ray."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from job.config.model import BUILTIN_CELLS
from job.config.schema import Config
from job.distributed.context import World, device_name, raise_malloc_thresholds, use_full_precision
from job.distributed.gradient_sync import ControlFlags
from job.errors import Diverged, UnrecoverableError, UserError
from job.nn.language_model import LanguageModel
from job.training.checkpoint import CorruptCheckpoint, checkpoint_name
from job.training.checkpoint_writer import CheckpointWriter
from job.training.events import Event, Failed, Finished, Started
from job.training.implementation import (
    check_devices,
    check_same_implementation,
    describe_missing_kernel,
    gather_implementations,
)
from job.training.loop import end_epoch, is_done, train_steps
from job.training.progress import Progress
from job.training.reporter import Reporter
from job.training.resume import agree_on_resume_point
from job.training.run_spec import RunSpec
from job.training.sample_schedule import is_sample_due
from job.training.train_state import TrainState, build_train_state
from job.training.validation import is_validation_due, record_validation, validate

PREEMPTION_POLL_S = 5.0  # seconds between two checks for nodes that are about to be removed
OUT_OF_MEMORY_REMEDY = (
    "resume on more scale.workers with a GPU each or with a larger train.accumulate, or start another run with a "
    "smaller stream.batch_size, stream.num_steps or model.hidden_size"
)


Sampler = Callable[[RunSpec, TrainState], list[dict[str, Any]]]


class DriverLink(Protocol):
    """A worker's connection to its driver."""

    def post(self, event: Event) -> None:
        """Sends an event; those of one worker arrive in order. Called from several threads."""

    def control_flags(self) -> ControlFlags:
        """Returns the driver's requests since the last call; called before each step."""

    def preemption_pending(self) -> bool:
        """Whether a node is about to be removed; all workers call it at the same step."""


def train(spec: RunSpec, world: World, link: DriverLink, sampler: Sampler | None = None) -> None:
    """Trains this worker's lanes until the run is done, is stopped, or fails, and posts that as an event.

    Args:
        spec: the run, the same on all workers
        world: this worker's place among them; with more than one, torch's default process group must be initialized
        link: the connection to the driver
        sampler: returns rows of ``samples.jsonl``, leaving the training state as it is; rank 0 calls it

    Raises:
        Exception: whatever is unexpected, so that the workers are restarted
    """
    try:
        configure_process(spec.config, world)
        check_devices(world, spec.config.scale.gpu_requirement)
        train_state, skipped_checkpoints = _resume(spec, world)
        implementations = gather_implementations(world, train_state.precision)
        if spec.config.train.reproducible:
            check_same_implementation(implementations)
        writer = CheckpointWriter(spec, world, link.post)
        reporter = Reporter(world, link.post, train_state, spec)
        reporter.post(_started(spec, world, train_state, skipped_checkpoints, describe_missing_kernel(implementations)))
        sampler = None if world.rank or spec.in_trial else sampler
        Trainer(spec, world, link, train_state, writer, reporter, sampler).run()
    except UnrecoverableError as error:
        link.post(Failed(world.attempt, error))
    except UserError as error:
        link.post(Failed(world.attempt, UnrecoverableError(error.problem, error.remedy)))
    except torch.OutOfMemoryError:
        problem = f"worker {world.rank} of {world.size} has run out of memory on {device_name(world.device)}"
        link.post(Failed(world.attempt, UnrecoverableError(problem, OUT_OF_MEMORY_REMEDY)))
    except OSError as error:
        problem = f"{spec.checkpoints}: a checkpoint cannot be written or read: {error}"
        link.post(Failed(world.attempt, UnrecoverableError(problem)))


def _resume(spec: RunSpec, world: World) -> tuple[TrainState, tuple[CorruptCheckpoint, ...]]:
    """Returns the state to start from, and corrupt checkpoints. What was read is freed when this returns."""
    resume_point, skipped_checkpoints, precision = agree_on_resume_point(spec, world)
    return build_train_state(spec, world, precision, resume_point), skipped_checkpoints


def configure_process(config: Config, world: World) -> None:
    """Sets torch's threads, determinism and products in float32, and malloc's thresholds, for the whole process."""
    raise_malloc_thresholds()
    use_full_precision()
    torch.set_num_threads(1 if config.train.reproducible else world.threads)
    torch.use_deterministic_algorithms(config.train.reproducible)


def _started(
    spec: RunSpec, world: World, train_state: TrainState, skipped: tuple[CorruptCheckpoint, ...], missing_kernel: str
) -> Started:
    progress, device = train_state.progress, device_name(world.device)
    if train_state.shared_memory:
        device += " in shared memory"
    if spec.config.model.cell in BUILTIN_CELLS and missing_kernel:
        device += f" without the compiled kernel ({missing_kernel})"
    num_weights = sum(map(torch.numel, train_state.model.parameters()))
    total_steps = train_state.stream.total_steps(spec.config.train)
    group = world.attempt, progress.step, progress.epoch, world.size
    num_multiplied = _count_multiplied(train_state.model)
    return Started(*group, device, train_state.precision.name, num_weights, total_steps, skipped, num_multiplied)


def _count_multiplied(model: LanguageModel) -> int:
    """Returns how many weights are in matrix products: matrices, of which those that are looked up by token are not."""
    looked_up = set() if model.embedding is None else {id(model.embedding.weight)} - {id(model.linear.weight)}
    vocabulary_size = model.linear.out_features if model.embedding is None else 0  # of one-hot inputs
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1 and id(parameter) not in looked_up]
    return sum(matrix.numel() for matrix in matrices if matrix.shape[-1] != vocabulary_size)


@dataclass
class Trainer:
    """Trains epoch after epoch, validates after each and in between, and saves checkpoints."""

    spec: RunSpec
    world: World
    link: DriverLink
    train_state: TrainState
    writer: CheckpointWriter
    reporter: Reporter
    sampler: Sampler | None = None  # of rank 0, unless no text is sampled
    saved_at: float = field(default_factory=time.monotonic)  # or started at, by the monotonic clock
    preemption_polled_at: float = field(default_factory=time.monotonic)

    @property
    def progress(self) -> Progress:
        """The run's progress."""
        return self.train_state.progress

    def run(self) -> None:
        """Trains to the end, or until a stop is requested.

        Raises:
            Diverged: the loss or a weight is not finite
            OSError: a checkpoint cannot be written
        """
        stopped = False
        try:
            self._finish_truncated_epoch()
            while not stopped and not is_done(self.progress, self.spec.config.train):
                stopped = self._run_epoch()
            if self.writer.last_step != self.progress.step:
                self._save()
            if self.writer.last_step != self.progress.step:
                raise Diverged(f"weights are no longer finite after step {self.progress.step}")
        except Exception as error:
            self.writer.finish()  # the last valid checkpoint is complete before the run ends
            if isinstance(error, Diverged):  # raised by all workers at the same step
                self.writer.wait_for_all()
            raise
        self.writer.finish()
        progress = copy.deepcopy(self.progress)
        checkpoint = checkpoint_name(progress.step, self.world.attempt)
        self.reporter.post(Finished(self.world.attempt, stopped, progress, checkpoint, self.world.size))

    def _run_epoch(self) -> bool:
        """Trains to the end of the current epoch, or until a stop is requested: then returns True."""
        stopped = False
        for step in train_steps(self.train_state, self.spec.config, self._control_flags):
            stopped = step.stats.flags.stop
            self.reporter.report_step(step)
            if self.sampler and is_sample_due(self.train_state, self.spec.config.train, ends_epoch=step.ends_epoch):
                self.reporter.report_samples(self.sampler, self.spec)
            if step.ends_run or step.ends_epoch:
                break
            is_due = is_validation_due(self.progress, self.spec.config.train)
            is_best = is_due and self._validate(self.progress.epoch + 1)
            if stopped or is_done(self.progress, self.spec.config.train):
                break
            if self._is_checkpoint_due(step.stats.flags) or is_best:
                self._save()
        if self.train_state.is_epoch_done:
            epoch = self.progress.epoch + 1
            self.reporter.report_epoch(epoch, end_epoch(self.train_state))
            self._validate(epoch)
        self._finish_truncated_epoch()
        self._save()
        return stopped

    def _finish_truncated_epoch(self) -> None:
        """Reports, once, an epoch that ``max_steps`` or ``patience`` cut short."""
        progress, loss = self.progress, self.progress.epoch_mean
        is_reported = not loss.tokens or progress.last_epoch_nats == loss.nats_per_token
        if is_done(progress, self.spec.config.train) and not is_reported:
            progress.last_epoch_nats = loss.nats_per_token
            self.reporter.report_epoch(progress.epoch + 1, loss)
            self._validate(progress.epoch + 1)

    def _validate(self, epoch: int) -> bool:
        """Validates and reports it, once per step. Returns whether the loss is the lowest so far."""
        if len(self.spec.dataset.validation_tokens) < 2 or self.progress.validated_step == self.progress.step:
            return False
        started_at = time.monotonic()
        loss, raw = validate(self.spec, self.world, self.train_state)
        self.reporter.report_validation(epoch, loss, raw, time.monotonic() - started_at)
        is_best = record_validation(self.progress, loss, raw)
        is_regular = self.progress.window == 0 or is_validation_due(self.progress, self.spec.config.train)
        if is_regular:  # and not at a step where max_steps stops a run that may be resumed
            nats, optimizer_config = self.progress.last_validation_nats, self.spec.config.optimizer
            self.progress.decisions.add(nats, self.progress.step, optimizer_config)
        return is_best

    def _control_flags(self) -> ControlFlags:
        """The driver's requests, to which rank 0 adds what is due by its clock."""
        flags = self.link.control_flags()
        if self.world.rank:
            return flags
        now = time.monotonic()
        check_preemption = now - self.preemption_polled_at >= PREEMPTION_POLL_S
        if check_preemption:
            self.preemption_polled_at = now
        is_due = now - self.saved_at >= self.spec.config.train.checkpoint_seconds and not self.writer.is_busy
        return flags._replace(checkpoint=flags.checkpoint or is_due, check_preemption=check_preemption)

    def _is_checkpoint_due(self, flags: ControlFlags) -> bool:
        every = self.spec.config.train.checkpoint_steps
        is_due_by_step = bool(every) and self.progress.step % every == 0
        return is_due_by_step or flags.checkpoint or (flags.check_preemption and self.link.preemption_pending())

    def _save(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.saved_at
        self.saved_at = now
        self.writer.save(self.train_state)
