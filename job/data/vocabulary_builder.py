"""Builds a vocabulary of a text: counts its tokens, or trains a tokenizer."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, islice
from typing import cast

import numpy as np

from job.config.text import VocabularyConfig
from job.data.bpe import PIECE_CHARACTERS, BpeVocabulary, train_bpe
from job.data.corpus import Corpus
from job.data.cuts import MAX_UNCUT, blocks_of, cut_text, last_cut
from job.data.vocabulary import BLOCK_CHARACTERS, END_OF_LINE, UNKNOWN, Vocabulary, code_points_of, split_documents
from job.data.vocabulary_file import read_vocabulary


def build_vocabulary(vocabulary_config: VocabularyConfig, corpus: Corpus, num_tokens: int | None = None) -> Vocabulary:
    """Builds a vocabulary as the d2l book does (section 9.2), or reads the one that ``vocabulary.file`` names.

    After ``<unk>`` and the end of line, tokens are ordered by falling frequency, ties by first occurrence. There is a
    separator if there is more than one document.

    Args:
        vocabulary_config: the kind of tokens, the largest size and the smallest frequency
        corpus: the text whose tokens are counted, or that a tokenizer is trained on
        num_tokens: number of tokens that are counted, from the first; None: all

    Raises:
        UserError: the file cannot be read, or is of another kind; or a library is not installed
    """
    if vocabulary_config.file:
        return read_vocabulary(vocabulary_config)
    has_separator, kind = len(corpus.documents) > 1, vocabulary_config.kind
    documents = cast(Sequence[list[str]], corpus.documents)
    if kind == "bpe":
        return train_vocabulary(vocabulary_config, chain.from_iterable(documents), has_separator)
    return counted_vocabulary(vocabulary_config, count_tokens(vocabulary_config, documents, num_tokens), has_separator)


def count_tokens(
    vocabulary_config: VocabularyConfig, documents: Iterable[list[str]], num_tokens: int | None = None
) -> Counter[str]:
    """Returns how often each token occurs, in the order of their first occurrences; empty for bytes and bpe.

    The counts of several texts, added to one ``Counter`` by its method ``update`` in the order of the texts, are those
    of all.

    Args:
        vocabulary_config: the kind of tokens
        documents: cleaned texts: ``[clean_text(piece, corpus_config)]``
        num_tokens: number of tokens that are counted, from the first, separators included; None: all
    """
    if vocabulary_config.kind in ("byte", "bpe"):
        return Counter()
    if vocabulary_config.kind == "char" and num_tokens is None:
        return _count_characters(documents)
    tokens = split_documents(documents, vocabulary_config.kind, vocabulary_config.end_of_line)
    return Counter(filter(None, islice(tokens, num_tokens)))


def _count_characters(documents: Iterable[list[str]]) -> Counter[str]:
    counts = Counter[str]()
    for block in blocks_of("".join(chain.from_iterable(documents)), BLOCK_CHARACTERS):
        numbers = _count_code_points(block)
        found = {chr(code_point): int(numbers[code_point]) for code_point in np.flatnonzero(numbers)}
        new = [character for character in found if character not in counts]
        counts.update(dict.fromkeys(sorted(new, key=block.index), 0))  # in the order in which they occur first
        counts.update(found)
    return counts


def _count_code_points(text: str) -> np.ndarray:
    """Returns how often each code point occurs. Bytes are counted in pairs, in three quarters of the time."""
    if not text.isascii():
        return np.bincount(code_points_of(text))
    data = text.encode()
    pairs = np.bincount(np.frombuffer(data, np.uint16, len(data) // 2), minlength=1 << 16).reshape(256, 256)
    return cast(np.ndarray, pairs.sum(0) + pairs.sum(1) + np.bincount([*data[len(data) // 2 * 2 :]], minlength=256))


def counted_vocabulary(vocabulary_config: VocabularyConfig, counts: Counter[str], has_separator: bool) -> Vocabulary:
    """Returns the vocabulary of tokens that ``count_tokens`` counted."""
    if vocabulary_config.kind == "byte":
        return Vocabulary("byte", (), has_separator)
    special = (UNKNOWN, END_OF_LINE) if vocabulary_config.end_of_line else (UNKNOWN,)
    frequent = [token for token, count in counts.most_common() if count >= vocabulary_config.min_frequency]
    tokens = (*special, *(token for token in frequent if token not in special))
    size = max(1, vocabulary_config.size - has_separator) if vocabulary_config.size else None
    return Vocabulary(vocabulary_config.kind, tokens[:size], has_separator)


def train_vocabulary(vocabulary_config: VocabularyConfig, pieces: Iterable[str], has_separator: bool) -> BpeVocabulary:
    """Returns the vocabulary of a byte-level tokenizer that is trained on cleaned texts, in constant memory.

    Args:
        vocabulary_config: the largest size, and the smallest frequency
        pieces: texts that are cut nowhere but where ``last_cut`` does; read once
        has_separator: whether there is more than one document
    """
    texts = chain.from_iterable(
        cut_text(blocks_of(piece, PIECE_CHARACTERS), partial(last_cut, kind="bpe"), MAX_UNCUT) for piece in pieces
    )
    return train_bpe(texts, vocabulary_config.size, vocabulary_config.min_frequency, has_separator)
