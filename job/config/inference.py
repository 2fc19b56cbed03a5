"""The sections of generation and evaluation."""

from dataclasses import dataclass

from job.config.field import FREE, choice_field, config_field
from job.config.section import Section
from job.errors import UserError


@dataclass(frozen=True)
class GenerateConfig(Section, on_resume=FREE):
    """Text generation."""

    prefix: str = config_field(
        "time traveller", "text to continue (prompt); the default becomes the text's beginning if unknown to it"
    )
    length: int = config_field(50, "length of the continuation", "tokens", ge=0, le=10**6)
    prefix_file: str = config_field(
        "", "file of the text to continue, UTF-8, in place of generate.prefix; -: standard input", is_path=True
    )
    temperature: float = config_field(0.0, "sampling temperature; 0: greedy", ge=0)
    top_k: int = config_field(0, "sample only from the k most likely tokens; 0: from all", "tokens", ge=0)
    top_p: float = config_field(1.0, "sample only from the most likely tokens of this total probability", gt=0, le=1)
    seed: int = config_field(-1, "seed of the sampling; -1: run.seed", ge=-1, lt=2**63)
    num_samples: int = config_field(1, "number of continuations", ge=1, le=10**6)
    stop: str = config_field("", "text before which a continuation ends; empty: none")
    unknown: bool = config_field(False, "generate <unk> like any other token; false: never")
    save_state: str = config_field("", "file in which the state after the prefix is stored; empty: none", is_path=True)
    load_state: str = config_field("", "file of a state to continue from; empty: a zero state", is_path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature:
            return
        for name, default in (("top_k", 0), ("top_p", 1.0), ("num_samples", 1)):
            if getattr(self, name) != default:
                problem = f"generate.{name} = {getattr(self, name)}: generate.temperature = 0 is greedy decoding"
                raise UserError(problem, f"raise the temperature, or set generate.{name} to {default}")


@dataclass(frozen=True)
class EvaluateConfig(Section, on_resume=FREE):
    """Evaluation of trained models."""

    lanes: int = config_field(1, "lanes that the text is split into, each from a zero state", "lanes", ge=1)
    context: int = config_field(0, "start from a zero state every N tokens; 0: carry the state", "tokens", ge=0)
    weights: str = choice_field(
        "weights that generate and evaluate use", auto="average if there is one", raw="", average=""
    )
    dynamic: float = config_field(
        0.0, "learning rate of SGD by which the weights follow the text (dynamic evaluation); 0: none", ge=0
    )
    dynamic_decay: float = config_field(
        0.0, "share of the way back to the trained weights, at each of its updates", ge=0, le=1
    )
    dynamic_steps: int = config_field(20, "tokens between two of its updates", "tokens", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dynamic and (self.context or self.lanes > 1):
            problem = f"evaluate.dynamic = {self.dynamic}: the weights follow one lane with a carried state only"
            raise UserError(problem, "leave out evaluate.lanes and evaluate.context")
        if self.dynamic_decay and not self.dynamic:
            problem = f"evaluate.dynamic_decay = {self.dynamic_decay}: evaluate.dynamic = 0 changes no weights"
            raise UserError(problem, "set evaluate.dynamic, or leave it out")
        if self.context and self.lanes > 1:
            problem = f"evaluate.lanes = {self.lanes}: evaluate.context = {self.context} splits the text already"
            raise UserError(problem, "leave one of them out")
