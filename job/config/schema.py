"""The configuration: all sections."""

from dataclasses import dataclass, fields
from typing import Any

from job.config.field import format_value
from job.config.inference import EvaluateConfig, GenerateConfig
from job.config.model import ModelConfig
from job.config.run import RunConfig, ScaleConfig, TrackingConfig
from job.config.section import Section
from job.config.text import CorpusConfig, StreamConfig, VocabularyConfig
from job.config.training import OptimizerConfig, TrainConfig
from job.errors import UserError


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
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        num_lanes, scale, offset = self.stream.batch_size, self.scale, self.stream.offset
        workers = f"scale.workers = {format_value(scale.workers)}"
        if scale.max_workers > num_lanes:
            problem = f"{workers}: each worker needs a lane, and stream.batch_size = {num_lanes}"
            raise UserError(problem, "lower the first or raise the second")
        if scale.accelerator_type and scale.accelerator == "cpu":
            problem = f'{scale.gpu_requirement}: names a GPU, and scale.accelerator = "cpu"'
            raise UserError(problem, "remove one of them")
        if self.vocabulary.kind == "byte" and self.corpus.newlines != "keep":
            problem = f"corpus.newlines = {self.corpus.newlines}: vocabulary.kind = byte keeps all bytes"
            raise UserError(problem, "leave it out")
        if self.vocabulary.end_of_line and self.vocabulary.kind != "word":
            problem = f"vocabulary.end_of_line = true: vocabulary.kind = {self.vocabulary.kind} has newlines already"
            raise UserError(problem, "leave it out, or set vocabulary.kind = word")
        if self.model.softmax == "adaptive" and self.vocabulary.kind in ("byte", "bpe"):
            kind = f"vocabulary.kind = {self.vocabulary.kind}"
            problem = f"model.softmax = adaptive: the ids of {kind} are not ordered by frequency"
            raise UserError(problem, "set vocabulary.kind = word, or leave it out")
        if isinstance(offset, tuple) and len(offset) < self.train.epochs:
            problem = f"stream.offset has {len(offset)} entries for train.epochs = {self.train.epochs}"
            raise UserError(problem, "give one for each epoch")
        self._check_training()

    def _check_training(self) -> None:
        """Raises UserError if the sections train and optimizer do not fit to the others."""
        num_groups = min(self.train.lane_groups, self.stream.batch_size)
        if self.train.reproducible and self.scale.max_workers > num_groups:
            workers = f"scale.workers = {format_value(self.scale.workers)}"
            problem = f"{workers}: each worker of a reproducible run needs a lane group, and there are {num_groups}"
            raise UserError(problem, "lower it or raise train.lane_groups")
        if self.train.reproducible and self.train.accumulate > 1:
            problem = f"train.accumulate = {self.train.accumulate}: a reproducible run accumulates its lane groups"
            raise UserError(problem, "leave it out, or raise train.lane_groups")
        if self.validation_user and not self.corpus.validation_setting:
            problem = f"{self.validation_user}: there is no validation text"
            raise UserError(problem, "set corpus.validation_fraction or validation_source, or leave it out")
        if self.evaluate.weights == "average" and self.optimizer.averaging == "none":
            problem = "evaluate.weights = average: optimizer.averaging = none, so there is no average"
            raise UserError(problem, "set the first to raw, or the second")

    @property
    def validation_user(self) -> str:
        """A field for which the run needs validations, and its value, for messages; empty if none does."""
        users = {
            f"train.patience = {self.train.patience}": self.train.patience > 0,
            "optimizer.schedule = plateau": self.optimizer.schedule == "plateau",
            "optimizer.averaging = nt-asgd": self.optimizer.averaging == "nt-asgd",
            f"train.validate_every = {self.train.validate_every}": self.train.validate_every > 0,
        }
        return next((user for user, is_used in users.items() if is_used), "")

    def sections(self) -> list[Section]:
        """Returns the sections in their order."""
        return [getattr(self, option.name) for option in fields(self)]

    def values(self) -> dict[str, Any]:
        """Returns the values of all fields, by full name: ``model.cell``."""
        return {name: value for section in self.sections() for name, value in section.values().items()}

    def fixed_values(self) -> dict[str, Any]:
        """Returns the values that decide the result, by full name."""
        return {name: value for section in self.sections() for name, value in section.fixed_values().items()}


SECTIONS: dict[str, type[Section]] = {section.section_name: type(section) for section in Config().sections()}
FIELDS = {name: option for cls in SECTIONS.values() for name, option in cls.config_fields().items()}
