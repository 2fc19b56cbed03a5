"""The prefix that generation continues: where it comes from, and its tokens.

Axes: N tokens of the prefix.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from job.config.inference import GenerateConfig
from job.config.text import CorpusConfig
from job.config.toml import ConfigValues
from job.data.corpus import clean_text
from job.data.dataset import Dataset
from job.data.tokens import Tokens, blocks
from job.data.vocabulary import UNKNOWN, Vocabulary
from job.errors import UserError, report_os_error
from job.paths import is_uri
from job.storage import Folder

# Length of a prefix that is taken from the text.
PREFIX_CHARACTERS = 12
PREFIX_WORDS = 3
MAX_NAMED_TOKENS = 10  # of a prefix, in a notice
MAX_SEARCHED_TOKENS = 1 << 24  # for the bytes of the default prefix
STANDARD_INPUT = "-"


def prefix_values(values: ConfigValues) -> ConfigValues:
    """Returns values that a user gave, with those that follow for the fields of the prefix.

    What is given replaces a stored ``generate.prefix`` and ``generate.prefix_file``, and after a saved state there is
    no prefix unless one is given.

    Raises:
        UserError: prefix and file are both given
    """
    has_prefix, has_file = "generate.prefix" in values, bool(values.get("generate.prefix_file"))
    if has_prefix and has_file:
        problem = f"generate.prefix_file = {values['generate.prefix_file']}: generate.prefix is given, too"
        raise UserError(problem, "give one of them")
    if has_prefix:
        return {"generate.prefix_file": "", **values}
    if values.get("generate.load_state") and not has_file:
        return {**values, "generate.prefix": "", "generate.prefix_file": ""}
    return values


def read_prefix(generate_config: GenerateConfig) -> str:
    """Returns ``generate.prefix``, or the text of ``generate.prefix_file`` if that is set.

    Raises:
        UserError: the file cannot be read, or is not UTF-8
    """
    file = generate_config.prefix_file
    if not file:
        return generate_config.prefix
    if file == STANDARD_INPUT and sys.stdin is None:  # closed by whoever started the process
        raise UserError(f"generate.prefix_file = {file}: there is no standard input", "give a file")
    with report_os_error(f"generate.prefix_file = {file}: cannot be read"):
        if file == STANDARD_INPUT:
            data = sys.stdin.buffer.read()
        elif is_uri(file):
            path = Folder.resolve(file)
            data = path.parent.read(path.name)
        else:
            data = Path(file).read_bytes()  # also from a pipe
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"generate.prefix_file = {file}: not UTF-8 at byte {error.start}"
        raise UserError(problem, "convert it to UTF-8") from None


def prefix_warnings(prefix: str, corpus_config: CorpusConfig, vocabulary: Vocabulary) -> list[str]:
    """Returns a warning that names the tokens of the prefix that are not in the vocabulary, if there are any."""
    tokens = vocabulary.unknown_tokens(clean_text(prefix, corpus_config))
    names = ", ".join(map(repr, tokens[:MAX_NAMED_TOKENS])) + ", …" * (len(tokens) > MAX_NAMED_TOKENS)
    return [f"generate.prefix: not in the vocabulary, and read as {UNKNOWN}: {names}"] if tokens else []


def resolve_prefix(prefix: str, corpus_config: CorpusConfig, dataset: Dataset) -> str:
    """Returns the prefix, or the beginning of the training text in place of a default that the text does not have.

    Args:
        prefix: ``generate.prefix``; checked unless it is the default
        corpus_config: its cleaning
        dataset: the vocabulary and the text

    Raises:
        UserError: none of the prefix's tokens is in the vocabulary
    """
    vocabulary, tokens = dataset.vocabulary, dataset.train_tokens
    if prefix == GenerateConfig.prefix:
        ids = vocabulary.encode(clean_text(prefix, corpus_config))
        is_known = vocabulary.is_text(ids) if vocabulary.has_unknown else _occur(ids, tokens)
        prefix = prefix if is_known.all() else _first_known_text(vocabulary, tokens)
    encode_prefix(prefix, corpus_config, vocabulary)
    return prefix


def _occur(ids: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Returns whether each id occurs among the first tokens, of which it reads no more than needed."""
    is_known = np.zeros(len(ids), bool)
    for block in blocks(tokens[:MAX_SEARCHED_TOKENS]):
        is_known |= np.isin(ids, block)
        if is_known.all():
            break
    return is_known


def _find_first(tokens: Tokens, is_wanted: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """Returns the index of the first token that is wanted, of which it reads no more than needed."""
    start = 0
    for block in blocks(tokens):
        wanted = is_wanted(block)
        if wanted.any():
            return start + int(np.argmax(wanted))
        start += len(block)
    return None


def _first_known_text(vocabulary: Vocabulary, tokens: Tokens) -> str:
    """Returns the first known characters or words, without blanks before them unless there are only blanks."""
    blank_ids = [index for index in range(len(vocabulary)) if not vocabulary.decode([index]).strip()]
    start = _find_first(tokens, lambda block: vocabulary.is_text(block) & ~np.isin(block, blank_ids))
    if start is None:
        start = _find_first(tokens, vocabulary.is_text)
    if start is None:
        problem = "vocabulary: contains no token of the training text"
        raise UserError(problem, "raise vocabulary.size or lower vocabulary.min_frequency")
    beginning = np.asarray(tokens[start : start + 4 * PREFIX_CHARACTERS])  # a character has up to four bytes
    num_known = np.cumprod(vocabulary.is_text(beginning)).sum()
    text = vocabulary.decode(beginning[:num_known].tolist())
    text = text.lstrip() or text
    return " ".join(text.split()[:PREFIX_WORDS]) or text if vocabulary.kind == "word" else text[:PREFIX_CHARACTERS]


def encode_prefix(prefix: str, corpus_config: CorpusConfig, vocabulary: Vocabulary) -> np.ndarray:
    """Returns the token ids (N,) of a prefix, cleaned as the corpus was; those of ``start_tokens`` if it is empty.

    Raises:
        UserError: none of its tokens is in the vocabulary, or it is empty and the vocabulary has no start
    """
    if not prefix:
        return start_tokens(vocabulary)
    ids = vocabulary.encode(clean_text(prefix, corpus_config))
    if not len(ids):
        is_d2l = corpus_config.cleaning == "d2l"
        reason = "letters from A to Z, and corpus.cleaning = d2l keeps only those" if is_d2l else "words"
        raise UserError(f"generate.prefix = {prefix!r}: contains no {reason}", "choose another prefix")
    if vocabulary.is_unknown(ids).all():
        problem = f"generate.prefix = {prefix!r}: none of its tokens is in the vocabulary"
        raise UserError(problem, "choose another prefix")
    return ids


def start_tokens(vocabulary: Vocabulary) -> np.ndarray:
    """Returns the token ids after which a text begins: the separator, or else a newline.

    Raises:
        UserError: the vocabulary has neither
    """
    if vocabulary.has_separator:
        return np.array([len(vocabulary) - 1], np.int32)
    ids = vocabulary.encode(["\n"])
    if not len(ids) or not vocabulary.is_text(ids).all():
        problem = "generate.prefix is empty, and the vocabulary has no separator or newline to begin with"
        raise UserError(problem, "give a text to continue")
    return ids
