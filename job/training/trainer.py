"""One worker's whole run, from a plan and a place in the world to events; Ray is not needed.

What a worker has to tell goes out as events, what is asked of it comes in as signals.
"""

import copy
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from job.config.schema import BUILTIN_CELLS, Config
from job.data.lanes import lane_groups_of_worker
from job.data.stream import Stream
from job.distributed.context import World, device_name, raise_malloc_thresholds, resolve_precision
from job.distributed.gradient_sync import AllReduceGradients, ControlFlags, DeterministicGradients, LaneAssignment
from job.distributed.shared_memory import create_group
from job.distributed.tree_reduce import tree_sum
from job.errors import Diverged, UnrecoverableError, UserError
from job.kernels.ops import kernel_unavailable_reason
from job.nn.language_model import build_model, load_weights
from job.nn.state import map_state
from job.storage import Folder
from job.training.checkpoint import (
    CorruptCheckpoint,
    LoadedCheckpoint,
    checkpoint_name,
    find_latest_valid,
    load_checkpoint,
    load_lane_state,
    parse_safetensors,
    raise_if_all_corrupt,
)
from job.training.checkpoint_writer import CheckpointWriter
from job.training.cuda_graph import CudaGraphTrainStep, supports_cuda_graph
from job.training.events import Event, Failed, Finished, MetricsRow, ProgressUpdate, Started
from job.training.loop import StepResult, TrainState, end_epoch, evaluate_lanes, is_done, train_steps
from job.training.optimizer import build_optimizer, load_state_tensors
from job.training.progress import LossSum, Progress, perplexity
from job.training.run_spec import RunSpec
from job.training.train_step import EagerTrainStep

PROGRESS_INTERVAL_S = 0.5  # seconds between two signs of life
CHECKPOINT_SCAN_TIMEOUT_S = 1800.0  # seconds in which one worker finds the last sound checkpoint for all
PREEMPTION_POLL_S = 5.0  # seconds between two looks for nodes that are about to go


class DriverLink(Protocol):
    """What ties a worker to its driver."""

    def post(self, event: Event) -> None:
        """Tells the driver; events of one worker arrive in order."""

    def signals(self) -> ControlFlags:
        """What this worker asks of all at the step that comes."""

    def preemption_pending(self) -> bool:
        """Whether a node is about to be taken away; all workers ask at the same step."""


def train(spec: RunSpec, world: World, link: DriverLink) -> None:
    """Trains this worker's lanes to the end, to a stop, or to a failure, and tells which."""
    try:
        _Worker(spec, world, link).run()
    except UnrecoverableError as error:
        link.post(Failed(world.attempt, error))
    except UserError as error:
        link.post(Failed(world.attempt, UnrecoverableError(error.problem, error.remedy)))
    except CorruptCheckpoint as error:
        link.post(Failed(world.attempt, UnrecoverableError(str(error))))
    except OSError as error:
        problem = f"{spec.checkpoints}: a checkpoint cannot be written or read: {error}"
        link.post(Failed(world.attempt, UnrecoverableError(problem)))


def build_train_state(
    spec: RunSpec, stream: Stream, world: World, loaded: LoadedCheckpoint | None, precision_name: str
) -> tuple[TrainState, str]:
    """This worker's share of the run as the checkpoint has it, or new; and the precision's name."""
    options, device = spec.config, world.device
    if loaded:  # a run keeps its precision wherever it goes on
        precision_name = loaded.metadata["precision"]
    precision = resolve_precision(precision_name, device)
    model = build_model(options.model, len(spec.dataset.vocabulary), options.run.seed).to(device, precision.weights)
    if loaded:
        load_weights(model, loaded.weights, str(spec.checkpoints))
    elif spec.init:
        load_weights(model, parse_safetensors(spec.init), options.model.init)
    optimizer = build_optimizer(options.optimizer, model)
    if loaded:
        load_state_tensors(optimizer, model, loaded.optimizer)
    share = _lane_assignment(options, stream, world, precision.autocast)
    gradients = (DeterministicGradients if options.train.reproducible else AllReduceGradients)(model, share)
    direct = EagerTrainStep(gradients, optimizer, options.optimizer.grad_clip_norm, device)
    update = CudaGraphTrainStep(direct) if supports_cuda_graph(model, share) else direct
    progress = loaded.progress if loaded else Progress()
    train_state = TrainState(model, optimizer, update, stream, stream.total_steps(options.train), share, progress)
    if loaded:
        progress.restarts += 1
        state = load_lane_state(loaded.checkpoint, share.lanes)
        train_state.state = map_state(lambda part: part.to(device), state)
    return train_state, precision.name


