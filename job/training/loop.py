"""Truncated back-propagation through time, and evaluation.

Both know torch alone. The loop is a generator of facts about each step; who calls it logs, saves
and reports.

Axes: T steps of a window, B lanes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from job.config.schema import Config, TrainConfig
from job.data.lanes import split_evenly
from job.data.stream import Stream
from job.distributed.gradient_sync import Batch, ControlFlags, LaneAssignment, StepStats
from job.errors import Diverged
from job.nn.dropout import dropout_keys
from job.nn.language_model import LanguageModel
from job.nn.state import State
from job.training.optimizer import learning_rate_at
from job.training.progress import LossSum, Progress
from job.training.train_step import TrainStep


@dataclass(frozen=True)
class StepResult:
    """One update: its number (from 1), its window's loss, and what the workers ask for."""

    tally: StepStats
    learning_rate: float
    ends_epoch: bool
    ends_run: bool


@dataclass
class TrainState:
    """One worker's share of a run: its lanes, the model, and where it stands."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    update: TrainStep
    stream: Stream
    total_steps: int
    share: LaneAssignment
    progress: Progress
    state: State = None

    @property
    def at_epochs_end(self) -> bool:
        """Whether all windows of the epoch that runs are taken."""
        return self.progress.window == self.stream.partition(self.progress.epoch).num_windows


def is_done(progress: Progress, train: TrainConfig) -> bool:
    """Whether all epochs, or all steps that are allowed, are taken."""
    return progress.epoch >= train.epochs or bool(train.max_steps and progress.step >= train.max_steps)


def train_steps(train_state: TrainState, config: Config, signals: Callable[[], ControlFlags]) -> Iterator[StepResult]:
    """Takes the windows of the epoch that runs, one update each, from where ``progress`` stands.

    ``signals`` is asked at each step for what this worker wants of all. After a yield, ``progress``
    and ``state`` are those after the update. Ends with the epoch's last window.
    """
    progress, stream = train_state.progress, train_state.stream
    num_windows = stream.partition(progress.epoch).num_windows
    train_state.model.train()
    while progress.window < num_windows and not is_done(progress, config.train):
        rate = learning_rate_at(config.optimizer, progress.step, train_state.total_steps)
        found, train_state.state = train_state.update(
            _next_batch(train_state, config, signals()), train_state.state, rate
        )
        tally = StepStats.of(found)
        if not math.isfinite(tally.nats):
            raise Diverged(
                f"the loss is {tally.nats} at step {progress.step + 1} (epoch {progress.epoch + 1}): "
                "lower optimizer.learning_rate or set optimizer.grad_clip_norm"
            )
        progress.window += 1
        progress.step += 1
        progress.tokens += stream.tokens_per_step
        progress.epoch_mean.add(tally.nats, stream.tokens_per_step)
        progress.report_mean.add(tally.nats, stream.tokens_per_step)
        ends_epoch = progress.window == num_windows
        ends_run = is_done(progress, config.train) or (ends_epoch and progress.epoch + 1 >= config.train.epochs)
        yield StepResult(tally, rate, ends_epoch, ends_run)


def _next_batch(train_state: TrainState, config: Config, signals: ControlFlags) -> Batch:
    progress, lanes = train_state.progress, train_state.share.lanes
    inputs_TB, targets_TB = train_state.stream.read_window(progress.epoch, progress.window, lanes)
    layers = config.model.num_layers if train_state.share.dropout else 0
    dropout_keys_LB = dropout_keys(config.run.seed, progress.step, layers, lanes)
    return Batch(inputs_TB, targets_TB, torch.tensor(signals, dtype=torch.float32), dropout_keys_LB)


def end_epoch(train_state: TrainState) -> LossSum:
    """Closes the epoch whose windows are all taken; gives its mean. The next starts from zero state."""
    progress = train_state.progress
    mean, progress.epoch_mean = progress.epoch_mean, LossSum()
    progress.epoch += 1
    progress.window = 0
    progress.last_epoch_nats = mean.nats_per_token
    train_state.state = None
    return mean


@torch.no_grad()
def evaluate_lanes(
    model: LanguageModel,
    tokens: np.ndarray,
    lanes: Sequence[range],
    num_lanes: int,
    num_steps: int,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """Nats, summed over the targets, of each of some groups of successive lanes of a text.

    The text's targets (all tokens but the first) are cut into ``num_lanes`` contiguous lanes whose
    lengths differ by one at most, so that each is counted once; the state is zero at a lane's start
    and carried to its end, ``num_steps`` at a time.
    """
    cuts = split_evenly(len(tokens) - 1, num_lanes)
    was_training = model.training
    model.eval()
    sums = [_evaluate_group(model, tokens, cuts[group.start : group.stop], num_steps, autocast) for group in lanes]
    model.train(was_training)
    return sums


def _evaluate_group(
    model: LanguageModel, tokens: np.ndarray, cuts: list[range], num_steps: int, autocast: torch.dtype | None
) -> float:
    device = next(model.parameters()).device
    longest = len(cuts[0])
    # Lanes may lack the last step; there they read a token that no target scores.
    rows_BT = np.full((len(cuts), longest + 1), -1, np.int64)
    for row, lease in zip(rows_BT, cuts, strict=True):
        row[: len(lease) + 1] = tokens[lease.start : lease.stop + 1]
    rows_TB = torch.from_numpy(rows_BT.T.copy()).to(device)
    state: State = None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, longest, num_steps):
        stop = min(start + num_steps, longest)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits_TBV, state = model(rows_TB[start:stop].clamp(min=0), state)
        total += _cross_entropy_sum(logits_TBV, rows_TB[start + 1 : stop + 1])
    return float(total)


def _cross_entropy_sum(logits_TBV: Tensor, targets_TB: Tensor) -> Tensor:
    logits = logits_TBV if logits_TBV.dtype == torch.float64 else logits_TBV.float()
    return F.cross_entropy(logits.flatten(0, 1), targets_TB.flatten(), ignore_index=-1, reduction="sum")
