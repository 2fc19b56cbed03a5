"""The sections and fields of the configuration."""

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from job.config.section import Check, Section, at_least, between, choice_field, config_field, format_value, path_field
from job.errors import UserError

BUILTIN_CELLS = ("rnn", "gru", "lstm")


def _less_than(high: int) -> Check:
    return lambda value: None if 0 <= value < high else f"must be at least 0 and less than {high}"


def _check_cell(value: str) -> str | None:
    is_cell = value in BUILTIN_CELLS or re.fullmatch(r"[\w.]+:\w+", value)
    return None if is_cell else f"must be one of {', '.join(BUILTIN_CELLS)}, or package.module:Class"


def _check_name(value: str) -> str | None:
    is_name = re.fullmatch(r"|[A-Za-z0-9][A-Za-z0-9._-]*", value)
    return None if is_name else "may contain letters, digits, '.', '_' and '-', and must start with a letter or digit"


def _check_positive(value: float) -> str | None:
    return None if value > 0 else "must be greater than 0"


def _check_offset(value: "str | int | tuple[int, ...]") -> str | None:
    if isinstance(value, str):
        return None if value == "random" else 'must be "random", an integer or a list of integers'
    offsets = value if isinstance(value, tuple) else (value,)
    return None if offsets and min(offsets) >= 0 else "must not be negative or empty"


def _check_interval(value: "str | int") -> str | None:
    if isinstance(value, int):
        return at_least(1)(value)
    seconds = re.fullmatch(r"(\d+(?:\.\d+)?)s", value)
    return None if seconds and float(seconds[1]) > 0 else 'must be steps (200) or seconds ("30s"), above 0'


def _check_workers(value: "str | int") -> str | None:
    if isinstance(value, int):
        return at_least(0)(value)
    bounds = re.fullmatch(r"(\d+)-(\d+)", value)
    return None if bounds and 1 <= int(bounds[1]) <= int(bounds[2]) else 'must be an integer, or a range such as "2-8"'


@dataclass(frozen=True)
class RunConfig(Section):
    """The run's name and storage."""

    name: str = config_field("", "folder of the run; empty: the configuration's name and a number", _check_name)
    storage: str = path_field("runs", "where runs are stored: a folder or a URI; $NAME is expanded")
    seed: int = config_field(0, "random seed", _less_than(2**63))
    resume: str = choice_field("auto", "never", "must", meaning="resume the run: auto (if it exists), never or must")


@dataclass(frozen=True)
class CorpusConfig(Section):
    """The text."""

    source: str = path_field("auto", "auto (The Time Machine), time-machine, embedded, a path, a glob or a URI")
    cleaning: str = choice_field(
        "auto", "d2l", "none", meaning="normalization: d2l (lower-case letters), none, or auto (d2l for built-in texts)"
    )
    max_tokens: int = config_field(0, "use only the first N tokens; 0: all", at_least(0))
    validation_fraction: float = config_field(0.0, "fraction of the text, at its end, for validation", _less_than(1))


