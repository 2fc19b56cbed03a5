"""The sections of the optimizer and of the training."""

import math
from dataclasses import dataclass

from job.config.field import FREE, choice_field, config_field
from job.config.section import Section
from job.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer and the learning-rate schedule."""

    name: str = choice_field("optimizer", sgd="", adamw="")
    learning_rate: float = config_field(0.1, "peak learning rate", gt=0, is_mutable=True)
    weight_decay: float = config_field(0.0, "weight decay, as torch.optim applies it", ge=0, is_mutable=True)
    decay_scope: str = config_field(
        "all", "weights that decay", choices={"all": "", "matrices": "no biases or other vectors"},
        is_free_in_new_run=True,
    )  # fmt: skip
    grad_clip_norm: float = config_field(0.0, "maximum norm of the gradient; 0: no clipping", ge=0, is_mutable=True)
    momentum: float = config_field(0.0, "momentum of sgd", ge=0, lt=1, is_free_in_new_run=True)
    base_batch_size: int = config_field(
        0, "lanes for which learning_rate was chosen: with k times as many it is sqrt(k) times as high (LEGW); 0: any",
        "lanes", ge=0, is_free_in_new_run=True,
    )  # fmt: skip
    schedule: str = config_field(
        "constant", "learning-rate schedule", is_free_in_new_run=True,
        choices={"constant": "", "cosine": "to zero", "step": "by decay_factor every decay_every steps",
                 "plateau": "by decay_factor after decay_patience validations without improvement"},
    )  # fmt: skip
    schedule_steps: int = config_field(
        0, "length of the schedule; 0: all of train.epochs", "steps", ge=0, is_free_in_new_run=True
    )
    warmup_steps: int = config_field(
        0, "length of the linear learning-rate warm-up", "steps", ge=0, is_free_in_new_run=True
    )
    decay_factor: float = config_field(0.5, "factor of step and plateau", gt=0, lt=1, is_free_in_new_run=True)
    decay_every: int = config_field(1000, "interval of step", "steps", ge=1, is_free_in_new_run=True)
    decay_patience: int = config_field(1, "patience of plateau", "validations", ge=1, is_free_in_new_run=True)
    averaging: str = config_field(
        "none", "average of the weights over the steps, which validation, generate and evaluate use",
        choices={"none": "", "ema": "exponential moving average", "mean": "of all steps from average_start on",
                 "nt-asgd": "the mean since validation has not improved for nonmono validations"},
        is_free_in_new_run=True,
    )  # fmt: skip
    ema_decay: float = config_field(
        0.999, "decay of ema; less in the first steps, at most (1 + step) / (10 + step)", ge=0, lt=1,
        is_free_in_new_run=True,
    )  # fmt: skip
    average_start: float = config_field(
        0.75, "start of mean: a fraction of the schedule's length, or from 1 on a step", ge=0, is_free_in_new_run=True
    )
    nonmono: int = config_field(5, "patience of nt-asgd", "validations", ge=1, is_free_in_new_run=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "cosine" and 0 < self.schedule_steps <= self.warmup_steps:
            problem = f"optimizer.schedule_steps = {self.schedule_steps}: must be more than optimizer.warmup_steps"
            raise UserError(f"{problem} = {self.warmup_steps}", "raise the first or lower the second")

    @property
    def spans_epochs(self) -> bool:
        """Whether a step depends on the length of ``train.epochs``, which then cannot be raised."""
        uses_fraction = self.averaging == "mean" and 0 < self.average_start < 1
        return (self.schedule == "cosine" or uses_fraction) and not self.schedule_steps


@dataclass(frozen=True)
class TrainConfig(Section):
    """Length, precision, logging and checkpoints of a run."""

    epochs: int = config_field(
        50, "passes over the training text", "epochs", ge=1, on_resume="may grow unless the schedule spans it",
        is_free_in_new_run=True,
    )  # fmt: skip
    max_steps: int = config_field(0, "maximum length of the run; 0: no limit", "steps", ge=0, on_resume=FREE)
    patience: int = config_field(
        0, "stop early after N validations without improvement; 0: never", "validations", ge=0, on_resume=FREE
    )
    log_every: int = config_field(0, "interval between rows of metrics; 0: one epoch", "steps", ge=0, on_resume=FREE)
    validate_every: int = config_field(
        0, "interval between validations, in addition to that after each epoch; 0: none", "steps", ge=0,
        on_resume="may change if nothing is decided by validations", is_free_in_new_run=True,
    )  # fmt: skip
    sample_every: int = config_field(
        0, "interval between samples of text; 0: an epoch, or more if it is short", "steps", ge=0, on_resume=FREE
    )
    checkpoint_every: str | int = config_field(
        "30s", "interval between checkpoints", ge=1, pattern=r"(?=.*[1-9])[0-9]{1,99}(\.[0-9]{1,99})?s", on_resume=FREE,
        form='steps (200) or seconds ("30s"), above 0',
    )  # fmt: skip
    keep_checkpoints: int = config_field(3, "how many of the latest checkpoints to keep", ge=1, on_resume=FREE)
    precision: str = choice_field("numeric precision", auto="bf16 if the hardware has it", fp32="", bf16="", fp64="")
    reproducible: bool = config_field(False, "bit-identical (deterministic) results on any number of workers")
    accumulate: int = config_field(
        1, "groups of lanes that a worker computes one after the other, adding their gradients, to save memory",
        "groups", ge=1, on_resume=FREE,
    )  # fmt: skip
    lane_groups: int = config_field(8, "lane groups (micro-batches) of a reproducible run", ge=1)

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints; 0 if the interval is in seconds."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else 0

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds between two checkpoints; infinite if the interval is in steps."""
        return float(self.checkpoint_every.rstrip("s")) if isinstance(self.checkpoint_every, str) else math.inf
