"""Reads the text that ``corpus.source`` names and cleans it."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, AnyStr

import numpy as np

from job.config.text import CorpusConfig
from job.data.content import Content
from job.data.parse import parse_file, parse_file_of_bytes
from job.data.source import SourceFile, find_files
from job.errors import UserError, error_origin
from job.paths import check_no_credentials

NEWLINE = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Corpus:
    """A cleaned text.

    Args:
        source: ``corpus.source``, with ``auto`` replaced by the source that was read
        cleaning: ``corpus.cleaning``, with ``auto`` replaced by d2l or none
        documents: for each document, the pieces to tokenize separately, so that no word spans two lines; bytes for a
            byte vocabulary without cleaning; or an array of token ids
    """

    source: str
    cleaning: str
    documents: Sequence[list[str]] | Sequence[list[bytes]] | Sequence[list[np.ndarray]]

    @property
    def num_characters(self) -> int:
        """Number of characters, or of bytes or token ids if the documents are those."""
        return sum(len(line) for document in self.documents for line in document)


def read_corpus(
    corpus_config: CorpusConfig, vocabulary_kind: str, content: Content | None = None, has_separator: bool = True,
    field: str = "corpus.source",
) -> Corpus:  # fmt: skip
    """Reads and cleans the text that a configuration names.

    Args:
        corpus_config: the source, its format and its cleaning
        vocabulary_kind: char, byte or word
        content: what ``content_name`` named; None: read the source
        has_separator: whether a vocabulary can separate documents; if not, they are joined by newlines to a single one
        field: what gave the source, for messages

    Raises:
        UserError: the source cannot be read, is in another encoding or format, or has no text after cleaning
    """
    check_no_credentials(field, corpus_config.source)
    source = corpus_config.source
    if isinstance(content, np.ndarray):
        return Corpus(source, _cleaning(corpus_config), [[content]])
    with error_origin("text" if content is not None else f"{field} = {source}"):
        if content is None:
            corpus_config, files = find_corpus(corpus_config)
        else:
            files = [SourceFile("", lambda: content)]
            corpus_config = replace(corpus_config, encoding=CorpusConfig.encoding, cleaning=_cleaning(corpus_config))
        source, cleaning = corpus_config.source, corpus_config.cleaning
        is_raw = cleaning == "none" and corpus_config.encoding == CorpusConfig.encoding
        documents: list[list[str]] | list[list[bytes]]
        if vocabulary_kind == "byte" and is_raw:
            byte_groups = _read_groups(files, parse_file_of_bytes, corpus_config, (b"\n", b"\r"), has_separator)
            documents = [[b"".join(group)] for group in byte_groups]
        else:
            groups = _read_groups(files, parse_file, corpus_config, ("\n", "\r"), has_separator)
            documents = [_clean_texts(group, vocabulary_kind, corpus_config) for group in groups]
        corpus = Corpus(source, cleaning, with_token(documents, vocabulary_kind) or documents[:1])
        if not corpus.num_characters:
            raise no_text(cleaning)
        return corpus


def find_corpus(corpus_config: CorpusConfig) -> tuple[CorpusConfig, list[SourceFile]]:
    """Returns the configuration with its source and cleaning resolved, and the files of the source in their order."""
    source, files = find_files(corpus_config.source)
    corpus_config = replace(corpus_config, source=source)
    return replace(corpus_config, cleaning=_cleaning(corpus_config)), files


def _cleaning(corpus_config: CorpusConfig) -> str:
    if corpus_config.cleaning != "auto":
        return corpus_config.cleaning
    return "d2l" if corpus_config.source in ("time-machine", "embedded") else "none"


def no_text(cleaning: str) -> UserError:
    """Returns the error that a corpus has no text."""
    return UserError(f"contains no text{' after cleaning (d2l keeps letters only)' if cleaning == 'd2l' else ''}")


def changes_text(corpus_config: CorpusConfig) -> bool:
    """Returns whether ``clean_text`` may return anything but the text as its only line."""
    return corpus_config.cleaning != "none" or corpus_config.newlines == "normalize"


def clean_text(text: str, corpus_config: CorpusConfig) -> list[str]:
    """Returns the text's lines in lower case with letters only, as the d2l book cleans it (section 9.2).

    With ``cleaning = none`` the text is a single line, unchanged except for the newlines that are normalized.
    """
    if corpus_config.cleaning == "none":
        return [NEWLINE.sub("\n", text) if corpus_config.newlines == "normalize" else text]
    return [re.sub("[^A-Za-z]+", " ", line).strip().lower() for line in NEWLINE.split(text)]


def _read_groups(
    files: list[SourceFile],
    parse: Callable[[str, bytes, CorpusConfig], AnyStr | list[AnyStr]],
    corpus_config: CorpusConfig,
    newlines: tuple[AnyStr, AnyStr],
    has_separator: bool,
) -> list[list[AnyStr]]:
    """Returns the texts of all files, in groups that become documents: successive text files are one document."""
    groups: list[list[AnyStr]] = []
    is_open = False  # whether a text file joins the last group
    for file in files:
        with error_origin(file.name) if len(files) > 1 else contextlib.nullcontext():
            content = parse(file.name, file.read(), corpus_config)
        if isinstance(content, list) and has_separator:
            groups += [[document] for document in content]
            is_open = False
            continue
        texts = _on_own_lines(content, newlines) if isinstance(content, list) else [content]
        if is_open and not (has_separator and corpus_config.separator):
            groups[-1] += texts
        else:
            groups.append(texts)
        is_open = True
    return groups


def _on_own_lines(texts: list[AnyStr], newlines: tuple[AnyStr, AnyStr]) -> list[AnyStr]:
    """Returns the texts that are not empty. Each starts on its own line, so that no word spans two files."""
    texts = [text for text in texts if text]
    ended = [text if text.endswith(newlines) else text + newlines[0] for text in texts[:-1]]
    return ended + texts[-1:]


def _clean_texts(texts: list[str], vocabulary_kind: str, corpus_config: CorpusConfig) -> list[str]:
    """Returns the cleaned lines of a document. Texts are joined, but a token of bpe does not span two of them."""
    texts = _on_own_lines(texts, ("\n", "\r"))
    joined = texts if vocabulary_kind == "bpe" else ["".join(texts)]
    return [line for text in joined for line in clean_text(text, corpus_config)]


def has_token(lines: Sequence[Any], vocabulary_kind: str) -> bool:
    """Returns whether there is a character, or a word, in the lines of a document."""
    return any(lines) if vocabulary_kind != "word" else any(line and not line.isspace() for line in lines)


def with_token(documents: Sequence[list[Any]], vocabulary_kind: str) -> list[list[Any]]:
    """Returns the documents that have a character, or a word."""
    if vocabulary_kind != "word":
        return [lines for lines in documents if any(lines)]
    return [lines for lines in documents if has_token(lines, vocabulary_kind)]
