"""The section of the model."""

from dataclasses import dataclass, field
from typing import Any

from job.config.field import choice_field, config_field, format_value
from job.config.section import Section
from job.errors import UserError

BUILTIN_CELLS = ("rnn", "gru", "lstm", "mingru", "minlstm", "mlstm", "mogrifier")
SCAN_CELLS = ("mingru", "minlstm")  # without weights between hidden states


@dataclass(frozen=True)
class ModelConfig(Section):
    """The recurrent language model."""

    cell: str = config_field(
        "rnn", "recurrent cell", pattern=rf"{'|'.join(BUILTIN_CELLS)}|[\w.]+:\w+",
        form=f"one of {', '.join(BUILTIN_CELLS)}, or package.module:Class",
    )  # fmt: skip
    cell_class: Any = field(default=None, compare=False, repr=False)  # what ``cell`` names; None: import it
    hidden_size: int | tuple[int, ...] = config_field(
        256, "hidden units per layer", ge=1, form="an integer, or a list of integers, one for each layer"
    )
    num_layers: int = config_field(1, "number of recurrent layers", ge=1, le=1000)
    embedding_size: int = config_field(0, "embedding size; 0: one-hot input", ge=0)
    tied: bool = config_field(False, "the output layer has the weights of the embedding")
    softmax: str = choice_field(
        "output layer", full="a logit for each token", adaptive="clusters of rare tokens, for large vocabularies"
    )
    adaptive_cutoffs: str | tuple[int, ...] = config_field(
        "auto", "first token id of each cluster of the adaptive softmax", ge=1, pattern="auto",
        form='"auto" (a twentieth and a quarter of the vocabulary), or a list of rising integers',
    )  # fmt: skip
    dropout: float = config_field(0.0, "dropout between layers and before the output", ge=0, lt=1, is_mutable=True)
    dropout_locked: bool = config_field(
        False, "the same dropout mask at all steps of a window (variational); false: one for each step", is_mutable=True
    )
    input_dropout: float = config_field(0.0, "dropout of the embeddings that are read", ge=0, lt=1, is_mutable=True)
    output_dropout: str | float = config_field(
        "auto", "dropout before the output layer", ge=0, lt=1, pattern="auto", is_mutable=True,
        form='"auto" (model.dropout), or a number',
    )  # fmt: skip
    embedding_dropout: float = config_field(
        0.0, "dropout of whole words of the embedding, for all lanes", ge=0, lt=1, is_mutable=True
    )
    weight_drop: float = config_field(
        0.0, "dropout of the weights between hidden states (DropConnect)", ge=0, lt=1, is_mutable=True
    )
    activation_regularization: float = config_field(
        0.0, "weight of the mean square of the last layer's dropped outputs (AR)", ge=0, is_mutable=True
    )
    temporal_regularization: float = config_field(
        0.0, "weight of the mean square of the difference of its outputs at successive steps (TAR)", ge=0,
        is_mutable=True,
    )  # fmt: skip
    init: str = config_field(
        "", "initial weights: a run, checkpoint or .safetensors file; empty: random", is_path=True,
        is_free_in_new_run=True,  # which has the checkpoint's weights
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input_dropout", "embedding_dropout"):
            if getattr(self, name) and not self.embedding_size:
                raise UserError(f"model.{name} = {getattr(self, name)}: one-hot inputs", "set model.embedding_size")
        if len(self.layer_sizes) != self.num_layers:
            problem = f"model.hidden_size has {len(self.layer_sizes)} entries for model.num_layers = {self.num_layers}"
            raise UserError(problem, "give one for each layer")
        if self.tied and self.embedding_size != self.layer_sizes[-1]:
            problem = f"model.tied = true: model.embedding_size = {self.embedding_size} and"
            raise UserError(f"{problem} model.hidden_size = {format_value(self.hidden_size)} differ", "make them equal")
        self._check_softmax()
        if isinstance(self.hidden_size, tuple) and self.cell not in BUILTIN_CELLS:
            problem = f"model.hidden_size = {format_value(self.hidden_size)}: model.cell = {self.cell} takes an integer"
            raise UserError(problem, "give one")
        if self.weight_drop and (self.cell in SCAN_CELLS or self.cell not in BUILTIN_CELLS):
            problem = (
                f"model.weight_drop = {self.weight_drop}: the hidden weights of model.cell = {self.cell} are unknown"
            )
            if self.cell in SCAN_CELLS:
                problem = f"model.weight_drop = {self.weight_drop}: model.cell = {self.cell} has no hidden weights"
            raise UserError(problem, "leave it out")

    def _check_softmax(self) -> None:
        """Raises UserError if fields contradict ``softmax``, or cutoffs do not rise."""
        cutoffs = self.adaptive_cutoffs
        if self.softmax == "adaptive" and self.tied:
            problem = "model.tied = true: model.softmax = adaptive has no weight for each token"
            raise UserError(problem, "set one of them only")
        if isinstance(cutoffs, tuple):
            setting = f"model.adaptive_cutoffs = {format_value(cutoffs)}"
            if self.softmax == "full":
                raise UserError(f"{setting}: model.softmax = full has no clusters", "leave it out")
            if not cutoffs or list(cutoffs) != sorted(set(cutoffs)):
                raise UserError(f"{setting}: must be one or more rising integers")

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """The number of hidden units of each layer."""
        return self.hidden_size if isinstance(self.hidden_size, tuple) else (self.hidden_size,) * self.num_layers

    @property
    def output_rate(self) -> float:
        """The dropout before the output layer."""
        return self.output_dropout if isinstance(self.output_dropout, float) else self.dropout
