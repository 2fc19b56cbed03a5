"""What a run decides by comparing validation losses: to reduce the learning rate, to average the weights, to stop."""

import json
import math
import sys
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from job.config.training import OptimizerConfig
from job.documents import parse_record

MARGIN_NATS = 1e-4  # per token; a smaller difference is no improvement
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("stale", "plateau", "reductions"), int),
    "best_nats": (float, int, NoneType),
    "recent_nats": list,
    "average_start": (int, NoneType),
}


@dataclass
class Decisions:
    """The decisions so far and what the next ones depend on, stored in ``progress.json``.

    They are the same on all workers, because all compare the loss that rank 0 sends.
    """

    best_nats: float | None = None  # the lowest loss, but for improvements below the margin
    stale: int = 0  # validations since then
    plateau: int = 0  # validations since then, or since the last reduction
    reductions: int = 0  # of the learning rate
    recent_nats: list[float] = field(default_factory=list)  # the last ``nonmono`` losses, after the lowest before them
    average_start: int | None = None  # first step of the average, once it is triggered

    @classmethod
    def from_record(cls, record: Any) -> "Decisions":
        """Returns what a checkpoint stores. Raises ValueError if a field is missing or has another type."""
        values = parse_record(json.dumps(record), _TYPES)
        return cls(**{name: values[name] for name in _TYPES} | {"recent_nats": list(map(float, values["recent_nats"]))})

    def add(self, nats: float | None, step: int, optimizer_config: OptimizerConfig) -> None:
        """Decides after a validation.

        Args:
            nats: its loss per token; None if it is not finite
            step: the next step
            optimizer_config: its options
        """
        loss = sys.float_info.max if nats is None else nats
        is_better = loss < (math.inf if self.best_nats is None else self.best_nats - MARGIN_NATS)
        self.best_nats = loss if is_better else self.best_nats
        self.stale, self.plateau = (0, 0) if is_better else (self.stale + 1, self.plateau + 1)
        if optimizer_config.schedule == "plateau" and self.plateau >= optimizer_config.decay_patience:
            self.plateau = 0
            self.reductions += 1
        if optimizer_config.averaging == "nt-asgd":
            self._trigger_average(loss, step, optimizer_config.nonmono)

    def _trigger_average(self, loss: float, step: int, nonmono: int) -> None:
        """Starts to average if the loss is not below those of more than ``nonmono`` validations ago."""
        older, last = self.recent_nats[:-nonmono], self.recent_nats[-nonmono:]
        if self.average_start is None and older and loss > min(older) - MARGIN_NATS:
            self.average_start = step
        self.recent_nats = [*([min(older)] if older else []), *last, loss]
