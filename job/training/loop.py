"""Truncated back-propagation through time, and evaluation.

The training loop is a generator of step results; its caller logs, saves and reports.

Axes: T steps of a window, B lanes, V tokens of the vocabulary.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from job.config.schema import Config
from job.config.training import TrainConfig
from job.data.lanes import split_evenly
from job.data.tokens import Tokens, read_ranges
from job.distributed.gradient_sync import Batch, ControlFlags, StepStats
from job.errors import Diverged
from job.nn.language_model import LanguageModel
from job.nn.regularization import mask_keys
from job.nn.state import State
from job.training.progress import LossSum, Progress
from job.training.schedule import StepSizes
from job.training.train_state import TrainState

BLOCK_TOKENS = 1 << 18  # of an evaluated text that are read at a time


@dataclass(frozen=True)
class StepResult:
    """One step: its reduced statistics, and whether it is the last of its epoch or of the run.

    On a GPU the statistics may be those of the step before, and the progress then lacks the loss of this one. It is
    complete where it is reported or saved, and at the end of an epoch or the run.
    """

    stats: StepStats
    ends_epoch: bool
    ends_run: bool


def is_done(progress: Progress, train_config: TrainConfig) -> bool:
    """Whether ``train.epochs``, ``train.max_steps`` or ``train.patience`` is reached."""
    return has_done_all(progress, train_config) or bool(0 < train_config.patience <= progress.decisions.stale)


def has_done_all(progress: Progress, train_config: TrainConfig) -> bool:
    """Whether ``train.epochs`` or ``train.max_steps`` is reached."""
    has_max_steps = bool(train_config.max_steps and progress.step >= train_config.max_steps)
    return has_max_steps or progress.epoch >= train_config.epochs


def train_steps(
    train_state: TrainState, config: Config, control_flags: Callable[[], ControlFlags]
) -> Iterator[StepResult]:
    """Trains on the remaining windows of the current epoch, one step per window.

    Args:
        train_state: updated in place before each result is yielded
        config: the run's configuration
        control_flags: polled before each step for this worker's flags

    Raises:
        Diverged: the loss is not finite; on a GPU it may be that of the step before
    """
    progress, stream = train_state.progress, train_state.stream
    device = train_state.model.linear.weight.device
    pending: list[_PendingStats] = []
    stats = StepStats(math.nan, ControlFlags())
    num_windows = stream.partition(progress.epoch).num_windows
    train_state.model.train()
    while progress.window < num_windows and not is_done(progress, config.train):
        batch = _next_batch(train_state, config, control_flags())
        if device.type == "cuda":
            batch = batch.pin_memory()
        schedule, decisions = train_state.schedule, progress.decisions
        train_state.learning_rate = schedule.learning_rate(progress.step, decisions.reductions)
        is_averaged = schedule.is_averaged(progress.step, decisions)
        progress.averaged_steps *= is_averaged  # those before the start of an average do not count
        sizes = StepSizes(train_state.learning_rate, schedule.average_weight(progress.averaged_steps))
        stats_tensor, train_state.lane_state = train_state.train_step(batch, train_state.lane_state, sizes)
        progress.window += 1
        progress.step += 1
        progress.averaged_steps += is_averaged
        progress.tokens += stream.tokens_per_step
        ends_epoch = progress.window == num_windows
        ends_run = is_done(progress, config.train) or (ends_epoch and progress.epoch + 1 >= config.train.epochs)
        pending.append(_PendingStats(stats_tensor, progress.step))
        can_wait = not (ends_epoch or ends_run) and _can_read_later(progress, config.train, device)
        flags = None
        while len(pending) > can_wait or (pending and flags and any(flags)):
            stats = _add_stats(progress, pending.pop(0), stream.tokens_per_step)
            flags = ControlFlags(*map(operator.or_, flags, stats.flags)) if flags else stats.flags
        yield StepResult(StepStats(stats.nats, flags or ControlFlags()), ends_epoch, ends_run)


def _can_read_later(progress: Progress, train_config: TrainConfig, device: torch.device) -> bool:
    """Whether a step's statistics may be read after the next step has been launched, so that the GPU need not wait.

    Not if the progress is reported, validated or saved now. All workers decide the same.
    """
    if device.type == "cpu" or not progress.epoch_mean.tokens:
        return False
    intervals = (train_config.log_every, train_config.validate_every, train_config.checkpoint_steps)
    return not any(every and progress.step % every == 0 for every in intervals)


class _PendingStats:
    """A step's statistics on their way from the device."""

    def __init__(self, stats: Tensor, step: int) -> None:
        self.step, self.stats, self.copied = step, stats, None
        if stats.is_cuda:
            self.stats = stats.to("cpu", non_blocking=True)  # in pinned memory
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> StepStats:
        """Waits for the copy."""
        if self.copied:
            self.copied.synchronize()
        return StepStats.from_tensor(self.stats)


