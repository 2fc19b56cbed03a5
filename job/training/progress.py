"""How far a run has come, and its loss."""

import math
from dataclasses import dataclass, field

from job.training.decisions import Decisions

_MAX_NATS = 700.0  # of which exp is still a float


@dataclass
class LossSum:
    """A loss as a sum and a count, from which mean and perplexity are computed."""

    nats: float = 0.0  # summed over the tokens
    tokens: int = 0

    def add(self, nats: float, tokens: int) -> None:
        """Adds the summed loss of more tokens."""
        self.nats += nats
        self.tokens += tokens

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy."""
        return self.nats / self.tokens


def perplexity(nats_per_token: float) -> float:
    """Returns exp(nats_per_token), limited so that it does not overflow. NaN counts as infinity."""
    return math.exp(min(_MAX_NATS, nats_per_token))  # the first if the second is NaN


MAX_PERPLEXITY = perplexity(math.inf)


def finite_or_none(nats_per_token: float) -> float | None:
    """Returns None in place of NaN and infinity, which JSON does not have."""
    return nats_per_token if math.isfinite(nats_per_token) else None


@dataclass
class Progress:
    """The position and history of a run: with weights, optimizer and lane state, all that is needed to resume.

    The field names are those of a checkpoint's ``progress.json``.
    """

    epoch: int = 0  # completed epochs
    window: int = 0  # completed windows of the current epoch
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent training
    restarts: int = 0  # times that the run was resumed from a checkpoint
    epoch_mean: LossSum = field(default_factory=LossSum)  # of the current epoch so far
    report_mean: LossSum = field(default_factory=LossSum)  # since the last metrics row
    last_epoch_nats: float | None = None  # mean per token, like the following
    last_validation_nats: float | None = None  # None if it was not finite
    last_validation_nats_raw: float | None = None  # of the weights themselves, if they are averaged
    validated_step: int = -1
    best_validation_nats: float | None = None
    averaged_steps: int = 0  # in the average of the weights
    decisions: Decisions = field(default_factory=Decisions)
