"""Builds the RunSpec of a configuration: reads and checks text, vocabulary, tokens and initial weights."""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from job.config.schema import Config
from job.data.content import Content
from job.data.corpus import Corpus, read_corpus
from job.data.dataset import Dataset, add_validation_text, build_dataset, map_dataset
from job.data.source import check_source_exists
from job.data.stream import Stream
from job.data.token_store import StoredTokens, open_stored
from job.data.vocabulary import Vocabulary, unknown_warnings
from job.data.vocabulary_file import find_vocabulary, read_vocabulary, read_vocabulary_file
from job.errors import UserError, error_origin, report_os_error
from job.inference.prefix import prefix_warnings, resolve_prefix
from job.nn.language_model import build_model, check_shapes, check_tied, place_by_token, reference_state_dict
from job.run.estimate import check_weights
from job.run.run_dir import open_checkpoint
from job.run.text_cache import TextCache
from job.storage import Folder
from job.training.checkpoint import list_checkpoints
from job.training.run_spec import RunSpec
from job.training.tensor_file import read_tensors, tensor_file

MAX_DROPPED_SHARE = 0.01  # of the tokens, in an epoch, without a notice at the start of a run
MAX_MEAN_WORD_LENGTH = 12  # characters; of languages that separate words by blanks


def build_run_spec(
    config: Config, folder: Folder, content: Content | None = None, cache: TextCache | None = None
) -> RunSpec:
    """Reads the corpus, builds the dataset, and checks all that can be checked without a cluster.

    Args:
        config: as the user gave it
        folder: the run's folder; nothing is written to it
        content: the text or token ids that ``corpus.source`` names, if they are in no file
        cache: opens large texts; None: read texts of any size into memory

    Returns:
        The input of all workers; its configuration has ``corpus.source``, ``corpus.cleaning`` and ``generate.prefix``
        resolved.

    Raises:
        UserError: the corpus, the sizes or the initial weights cannot be used as configured
    """
    dataset, config, corpus = read_dataset(config, content, cache)
    _check_sizes(dataset, config, corpus)
    _check_separator(config, dataset.vocabulary)
    prefix = resolve_prefix(config.generate.prefix, config.corpus, dataset)
    config = replace(config, generate=replace(config.generate, prefix=prefix))
    checkpoints = folder / "checkpoints"
    return RunSpec(config, dataset, checkpoints, _read_init(config, dataset.vocabulary, checkpoints))


class RunText(NamedTuple):
    """The text of a run.

    Args:
        dataset: its tokens
        config: the configuration with the source and its cleaning resolved
        corpus: the text itself; None if it is stored as tokens
    """

    dataset: Dataset
    config: Config
    corpus: Corpus | None


def read_dataset(
    config: Config, content: Content | None = None, cache: TextCache | None = None, known: Vocabulary | None = None
) -> RunText:
    """Reads the texts of a run.

    Args:
        config: the run's
        content: the text or token ids that ``corpus.source`` names, if they are in no file
        cache: opens large texts; None: read texts of any size into memory
        known: the vocabulary of a run that exists; None: build or read it

    Raises:
        UserError: a text or the vocabulary cannot be read, or a text cannot be used as configured
    """
    if config.corpus.validation_source:  # it is read after the vocabulary is built, which may take long
        check_source_exists(config.corpus.validation_source, "corpus.validation_source")
    vocabulary = known or read_vocabulary(config.vocabulary) if config.vocabulary.file else None
    corpus = None
    if content is None and (stored := _open_tokens(config, vocabulary, cache)):
        config = replace(config, corpus=replace(config.corpus, cleaning=stored.cleaning))
        dataset = map_dataset(stored, config.corpus)
    else:
        corpus, config = _read_corpus(config, known or vocabulary, content)
        dataset = build_dataset(corpus, config.corpus, config.vocabulary, known)
    if config.corpus.validation_source:
        dataset = add_validation_text(dataset, config.corpus, config.vocabulary, cache.open if cache else None)
    return RunText(dataset, config, corpus)


def run_warnings(spec: RunSpec) -> list[str]:
    """Returns warnings about too many unknown tokens in a text, and unknown tokens in the prefix."""
    return unknown_warnings(spec.dataset.unknown_shares) + prefix_warnings(
        spec.config.generate.prefix, spec.config.corpus, spec.dataset.vocabulary
    )


def format_dropped_share(spec: RunSpec, min_share: float = 0.0) -> str:
    """Returns the share of the training tokens that an epoch does not use, after a comma; empty up to ``min_share``."""
    share = Stream(spec.dataset.train_tokens, spec.config.stream, spec.config.run.seed).dropped_share
    return f", {100 * share:.2g}% not used in an epoch" if share > min_share else ""


def _open_tokens(config: Config, vocabulary: Vocabulary | None, cache: TextCache | None) -> StoredTokens | None:
    """Returns the tokens of a store, or of a large text; None for a small text."""
    reads_flat = config.vocabulary.kind != "byte"  # whose .bin files may contain anything
    stored = open_stored(config.corpus, config.vocabulary, vocabulary, reads_flat)
    if stored or not cache:
        return stored
    config.vocabulary.check_can_build()
    return cache.open(config.corpus, config.vocabulary, vocabulary)


