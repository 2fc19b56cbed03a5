"""The sections and fields of the configuration."""

import codecs
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from job.config.field import FREE, choice_field, config_field, format_value
from job.config.section import Section
from job.errors import UserError
from job.paths import check_no_credentials

BUILTIN_CELLS = ("rnn", "gru", "lstm", "mingru", "minlstm", "mlstm", "mogrifier")
SCAN_CELLS = ("mingru", "minlstm")  # without weights between hidden states
NUM_BYTES = 256  # tokens that vocabulary.kind = bpe begins with, so that it encodes any text
_NAME = "|[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class RunConfig(Section, on_resume=FREE):
    """The run's name and storage."""

    name: str = config_field(
        "", "folder of the run; empty: the configuration's name and a number", pattern=_NAME,
        form="letters, digits, '.', '_' and '-', with a letter or digit first",
    )  # fmt: skip
    storage: str = config_field("runs", "where runs are stored: a folder or a URI; $NAME is expanded", is_path=True)
    seed: int = config_field(0, "random seed", ge=0, lt=2**63, on_resume="fixed")
    resume: str = choice_field("resume the run", auto="if it exists", never="", must="")
    resume_from: str = config_field(
        "", "start from a checkpoint of another run: its folder, or the run's; empty: none", is_path=True,
        on_resume="may be left out",
    )  # fmt: skip