def _lane_assignment(config: Config, stream: Stream, world: World, autocast: torch.dtype | None) -> LaneAssignment:
    reproducible = config.train.reproducible
    split = config.train.lane_groups if reproducible else 0
    groups = lane_groups_of_worker(config.stream.batch_size, split, world.rank, world.size)
    on_processors = world.size > 1 and world.device.type == "cpu"
    near = create_group(config.scale.hang_timeout) if on_processors else None
    return LaneAssignment(groups, world.size, stream.tokens_per_step, autocast, config.model.dropout, near)


class _Worker:
    """The run as one worker sees it: the epochs, and what is reported and saved on the way."""

    def __init__(self, spec: RunSpec, world: World, link: DriverLink) -> None:
        self.options, self.world, self.link = spec.config, world, link
        raise_malloc_thresholds()
        torch.set_num_threads(1 if self.options.train.reproducible else world.threads)
        torch.use_deterministic_algorithms(self.options.train.reproducible)
        self.validation = spec.dataset.validation_tokens
        stream = Stream(spec.dataset.train_tokens, self.options.stream, self.options.run.seed)
        loaded, self.skipped_checkpoints, precision = self._agreed(spec.checkpoints)
        self.train_state, self.precision = build_train_state(spec, stream, world, loaded, precision)
        self.writer = CheckpointWriter(spec, world, link.post, self.precision)
        self.rate = self.options.optimizer.learning_rate
        self.report_lap = self.pulse_lap = _Throughput(self.progress.tokens)
        self.epoch_lap = _Throughput(self.progress.tokens)
        self.clock = self.saved_at = self.looked_at = time.monotonic()

    def _agreed(self, folder: Folder) -> tuple[LoadedCheckpoint | None, tuple[CorruptCheckpoint, ...], str]:
        """The last sound checkpoint, what is wrong with later ones, and the precision for a new run.

        One worker looks and chooses, so that all do the same on whatever they run.
        """
        loaded, chosen = None, list[Any]([None])
        if self.world.rank == 0:
            loaded, skipped_checkpoints = find_latest_valid(folder)
            if not loaded:
                raise_if_all_corrupt(folder, skipped_checkpoints)
            precision = resolve_precision(self.options.train.precision, self.world.device).name
            chosen = [(loaded and loaded.checkpoint, skipped_checkpoints, precision)]
        if self.world.size > 1:  # of many parts in a slow store it takes longer than any step may
            retry = dist.new_group(backend="gloo", timeout=timedelta(seconds=CHECKPOINT_SCAN_TIMEOUT_S))
            dist.broadcast_object_list(chosen, group=retry)
            dist.destroy_process_group(retry)
        checkpoint, skipped_checkpoints, precision = chosen[0]
        if checkpoint and not loaded:
            loaded = load_checkpoint(checkpoint)
        return loaded, skipped_checkpoints, precision

    @property
    def progress(self) -> Progress:
        return self.train_state.progress

    def run(self) -> None:
        self._announce()
        stopped = False
        try:
            self._close_what_was_cut()
            while not stopped and not is_done(self.progress, self.options.train):
                stopped = self._epoch()
            if self.writer.last != self.progress.step:
                self._save()
            if self.writer.last != self.progress.step:
                raise Diverged(f"weights are no longer finite after step {self.progress.step}")
        except Exception as error:
            self.writer.finish()  # what was good is kept
            if isinstance(error, Diverged) and self.world.size > 1:  # all workers see it at the same step
                dist.barrier()
            raise
        self.writer.finish()
        last = copy.deepcopy(self.progress)
        name = checkpoint_name(last.step, self.world.attempt)
        self._tell(Finished(self.world.attempt, stopped, last, name, self.world.size))

    def _epoch(self) -> bool:
        """Takes the epoch's windows to its end, or to a stop: then True."""
        progress, stopped = self.progress, False
        for step in train_steps(self.train_state, self.options, self._signals):
            self.rate, stopped = step.learning_rate, step.tally.signals.stop
            self._report(step)
            if stopped or step.ends_run:
                break
            if not step.ends_epoch and self._due(step.tally.signals):
                self._save()
        if self.train_state.at_epochs_end:
            self._close(progress.epoch + 1, end_epoch(self.train_state))
        self._close_what_was_cut()
        self._save()
        return stopped

    def _close_what_was_cut(self) -> None:
        """Closes, once, an epoch inside which ``max_steps`` has ended the run."""
        progress, mean = self.progress, self.progress.epoch_mean
        is_closed = not mean.tokens or progress.last_epoch_nats == mean.nats_per_token
        if is_done(progress, self.options.train) and not is_closed:
            progress.last_epoch_nats = mean.nats_per_token
            self._close(progress.epoch + 1, mean)

    def _close(self, epoch: int, mean: LossSum) -> None:
        """Reports an epoch, and what the model makes of the text kept to validate."""
        self._row("epoch", epoch, mean, self.epoch_lap.speed(self.progress.tokens))
        if len(self.validation) > 1:
            begun = time.monotonic()
            mean = self._validate()
            took = time.monotonic() - begun
            self.report_lap.since += took  # the speed is that of training
            nats, best = mean.nats_per_token, self.progress.best_validation_nats
            self.progress.last_validation_nats, self.progress.validated_step = nats, self.progress.step
            self.progress.best_validation_nats = nats if best is None else min(best, nats)
            self._row("validation", epoch, mean, mean.tokens / took)
        self.epoch_lap = _Throughput(self.progress.tokens)

    def _validate(self) -> LossSum:
        """The mean over the kept text, its lanes shared out like the stream's."""
        share, stream = self.train_state.share, self.options.stream
        sums = evaluate_lanes(
            self.train_state.model, self.validation, share.groups, stream.batch_size, stream.num_steps, share.autocast
        )
        if self.world.size > 1:
            gathered: list[Any] = [None] * self.world.size
            dist.all_gather_object(gathered, sums)
            sums = [nats for part in gathered for nats in part]
        return LossSum(tree_sum(sums), len(self.validation) - 1)

    # --- what is asked, saved and told ---

    def _signals(self) -> ControlFlags:
        asked = self.link.signals()
        if self.world.rank:
            return asked
        now = time.monotonic()
        look = now - self.looked_at >= PREEMPTION_POLL_S
        if look:
            self.looked_at = now
        due = now - self.saved_at >= self.options.train.checkpoint_seconds and not self.writer.busy
        return asked._replace(checkpoint=asked.checkpoint or due, look=look)

    def _due(self, asked: ControlFlags) -> bool:
        every = self.options.train.checkpoint_steps
        by_steps = bool(every) and self.progress.step % every == 0
        return by_steps or asked.checkpoint or (asked.look and self.link.preemption_pending())

    def _save(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = self.saved_at = now
        self.writer.save(self.train_state)

    def _tell(self, event: Event) -> None:
        """Posts, once, what all workers could say alike."""
        if self.world.rank == 0:
            self.link.post(event)

    def _announce(self) -> None:
        self._tell(
            Started(
                self.world.attempt,
                self.progress.step,
                self.progress.epoch,
                self.world.size,
                self._device(),
                self.precision,
                sum(weight.numel() for weight in self.train_state.model.parameters()),
                self.train_state.total_steps,
                self.skipped_checkpoints,
            )
        )

    def _device(self) -> str:
        """What the worker computes on, whether all share a memory, and why it is slower than it might be."""
        missing = kernel_unavailable_reason(self.world.device) if self.options.model.cell in BUILTIN_CELLS else ""
        together = " in one memory" if self.train_state.share.near else ""
        slowly = f" without the compiled kernel ({missing})" if missing else ""
        return device_name(self.world.device) + together + slowly

    def _report(self, step: StepResult) -> None:
        progress, every = self.progress, self.options.train.log_every
        if (progress.step % every == 0) if every else step.ends_epoch:
            mean, progress.report_mean = progress.report_mean, LossSum()
            self._row("train", progress.epoch + 1, mean, self.report_lap.speed(progress.tokens))
            self.report_lap = _Throughput(progress.tokens)
        if time.monotonic() - self.pulse_lap.since >= PROGRESS_INTERVAL_S:
            speed, nats = self.pulse_lap.speed(progress.tokens), progress.epoch_mean.nats_per_token
            self.pulse_lap = _Throughput(progress.tokens)
            self._tell(ProgressUpdate(self.world.attempt, progress.epoch + 1, progress.step, nats, speed))

    def _row(self, split: str, epoch: int, mean: LossSum, speed: float) -> None:
        row = {
            "split": split,
            "epoch": epoch,
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "nats": mean.nats_per_token,
            "perplexity": perplexity(mean.nats_per_token),
            "learning_rate": self.rate,
            "tokens_per_second": round(speed, 1),
            "workers": self.world.size,
        }
        self._tell(MetricsRow(self.world.attempt, row))


class _Throughput:
    """Tokens per second since a moment."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.since = tokens, time.monotonic()

    def speed(self, tokens: int) -> float:
        return (tokens - self.tokens) / max(time.monotonic() - self.since, 1e-9)