def _read_corpus(config: Config, vocabulary: Vocabulary | None, content: Content | None) -> tuple[Corpus, Config]:
    """Returns the corpus, and the configuration with its source and cleaning resolved."""
    config.vocabulary.check_can_build()
    has_separator = vocabulary is None or vocabulary.has_separator
    corpus = read_corpus(config.corpus, config.vocabulary.kind, content, has_separator)
    return corpus, replace(config, corpus=replace(config.corpus, source=corpus.source, cleaning=corpus.cleaning))


def _check_separator(config: Config, vocabulary: Vocabulary) -> None:
    """Raises UserError if the state is to be reset at separators, of which there are none."""
    if config.corpus.documents == "reset" and not vocabulary.has_separator:
        problem = "corpus.documents = reset: the vocabulary has no separator, at which the state is reset"
        documents = "documents: JSON lines, Parquet, or corpus.separator = true"
        raise UserError(
            problem, f"set it to join, or give {'a vocabulary.file with one' if config.vocabulary.file else documents}"
        )


def _check_sizes(dataset: Dataset, config: Config, corpus: Corpus | None = None) -> None:
    """Raises UserError if there are too few tokens for a window of all lanes, or for the validation."""
    try:
        Stream(dataset.train_tokens, config.stream, config.run.seed).check_enough_tokens(config.train)
        num_validation = len(dataset.validation_tokens)
        if config.corpus.validation_setting and num_validation <= config.stream.batch_size:
            raise UserError(
                f"{config.corpus.validation_setting} has {num_validation} tokens, "
                f"too few for stream.batch_size = {config.stream.batch_size} lanes",
                "give more text" if config.corpus.validation_source else "raise it or give more text",
            )
    except UserError as error:
        remedy = _remedy_for_long_words(corpus, config.vocabulary.kind) if corpus else ""
        raise UserError(error.problem, remedy or error.remedy) from None


def _remedy_for_long_words(corpus: Corpus, vocabulary_kind: str) -> str:
    """Returns the remedy for too few words of a text with few blanks, such as Chinese. Empty for another text."""
    if vocabulary_kind != "word":
        return ""
    documents = (line for lines in corpus.documents for line in lines if isinstance(line, str))
    lengths = [len(word) for line in documents for word in line.split()]
    mean_length = sum(lengths) // max(len(lengths), 1)
    if mean_length <= MAX_MEAN_WORD_LENGTH:
        return ""
    return f"set vocabulary.kind = char: blanks separate words, which have {mean_length:,} characters here on average"


def _read_init(config: Config, vocabulary: Vocabulary, checkpoints: Folder) -> bytes | None:
    """Reads the weights that ``model.init`` names, for this vocabulary. Builds a model to check them and the cell.

    Returns None if they are not needed: without ``model.init``, and if the run starts or resumes from a checkpoint.
    """
    check_weights(config.model, len(vocabulary))
    try:
        model = build_model(config.model, len(vocabulary), config.run.seed)
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # torch's allocator, or sizes beyond all
        raise UserError(f"model: does not fit into memory: {str(error).splitlines()[0]}", "make it smaller") from None
    if not config.model.init or config.run.resume_from or list_checkpoints(checkpoints)[0]:
        return None
    origin = f"model.init = {config.model.init}"
    with error_origin(origin):
        weights, old = _read_weights(config.model.init, vocabulary if config.vocabulary.file else None)
        if old.kind != vocabulary.kind:
            raise UserError(f"is a model of vocabulary.kind = {old.kind}, not {vocabulary.kind}", "set the same kind")
    check_shapes(weights, reference_state_dict(config.model, len(old)), origin)
    check_tied(config.model, weights, origin)
    if old != vocabulary:
        with error_origin(origin):
            weights = place_by_token(weights, old.names, model, config.model, vocabulary.names)
    return b"".join(tensor_file(weights))


def _read_weights(source: str, vocabulary: Vocabulary | None) -> tuple[dict[str, Tensor], Vocabulary]:
    """Reads the weights and the vocabulary of a run, of a checkpoint, or of a file next to that of its vocabulary.

    Args:
        source: ``model.init``
        vocabulary: of ``vocabulary.file``; that of a file without one next to it
    """
    path = Folder.resolve(source)
    folder = path.parent
    with report_os_error("cannot be read"):
        try:
            weights, _ = folder.read_with(path.name, read_tensors)
        except FileNotFoundError:
            if not folder.has(path.name):
                raise UserError("cannot be read: no such file or folder") from None
            loaded = open_checkpoint(path)
            return loaded.select_weights(), loaded.vocabulary
        if name := find_vocabulary(folder.names()):
            return weights, read_vocabulary_file(folder, name, str(folder / name))
    if vocabulary:
        return weights, vocabulary
    missing = folder / Vocabulary.file_name
    raise UserError(
        f"its tokens are unknown: {missing} is missing, and there is no vocabulary.file",
        f"copy the {Vocabulary.file_name} of its run next to it, or give the run's folder",
    )
