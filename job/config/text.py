"""The sections of the text and its tokens."""

import codecs
from dataclasses import dataclass

from job.config.field import FREE, choice_field, config_field, format_value
from job.config.section import Section
from job.errors import UserError

NUM_BYTES = 256  # tokens that vocabulary.kind = bpe begins with, so that it encodes any text


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