def _add_stats(progress: Progress, pending: _PendingStats, tokens: int) -> StepStats:
    """Reads a step's statistics and adds its loss to the progress. Raises Diverged if the loss is not finite."""
    stats = pending.read()
    if not math.isfinite(stats.nats):
        raise Diverged(
            f"the loss is {stats.nats} at step {pending.step} (epoch {progress.epoch + 1})",
            "lower optimizer.learning_rate or set optimizer.grad_clip_norm",
        )
    progress.epoch_mean.add(stats.nats, tokens)
    progress.report_mean.add(stats.nats, tokens)
    return stats


def _next_batch(train_state: TrainState, config: Config, flags: ControlFlags) -> Batch:
    progress, lanes = train_state.progress, train_state.assignment.lanes
    inputs_TB, targets_TB = train_state.windows.read(progress.epoch, progress.window)
    mask_keys_SB = mask_keys(config.model, config.run.seed, progress.step, lanes)
    return Batch(inputs_TB, targets_TB, torch.tensor(flags, dtype=torch.float32), mask_keys_SB)


def end_epoch(train_state: TrainState) -> LossSum:
    """Advances the progress to the next epoch, which starts from a zero state; returns the loss of this one."""
    progress = train_state.progress
    loss, progress.epoch_mean = progress.epoch_mean, LossSum()
    progress.epoch += 1
    progress.window = 0
    progress.last_epoch_nats = loss.nats_per_token
    train_state.lane_state = None
    return loss


@torch.no_grad()
def evaluate_lanes(
    model: LanguageModel,
    tokens: Tokens,
    groups: Sequence[range],
    num_lanes: int,
    num_steps: int,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """Evaluates lanes of a text.

    The targets (all tokens but the first) are split into ``num_lanes`` contiguous lanes whose lengths differ by at
    most one, so that each target counts once. The state is zero at the start of a lane and carried to its end.

    Args:
        model: the model
        tokens: token ids of the whole text (N,)
        groups: groups of successive lane numbers to evaluate
        num_lanes: lanes of the whole text
        num_steps: steps per window
        autocast: dtype of matrix products, None if it is that of the weights

    Returns:
        The loss of each group in nats, summed over its targets.
    """
    lanes = split_evenly(len(tokens) - 1, num_lanes)
    was_training = model.training
    model.eval()
    sums = [evaluate_group(model, tokens, lanes[group.start : group.stop], num_steps, autocast) for group in groups]
    model.train(was_training)
    return sums


@torch.no_grad()
def evaluate_group(
    model: LanguageModel,
    tokens: Tokens,
    lanes: Sequence[range],
    num_steps: int,
    autocast: torch.dtype | None = None,
) -> float:
    """Returns the loss of some lanes in nats, summed over their targets.

    Args:
        model: in evaluation mode
        tokens: token ids of the whole text (N,)
        lanes: each lane's inputs, whose targets are the tokens after them
        num_steps: steps per window
        autocast: dtype of matrix products, None if it is that of the weights
    """
    device = next(model.parameters()).device
    state: State = None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for window_TB in lane_windows(tokens, lanes, num_steps):
        tokens_TB = window_TB.to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            nats, state = model.evaluation_nats(tokens_TB[:-1].clamp(min=0), tokens_TB[1:], state)
        total += nats
    return float(total)


def lane_windows(tokens: Tokens, lanes: Sequence[range], num_steps: int) -> Iterator[Tensor]:
    """Yields the token ids (steps + 1, lanes) of one window of some lanes after another, int64.

    The first row are inputs, the last one targets, and those between both. After the end of a shorter lane they are -1.
    """
    longest = max(map(len, lanes))
    block_steps = num_steps * max(1, BLOCK_TOKENS // (num_steps * len(lanes)))
    for start in range(0, longest, block_steps):
        num_read = min(block_steps, longest - start)
        starts = [min(lane.start + start, lane.stop + 1) for lane in lanes]
        ranges = [range(first, min(first + num_read, lane.stop) + 1) for first, lane in zip(starts, lanes, strict=True)]
        tokens_BT = np.full((len(lanes), num_read + 1), -1, np.int64)
        for row, ids in zip(tokens_BT, read_ranges(tokens, ranges), strict=True):
            row[: len(ids)] = ids
        for first in range(0, num_read, num_steps):
            yield torch.from_numpy(tokens_BT[:, first : first + num_steps + 1].T.copy())
