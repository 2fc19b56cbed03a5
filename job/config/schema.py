"""The configuration: frozen dataclasses.

Every value is checked where it is made, so nothing downstream checks it again.
"""

import math
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Union, get_args, get_origin

from job.errors import UserError

BUILTIN_CELLS = ("rnn", "gru", "lstm")

Check = Callable[[Any], str | None]


def at_least(low: float) -> Check:
    """A check that a value is not below ``low``."""
    return lambda value: None if value >= low else f"must be at least {low}"


def _above_zero(value: float) -> str | None:
    return None if value > 0 else "must be greater than 0"


def _seed(value: int) -> str | None:
    return None if 0 <= value < 2**63 else "must be from 0 to below 2^63"


def _fraction(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be from 0 to below 1"


def one_of(*names: str) -> Check:
    """A check that a value is one of some names."""
    return lambda value: None if value in names else f"must be one of {', '.join(names)}"


def _cell(value: str) -> str | None:
    known = value in BUILTIN_CELLS or re.fullmatch(r"[\w.]+:\w+", value)
    return None if known else f"must be one of {', '.join(BUILTIN_CELLS)}, or package.module:Class"


def _offset(value: "str | int | tuple[int, ...]") -> str | None:
    if isinstance(value, str):
        return None if value == "random" else 'must be "random", an integer or a list of integers'
    offsets = value if isinstance(value, tuple) else (value,)
    return None if offsets and min(offsets) >= 0 else "must not be negative or empty"


def _cadence(value: "str | int") -> str | None:
    if isinstance(value, int):
        return at_least(1)(value)
    seconds = re.fullmatch(r"(\d+(?:\.\d+)?)s", value)
    return None if seconds and float(seconds[1]) > 0 else 'must be steps (200) or seconds ("30s"), above 0'


def _workers(value: "str | int") -> str | None:
    if isinstance(value, int):
        return at_least(0)(value)
    span = re.fullmatch(r"(\d+)-(\d+)", value)
    return None if span and 1 <= int(span[1]) <= int(span[2]) else 'must be an integer, or a range such as "2-8"'


def _kind(value: str) -> str | None:
    return None if re.fullmatch(r"[A-Za-z0-9._-]*", value) else "may hold letters, digits, '.', '_' and '-'"


def _run_name(value: str) -> str | None:
    plain = re.fullmatch(r"|[A-Za-z0-9][A-Za-z0-9._-]*", value)
    return None if plain else "may hold letters, digits, '.', '_' and '-', a letter or digit first"


def _convert(value: Any, hint: Any, place: str) -> Any:
    """The value as its declared type; an integer serves as a float, a list as a tuple."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for choice in choices:
        if choice is float:
            if type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max:
                return float(value)
        elif get_origin(choice) is tuple and isinstance(value, list | tuple):
            if all(type(item) is int for item in value):
                return tuple(value)
        elif type(value) is choice:
            if choice is str:
                _check_is_text(value, place)
            return value
    raise UserError(f"{place} = {format_value(value)}: must be {' or '.join(map(_type_name, choices))}")


def _check_is_text(value: str, place: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} = {value!a}: not text, it has bytes that are no UTF-8") from None


def _type_name(hint: Any) -> str:
    names = {str: "text", int: "an integer", float: "a finite number", bool: "true or false"}
    return names.get(hint, "a list of integers")


def format_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(format_value, value))}]"
    return repr(value)


def _quoted(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    escapes |= {chr(code): f"\\u{code:04x}" for code in (*range(32), 127) if chr(code) not in escapes}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'


def config_field(default: Any, meaning: str, check: Check | None = None) -> Any:
    """A dataclass field with its default, meaning and check."""
    return field(default=default, metadata={"meaning": meaning, "check": check})


@dataclass(frozen=True)
class Section:
    """A group of options; its values are checked, and made of their declared types, on creation."""

    section_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for option in fields(self):
            if "check" not in option.metadata:
                continue
            place = f"{self.section_name}.{option.name}"
            value = _convert(getattr(self, option.name), option.type, place)
            object.__setattr__(self, option.name, value)
            problem = option.metadata["check"] and option.metadata["check"](value)
            if problem:
                raise UserError(f"{place} = {format_value(value)}: {problem}")


@dataclass(frozen=True)
class RunConfig(Section):
    """Which run this is, and where it lies."""

    section_name: ClassVar[str] = "run"
    name: str = config_field("", "the run's folder; empty: the configuration's stem and a number", _run_name)
    storage: str = config_field(
        "runs", "where runs lie: a folder or an address pyarrow understands; $NAME is filled in"
    )
    seed: int = config_field(0, "everything random is a function of it", _seed)
    resume: str = config_field("auto", "go on with a run of this name", one_of("auto", "never", "must"))


@dataclass(frozen=True)
class CorpusConfig(Section):
    """The text."""

    section_name: ClassVar[str] = "corpus"
    source: str = config_field("auto", "auto, time-machine, embedded, a path, a glob or an address")
    cleaning: str = config_field("auto", "d2l (lower-case letters), none, or auto", one_of("auto", "d2l", "none"))
    max_tokens: int = config_field(0, "train on so many tokens; 0: all", at_least(0))
    validation_fraction: float = config_field(0.0, "the last part of the text, kept to validate", _fraction)


@dataclass(frozen=True)
class VocabularyConfig(Section):
    """What a token is."""

    section_name: ClassVar[str] = "vocabulary"
    kind: str = config_field("char", "char, byte or word", one_of("char", "byte", "word"))
    size: int = config_field(0, "the most tokens kept, <unk> included; 0: all", at_least(0))
    min_frequency: int = config_field(0, "rarer tokens become <unk>", at_least(0))


@dataclass(frozen=True)
class StreamConfig(Section):
    """How the text is cut into lanes and windows."""

    section_name: ClassVar[str] = "stream"
    batch_size: int = config_field(32, "lanes, over all workers", at_least(1))
    num_steps: int = config_field(40, "tokens of a lane in one window", at_least(1))
    offset: str | int | tuple[int, ...] = config_field(
        "random", "first token of an epoch: random, an integer, or a list with one per epoch", _offset
    )


@dataclass(frozen=True)
class ModelConfig(Section):
    """The recurrent language model."""

    section_name: ClassVar[str] = "model"
    cell: str = config_field("rnn", "rnn, gru, lstm, or package.module:Class", _cell)
    hidden_size: int = config_field(256, "hidden units of a layer", at_least(1))
    num_layers: int = config_field(1, "recurrent layers", at_least(1))
    embedding_size: int = config_field(0, "input features; 0: one-hot", at_least(0))
    dropout: float = config_field(0.0, "probability, between layers and before the output", _fraction)
    init: str = config_field("", "start from the weights in this .safetensors file")


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """How weights are updated."""

    section_name: ClassVar[str] = "optimizer"
    name: str = config_field("sgd", "sgd or adamw", one_of("sgd", "adamw"))
    learning_rate: float = config_field(0.1, "step size at its height", _above_zero)
    weight_decay: float = config_field(0.0, "as torch's optimizer of that name has it", at_least(0))
    grad_clip_norm: float = config_field(0.0, "longest gradient, over all weights; 0: none", at_least(0))
    schedule: str = config_field("constant", "constant, or cosine (to zero)", one_of("constant", "cosine"))
    warmup_steps: int = config_field(0, "steps in which the rate grows from zero", at_least(0))


@dataclass(frozen=True)
class TrainConfig(Section):
    """How long, how precisely, and how often it is written down."""

    section_name: ClassVar[str] = "train"
    epochs: int = config_field(50, "passes over the text", at_least(1))
    max_steps: int = config_field(0, "the most updates; 0: no bound", at_least(0))
    log_every: int = config_field(0, "steps between two rows of metrics; 0: once an epoch", at_least(0))
    checkpoint_every: str | int = config_field("30s", 'steps (200) or seconds ("30s")', _cadence)
    keep_checkpoints: int = config_field(3, "how many of the last ones are kept", at_least(1))
    precision: str = config_field("auto", "auto, fp32, bf16 or fp64", one_of("auto", "fp32", "bf16", "fp64"))
    reproducible: bool = config_field(False, "the same bits on any number of workers")
    lane_groups: int = config_field(8, "parts of the batch that reproducible adds in fixed order", at_least(1))

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints, 0 where the clock decides."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else 0

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds between two checkpoints, infinite where steps decide."""
        is_text = isinstance(self.checkpoint_every, str)
        return float(str(self.checkpoint_every).rstrip("s")) if is_text else math.inf


@dataclass(frozen=True)
class ScaleConfig(Section):
    """On how many workers, and on what."""

    section_name: ClassVar[str] = "scale"
    workers: str | int = config_field(2, '0: in this process; "2-8": as many as there are', _workers)
    accelerator: str = config_field("auto", "auto, cpu or gpu", one_of("auto", "cpu", "gpu"))
    accelerator_type: str = config_field(
        "", "the kind of GPU that workers need, as Ray calls it: A100, H100, T4 …", _kind
    )
    cpus_per_worker: int = config_field(
        0, "cores of a worker; 0: its share of this machine, or one on a cluster", at_least(0)
    )
    placement: str = config_field("pack", "pack or spread workers over nodes", one_of("pack", "spread"))
    hang_timeout: float = config_field(
        60.0, "seconds until a silent worker is replaced, or, once it has saved, a change in nodes is used", _above_zero
    )

    @property
    def min_workers(self) -> int:
        """The fewest workers that a run goes on with."""
        return int(str(self.workers).split("-")[0])

    @property
    def max_workers(self) -> int:
        """The most workers that a run uses."""
        return int(str(self.workers).split("-")[-1])

    @property
    def gpu_requirement(self) -> str:
        """The option that insists on GPUs, as a person writes it; empty where none does."""
        if self.accelerator_type:
            return f"scale.accelerator_type = {self.accelerator_type}"
        return "scale.accelerator = gpu" if self.accelerator == "gpu" else ""


@dataclass(frozen=True)
class GenerateConfig(Section):
    """What the model is asked to continue."""

    section_name: ClassVar[str] = "generate"
    prefix: str = config_field("time traveller", "the text to continue")
    length: int = config_field(50, "tokens to add", at_least(0))
    temperature: float = config_field(0.0, "0: greedy; else draw from the softmax", at_least(0))


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

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
        lanes, workers, offset = self.stream.batch_size, self.scale.max_workers, self.stream.offset
        if workers > lanes:
            raise UserError(
                f"scale.workers = {format_value(self.scale.workers)}: each worker needs a lane, and "
                f"stream.batch_size = {lanes}: lower the one or raise the other"
            )
        if self.scale.accelerator_type and self.scale.accelerator == "cpu":
            raise UserError(
                f"scale.accelerator_type = {format_value(self.scale.accelerator_type)}: names a GPU, and "
                'scale.accelerator = "cpu": leave out the one or the other'
            )
        groups = min(self.train.lane_groups, lanes)
        if self.train.reproducible and workers > groups:
            raise UserError(
                f"scale.workers = {format_value(self.scale.workers)}: a reproducible run hands out whole lane "
                f"groups, and there are {groups}: lower it, or raise train.lane_groups"
            )
        if isinstance(offset, tuple) and len(offset) < self.train.epochs:
            raise UserError(
                f"stream.offset has {len(offset)} entries for train.epochs = {self.train.epochs}: "
                "give one for each epoch"
            )


SECTIONS: dict[str, type[Section]] = {option.name: type(getattr(Config(), option.name)) for option in fields(Config)}
FIELDS = [f"{name}.{option.name}" for name, kind in SECTIONS.items() for option in fields(kind)]


# What may change when a run goes on: where and how it is carried out, not what is computed.
_FREE_SECTIONS = ("scale", "generate")
_FREE_FIELDS = (
    "run.name", "run.storage", "run.resume",
    "train.max_steps", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints",
)  # fmt: skip


def defines_run(name: str) -> bool:
    """Whether an option is of what is computed."""
    section, _, _ = name.partition(".")
    return section not in _FREE_SECTIONS and name not in _FREE_FIELDS


def config_differences(old: Config, new: Config) -> list[str]:
    """What keeps ``new`` from going on with a run of ``old``, as ``field (old → new)``."""
    found = []
    for name in FIELDS:
        section, key = name.split(".")
        before, after = (getattr(getattr(config, section), key) for config in (old, new))
        grown = name == "train.epochs" and after > before
        if name == "stream.offset" and isinstance(before, tuple) and isinstance(after, tuple):
            grown = after[: len(before)] == before
        if before != after and defines_run(name) and not grown:
            found.append(f"{name} ({format_value(before)} → {format_value(after)})")
    return found