@dataclass(frozen=True)
class CorpusConfig(Section):
    """The text."""

    source: str = config_field(
        "auto",
        "auto (The Time Machine), time-machine, embedded, a token store, or a file, folder or glob as a path or URI",
        is_path=True, is_free_in_new_run=True,  # the tokens themselves are compared
    )  # fmt: skip
    store: str = config_field("", "folder that prepare writes: a token store", is_path=True, on_resume=FREE)
    encoding: str = config_field("utf-8", "encoding of text files without a byte order mark")
    text_field: str = config_field("text", "field of JSON lines, or column of Parquet files, that contains the text")
    separator: bool = config_field(False, "separate text files by a token, as documents of other formats; false: join")
    documents: str = choice_field(
        "the state of a lane at a separator", join="carried on", reset="zero before it is read"
    )
    newlines: str = choice_field("line ends of the text", keep="", normalize="\\r\\n and \\r become \\n")
    cleaning: str = choice_field("normalization", auto="d2l for built-in texts", d2l="lower-case letters", none="")
    max_tokens: int = config_field(0, "use only the first N tokens; 0: all", "tokens", ge=0)
    validation_fraction: float = config_field(0.0, "fraction of the text, at its end, for validation", ge=0, lt=1)
    validation_source: str = config_field(
        "", "another text for validation, as corpus.source; empty: validation_fraction", is_path=True,
        is_free_in_new_run=True,  # the tokens themselves are compared
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            is_text = codecs.getincrementaldecoder(self.encoding)().decode(b"") == ""
        except (LookupError, ValueError, TypeError):
            is_text = False
        if not is_text:
            problem = f"corpus.encoding = {format_value(self.encoding)}: is not a text encoding of Python"
            raise UserError(problem, "give one such as utf-8, latin-1 or utf-16-le")
        if self.validation_fraction and self.validation_source:
            problem = f"corpus.validation_source = {self.validation_source}: corpus.validation_fraction is set, too"
            raise UserError(problem, "set it to 0, or leave validation_source out")

    @property
    def validation_setting(self) -> str:
        """The field that gives the validation text, and its value; empty without one."""
        if self.validation_source:
            return f"corpus.validation_source = {self.validation_source}"
        return f"corpus.validation_fraction = {self.validation_fraction}" if self.validation_fraction else ""


@dataclass(frozen=True)
class VocabularyConfig(Section):
    """The tokens."""

    kind: str = choice_field("kind of tokens", char="", byte="", word="", bpe="")
    size: int = config_field(0, "largest vocabulary, all tokens included; 0: no limit, not for bpe", "tokens", ge=0)
    min_frequency: int = config_field(0, "tokens that occur less often become <unk>", ge=0)
    end_of_line: bool = config_field(False, "make each end of line a token, between words")
    scope: str = choice_field("text whose tokens are counted", corpus="all of it", training="what is trained on")
    file: str = config_field(
        "", "an existing vocabulary.json or tokenizer.json; empty: made of the text", is_path=True,
        is_free_in_new_run=True,  # the vocabulary itself is compared
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file and (self.size or self.min_frequency or self.end_of_line or self.scope != "corpus"):
            names = "vocabulary.size, min_frequency, end_of_line and scope"
            problem = f"vocabulary.file = {self.file}: {names} do not apply to it"
            raise UserError(problem, "remove them")
        if self.kind == "bpe":
            self._check_bpe()

    def check_can_build(self) -> None:
        """Raises UserError if a vocabulary cannot be made of a text, since bpe has no size."""
        if self.kind == "bpe" and not (self.size or self.file):
            raise UserError("vocabulary.kind = bpe: vocabulary.size is not set", "set it, for example to 8192")

    def _check_bpe(self) -> None:
        if 0 < self.size <= NUM_BYTES:
            problem = f"vocabulary.size = {self.size}: bpe begins with {NUM_BYTES} bytes, and may need a separator"
            raise UserError(problem, f"set at least {NUM_BYTES + 1}")
        if self.scope == "training":
            problem = "vocabulary.scope = training: vocabulary.kind = bpe is trained on the whole corpus"
            raise UserError(problem, "leave it out, or give a vocabulary.file")


@dataclass(frozen=True)
class StreamConfig(Section):
    """How the token stream is cut into lanes and windows."""

    batch_size: int = config_field(32, "lanes (batch rows), over all workers", "lanes", ge=1)
    num_steps: int = config_field(40, "length of a window (sequence length, BPTT length)", "tokens", ge=1)
    offset: str | int | tuple[int, ...] = config_field(
        "random", "first token of an epoch", ge=0, pattern="random", on_resume="a list may grow",
        form='"random", an integer, or a list of integers, one per epoch',
    )  # fmt: skip


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


@dataclass(frozen=True)
class ScaleConfig(Section, on_resume=FREE):
    """The workers and their hardware."""

    workers: str | int = config_field(
        2, "number of workers (0: in this process)", ge=0, pattern="0{0,9}[1-9][0-9]{0,8}-[0-9]{1,18}",
        form='an integer, or a range such as "2-8" (elastic)',
    )  # fmt: skip
    accelerator: str = choice_field("hardware of the workers", auto="a GPU if there is one for each", cpu="", gpu="")
    accelerator_type: str = config_field(
        "", "GPU that workers need", pattern=_NAME, form="a name that Ray gives it, such as A100, H100 or T4"
    )
    cpus_per_worker: int = config_field(0, "cores per worker; 0: share of this machine, 1 on a cluster", "cores", ge=0)
    placement: str = choice_field("nodes on which workers are placed", pack="few", spread="many")
    hang_timeout: float = config_field(
        60.0, "until a hung worker is replaced, and between elastic resizes", "seconds", ge=1e-3, le=10**9
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_workers > self.max_workers:
            raise UserError(f'scale.workers = "{self.workers}": must be an integer, or a range such as "2-8"')

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


@dataclass(frozen=True)
class TrackingConfig(Section, on_resume=FREE):
    """Trackers that follow a run, but not the trials of a search."""

    mlflow: str = config_field("", "URI of MLflow's server or store; env: MLFLOW_TRACKING_URI; empty: none")
    wandb: str = config_field("", "project of Weights & Biases; empty: none")
    checkpoint: bool = config_field(True, "upload the last checkpoint of a finished run")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_credentials("tracking.mlflow", self.mlflow)

    @property
    def targets(self) -> dict[str, str]:
        """The URI or the project of each tracker, by its name."""
        return {name: target for name, target in (("mlflow", self.mlflow), ("wandb", self.wandb)) if target}


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


def config_differences(old: Config, new: Config) -> list[str]:
    """Returns the fields that prevent ``new`` from resuming a run of ``old``, as ``field (old → new)``."""
    new_values = new.fixed_values()
    notes = {"train.epochs": ", the schedule's length unless optimizer.schedule_steps is set"}
    return [
        f"{name} ({format_value(value)} → {format_value(new_values[name])})"
        f"{notes.get(name, '') if old.optimizer.spans_epochs else ''}"
        for name, value in old.fixed_values().items()
        if value != new_values[name] and not _is_compatible(name, old, new)
    ]


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the values, by full name, that a new run does not have from the run whose checkpoint it starts from."""
    new_values = new.fixed_values()
    return {
        name: (value, new_values[name])
        for name, value in old.fixed_values().items()
        if name != "run.resume_from" and value != new_values[name]
    }


def may_change(name: str, old: Config, new: Config) -> bool:
    """Returns whether a new run of ``new`` that starts from a checkpoint of ``old`` may have another value."""
    option = FIELDS[name]
    return option.is_free_in_new_run or option.is_mutable or _is_compatible(name, old, new)


def _is_compatible(name: str, old: Config, new: Config) -> bool:
    if name == "run.resume_from":  # not needed any more
        return not new.run.resume_from
    if name == "train.validate_every":
        return not replace(old, train=replace(old.train, validate_every=0)).validation_user
    return _only_adds_epochs(name, old, new)


def _only_adds_epochs(name: str, old: Config, new: Config) -> bool:
    if name == "stream.offset":
        offset, new_offset = old.stream.offset, new.stream.offset
        return isinstance(offset, tuple) and isinstance(new_offset, tuple) and new_offset[: len(offset)] == offset
    return name == "train.epochs" and new.train.epochs > old.train.epochs and not old.optimizer.spans_epochs