@dataclass(frozen=True)
class VocabularyConfig(Section):
    """The tokens."""

    kind: str = choice_field("char", "byte", "word")
    size: int = config_field(0, "maximum vocabulary size, <unk> included; 0: no limit", at_least(0))
    min_frequency: int = config_field(0, "tokens that occur less often become <unk>", at_least(0))
    scope: str = choice_field(
        "corpus",
        "training",
        meaning="text whose tokens are counted: corpus (all of it), or training (what is trained on)",
    )
    file: str = path_field("", "an existing vocabulary.json, of a run for example; empty: made of the text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file and (self.size or self.min_frequency or self.scope != "corpus"):
            problem = f"vocabulary.file = {self.file}: vocabulary.size, min_frequency and scope do not apply to it"
            raise UserError(problem, "remove them")


@dataclass(frozen=True)
class StreamConfig(Section):
    """How the token stream is cut into lanes and windows."""

    batch_size: int = config_field(32, "lanes (batch rows), over all workers", at_least(1))
    num_steps: int = config_field(40, "tokens per lane in one window (sequence length, BPTT length)", at_least(1))
    offset: str | int | tuple[int, ...] = config_field(
        "random", "first token of an epoch: random, an integer, or a list with one per epoch", _check_offset
    )


@dataclass(frozen=True)
class ModelConfig(Section):
    """The recurrent language model."""

    cell: str = config_field("rnn", "rnn, gru, lstm, or package.module:Class", _check_cell)
    hidden_size: int = config_field(256, "hidden units per layer", at_least(1))
    num_layers: int = config_field(1, "recurrent layers", between(1, 1000))
    embedding_size: int = config_field(0, "embedding size; 0: one-hot input", at_least(0))
    dropout: float = config_field(0.0, "dropout between layers and before the output layer", _less_than(1))
    init: str = path_field("", "initial weights: a run, a checkpoint or a .safetensors file; empty: random")


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer and the learning-rate schedule."""

    name: str = choice_field("sgd", "adamw")
    learning_rate: float = config_field(0.1, "peak learning rate", _check_positive)
    weight_decay: float = config_field(0.0, "weight decay, as torch.optim.SGD or AdamW applies it", at_least(0))
    grad_clip_norm: float = config_field(0.0, "max global gradient norm; 0 disables clipping", at_least(0))
    schedule: str = choice_field("constant", "cosine", meaning="constant, or cosine (to zero)")
    schedule_steps: int = config_field(0, "length of the schedule in steps; 0: all of train.epochs", at_least(0))
    warmup_steps: int = config_field(0, "steps of linear learning-rate warm-up", at_least(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "constant" and 0 < self.schedule_steps <= self.warmup_steps:
            problem = f"optimizer.schedule_steps = {self.schedule_steps}: must be more than optimizer.warmup_steps"
            raise UserError(f"{problem} = {self.warmup_steps}", "raise the first or lower the second")

    @property
    def spans_epochs(self) -> bool:
        """Whether the schedule's length is that of ``train.epochs``, which then cannot be raised."""
        return self.schedule != "constant" and not self.schedule_steps


@dataclass(frozen=True)
class TrainConfig(Section):
    """Length, precision, logging and checkpoints of a run."""

    epochs: int = config_field(50, "passes over the training text", at_least(1))
    max_steps: int = config_field(0, "maximum number of steps; 0: no limit", at_least(0))
    log_every: int = config_field(0, "steps between two rows of metrics; 0: one row per epoch", at_least(0))
    checkpoint_every: str | int = config_field("30s", 'interval: steps (200) or seconds ("30s")', _check_interval)
    keep_checkpoints: int = config_field(3, "how many of the latest checkpoints to keep", at_least(1))
    precision: str = choice_field("auto", "fp32", "bf16", "fp64")
    reproducible: bool = config_field(False, "bit-identical (deterministic) results on any number of workers")
    lane_groups: int = config_field(8, "lane groups (micro-batches) of a reproducible run", at_least(1))

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints; 0 if the interval is in seconds."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else 0

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds between two checkpoints; infinite if the interval is in steps."""
        return float(self.checkpoint_every.rstrip("s")) if isinstance(self.checkpoint_every, str) else math.inf


@dataclass(frozen=True)
class ScaleConfig(Section):
    """The workers and their hardware."""

    workers: str | int = config_field(2, 'number of workers; 0: train in this process; "2-8": elastic', _check_workers)
    accelerator: str = choice_field("auto", "cpu", "gpu")
    accelerator_type: str = config_field("", "GPU that workers need, as Ray names it: A100, H100, T4 …", _check_name)
    cpus_per_worker: int = config_field(0, "cores per worker; 0: share of this machine, 1 on a cluster", at_least(0))
    placement: str = choice_field("pack", "spread", meaning="pack workers onto few nodes, or spread them")
    hang_timeout: float = config_field(
        60.0, "seconds before an unresponsive worker is replaced, and between elastic resizes", between(1e-3, 10**9)
    )

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run continues with."""
        return int(str(self.workers).split("-")[0])

    @property
    def max_workers(self) -> int:
        """The most workers that the run uses."""
        return int(str(self.workers).split("-")[-1])

    @property
    def gpu_requirement(self) -> str:
        """The field that requires GPUs and its value, for messages; empty if none does."""
        if self.accelerator_type:
            return f"scale.accelerator_type = {self.accelerator_type}"
        return "scale.accelerator = gpu" if self.accelerator == "gpu" else ""


@dataclass(frozen=True)
class GenerateConfig(Section):
    """Text generation."""

    prefix: str = config_field(
        "time traveller", "text to continue (prompt); the default becomes the text's beginning if unknown to it"
    )
    length: int = config_field(50, "tokens to generate", between(0, 10**6))
    temperature: float = config_field(0.0, "sampling temperature; 0: greedy", at_least(0))
    unknown: bool = config_field(False, "generate <unk> like any other token; false: never")


@dataclass(frozen=True)
class Config:
    """All sections that define a run.

    Raises:
        UserError: if values of different sections contradict each other
    """

    run: RunConfig = RunConfig()
    corpus: CorpusConfig = CorpusConfig()
    vocabulary: VocabularyConfig = VocabularyConfig()
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    scale: ScaleConfig = ScaleConfig()
    generate: GenerateConfig = GenerateConfig()

    def __post_init__(self) -> None:
        num_lanes, scale, offset = self.stream.batch_size, self.scale, self.stream.offset
        num_groups = min(self.train.lane_groups, num_lanes)
        workers = f"scale.workers = {format_value(scale.workers)}"
        if scale.max_workers > num_lanes:
            problem = f"{workers}: each worker needs a lane, and stream.batch_size = {num_lanes}"
            raise UserError(problem, "lower the first or raise the second")
        if scale.accelerator_type and scale.accelerator == "cpu":
            problem = f'{scale.gpu_requirement}: names a GPU, and scale.accelerator = "cpu"'
            raise UserError(problem, "remove one of them")
        if self.train.reproducible and scale.max_workers > num_groups:
            problem = f"{workers}: each worker of a reproducible run needs a lane group, and there are {num_groups}"
            raise UserError(problem, "lower it or raise train.lane_groups")
        if isinstance(offset, tuple) and len(offset) < self.train.epochs:
            problem = f"stream.offset has {len(offset)} entries for train.epochs = {self.train.epochs}"
            raise UserError(problem, "give one for each epoch")

    def sections(self) -> list[Section]:
        """Returns the sections in their order."""
        return [getattr(self, option.name) for option in fields(self)]

    def values(self) -> dict[str, Any]:
        """Returns the values of all fields, by full name: ``model.cell``."""
        return {name: value for section in self.sections() for name, value in section.values().items()}


SECTIONS: dict[str, type[Section]] = {section.section_name: type(section) for section in Config().sections()}
FIELDS = {name: option for cls in SECTIONS.values() for name, option in cls.config_fields().items()}

# What may differ when a run is resumed: where and how it is computed, not the result.
_FREE = (
    "scale.", "generate.", "run.name", "run.storage", "run.resume",
    "train.max_steps", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints",
)  # fmt: skip


def defines_run(name: str) -> bool:
    """Returns whether the field of this full name affects the result of a run."""
    return not name.startswith(_FREE)


def config_differences(old: Config, new: Config) -> list[str]:
    """Returns the fields that prevent ``new`` from resuming a run of ``old``, as ``field (old → new)``."""
    new_values = new.values()
    notes = {"train.epochs": ", the schedule's length unless optimizer.schedule_steps is set"}
    return [
        f"{name} ({format_value(value)} → {format_value(new_values[name])})"
        f"{notes.get(name, '') if old.optimizer.spans_epochs else ''}"
        for name, value in old.values().items()
        if defines_run(name) and value != new_values[name] and not _only_adds_epochs(name, old, new)
    ]


def _only_adds_epochs(name: str, old: Config, new: Config) -> bool:
    if name == "stream.offset":
        offset, new_offset = old.stream.offset, new.stream.offset
        return isinstance(offset, tuple) and isinstance(new_offset, tuple) and new_offset[: len(offset)] == offset
    return name == "train.epochs" and new.train.epochs > old.train.epochs and not old.optimizer.spans_epochs
