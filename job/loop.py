"""Truncated back-propagation through time, and evaluation.

Both know torch alone. The loop is a generator of facts about each step; who calls it logs, saves
and reports.

Axes: T steps of a window, B lanes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from job import config, optimizer
from job.dropout import keys
from job.errors import Diverged
from job.gradients import Share, Signals, Tally, Window
from job.lanes import split
from job.model import LanguageModel, State
from job.stream import Stream
from job.update import Update


@dataclass
class Mean:
    """A loss as the pair of which its mean and perplexity are made."""

    nats: float = 0.0
    tokens: int = 0

    def add(self, nats: float, tokens: int) -> None:
        """Takes more tokens in."""
        self.nats += nats
        self.tokens += tokens

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy."""
        return self.nats / self.tokens


def perplexity(nats_per_token: float) -> float:
    """exp(nats), held below the largest float."""
    return math.exp(min(nats_per_token, 700.0))


@dataclass
class Progress:
    """Where a run is: all that, with weights, optimizer and state, makes it go on exactly."""

    epoch: int = 0  # epochs completed
    window: int = 0  # windows taken in the epoch that runs
    step: int = 0  # updates
    tokens: int = 0
    seconds: float = 0.0  # spent in the loop
    restarts: int = 0  # times that the run went on from a checkpoint
    epoch_mean: Mean = field(default_factory=Mean)
    report_mean: Mean = field(default_factory=Mean)
    last_epoch_nats: float | None = None
    last_validation_nats: float | None = None
    validated_step: int = -1
    best_validation_nats: float | None = None


@dataclass(frozen=True)
class Step:
    """One update: its number (from 1), its window's loss, and what the workers ask for."""

    tally: Tally
    learning_rate: float
    ends_epoch: bool
    ends_run: bool


@dataclass
class Learner:
    """One worker's share of a run: its lanes, the model, and where it stands."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    update: Update
    stream: Stream
    total_steps: int
    share: Share
    progress: Progress
    state: State = None

    @property
    def at_epochs_end(self) -> bool:
        """Whether all windows of the epoch that runs are taken."""
        return self.progress.window == self.stream.cut(self.progress.epoch).num_windows


def is_done(progress: Progress, train: config.Train) -> bool:
    """Whether all epochs, or all steps that are allowed, are taken."""
    return progress.epoch >= train.epochs or bool(train.max_steps and progress.step >= train.max_steps)


def steps(learner: Learner, options: config.Config, signals: Callable[[], Signals]) -> Iterator[Step]:
    """Takes the windows of the epoch that runs, one update each, from where ``progress`` stands.

    ``signals`` is asked at each step for what this worker wants of all. After a yield, ``progress``
    and ``state`` are those after the update. Ends with the epoch's last window.
    """
    progress, stream = learner.progress, learner.stream
    num_windows = stream.cut(progress.epoch).num_windows
    learner.model.train()
    while progress.window < num_windows and not is_done(progress, options.train):
        rate = optimizer.learning_rate(options.optimizer, progress.step, learner.total_steps)
        found, learner.state = learner.update(_window(learner, options, signals()), learner.state, rate)
        tally = Tally.of(found)
        if not math.isfinite(tally.nats):
            raise Diverged(
                f"the loss is {tally.nats} at step {progress.step + 1} (epoch {progress.epoch + 1}): "
                "lower optimizer.learning_rate or set optimizer.grad_clip_norm"
            )
        progress.window += 1
        progress.step += 1
        progress.tokens += stream.tokens_of_window
        progress.epoch_mean.add(tally.nats, stream.tokens_of_window)
        progress.report_mean.add(tally.nats, stream.tokens_of_window)
        ends_epoch = progress.window == num_windows
        ends_run = is_done(progress, options.train) or (ends_epoch and progress.epoch + 1 >= options.train.epochs)
        yield Step(tally, rate, ends_epoch, ends_run)


def _window(learner: Learner, options: config.Config, signals: Signals) -> Window:
    progress, lanes = learner.progress, learner.share.lanes
    inputs_TB, targets_TB = learner.stream.window(progress.epoch, progress.window, lanes)
    layers = options.model.num_layers if learner.share.dropout else 0
    keys_LB = keys(options.run.seed, progress.step, layers, lanes)
    return Window(inputs_TB, targets_TB, torch.tensor(signals, dtype=torch.float32), keys_LB)


def end_epoch(learner: Learner) -> Mean:
    """Closes the epoch whose windows are all taken; gives its mean. The next starts from zero state."""
    progress = learner.progress
    mean, progress.epoch_mean = progress.epoch_mean, Mean()
    progress.epoch += 1
    progress.window = 0
    progress.last_epoch_nats = mean.nats_per_token
    learner.state = None
    return mean


@torch.no_grad()
def evaluate(
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
    cuts = split(len(tokens) - 1, num_lanes)
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
    for row, owned in zip(rows_BT, cuts, strict=True):
        row[: len(owned) + 1] = tokens[owned.start : owned.stop + 1]
    rows_TB = torch.from_numpy(rows_BT.T.copy()).to(device)
    state: State = None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, longest, num_steps):
        stop = min(start + num_steps, longest)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits_TBV, state = model(rows_TB[start:stop].clamp(min=0), state)
        total += _nats(logits_TBV, rows_TB[start + 1 : stop + 1])
    return float(total)


def _nats(logits_TBV: Tensor, targets_TB: Tensor) -> Tensor:
    logits = logits_TBV if logits_TBV.dtype == torch.float64 else logits_TBV.float()
    return F.cross_entropy(logits.flatten(0, 1), targets_TB.flatten(), ignore_index=-1, reduction="sum")
