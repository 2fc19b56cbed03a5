"""How far a run has come, and the loss as a sum and a count."""

import math
from dataclasses import dataclass, field


@dataclass
class LossSum:
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
    epoch_mean: LossSum = field(default_factory=LossSum)
    report_mean: LossSum = field(default_factory=LossSum)
    last_epoch_nats: float | None = None
    last_validation_nats: float | None = None
    validated_step: int = -1
    best_validation_nats: float | None = None
