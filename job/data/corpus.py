"""Reads the text that ``corpus.source`` names and cleans it."""

import contextlib
import glob
import hashlib
import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow

from job.config.schema import CorpusConfig
from job.data.download import TIME_MACHINE_LENGTH, download_text, download_time_machine
from job.data.file_format import describe_file_format
from job.errors import UserError, error_origin
from job.paths import check_no_credentials, is_uri
from job.storage import Folder

AUTO_DOWNLOAD_TIMEOUT_S = 5.0  # before `auto` falls back to the embedded text
Content = bytes | np.ndarray  # a text in UTF-8, or token ids: one-dimensional, int32
_CONTENT_NAME = re.compile(r"(text|tokens):[0-9a-f]{16}")


@dataclass(frozen=True)
class Corpus:
    """A cleaned text.

    Args:
        source: ``corpus.source``, with ``auto`` replaced by the source that was read
        cleaning: ``corpus.cleaning``, with ``auto`` replaced by d2l or none
        lines: the pieces to tokenize separately, so that no word spans two lines; bytes for a byte vocabulary without
            cleaning, which are those of all files without a separator; or an array of token ids
    """

    source: str
    cleaning: str
    lines: list[str] | list[bytes] | list[np.ndarray]

    @property
    def num_characters(self) -> int:
        """Number of characters, or of bytes or token ids if the lines are those."""
        return sum(map(len, self.lines))


def content_name(content: Content) -> str:
    """Returns ``corpus.source`` for a text or token ids that are in no file; it contains their checksum."""
    kind, data = ("text", content) if isinstance(content, bytes) else ("tokens", content.tobytes())
    return f"{kind}:{hashlib.sha256(data).hexdigest()[:16]}"


def read_corpus(corpus_config: CorpusConfig, vocabulary_kind: str, content: Content | None = None) -> Corpus:
    """Reads and cleans the text that a configuration names.

    Args:
        corpus_config: the source and its cleaning
        vocabulary_kind: char, byte or word
        content: what ``content_name`` named; None: read the source

    Raises:
        UserError: the source cannot be read, is not UTF-8 text, or has no text after cleaning
    """
    check_no_credentials("corpus.source", corpus_config.source)
    source, cleaning = corpus_config.source, corpus_config.cleaning
    if isinstance(content, np.ndarray):
        return Corpus(source, "none" if cleaning == "auto" else cleaning, [content])
    with error_origin("text" if content is not None else f"corpus.source = {source}"):
        source, files = _read_source(source) if content is None else (source, {source: content})
        if cleaning == "auto":
            cleaning = "d2l" if source in ("time-machine", "embedded") else "none"
        is_raw = vocabulary_kind == "byte" and cleaning == "none"
        corpus = Corpus(source, cleaning, [b"".join(files.values())] if is_raw else clean_text(_join(files), cleaning))
        if not corpus.num_characters:
            detail = " after cleaning (d2l keeps letters only)" if cleaning == "d2l" else ""
            raise UserError(f"contains no text{detail}")
        return corpus


def clean_text(text: str, cleaning: str) -> list[str]:
    """Returns the text's lines in lower case with letters only, as the d2l book cleans it (section 9.2).

    With ``cleaning = none`` the text is a single, unchanged line.
    """
    if cleaning == "none":
        return [text]
    lines = re.split(r"\r\n|\r|\n", text)
    return [re.sub("[^A-Za-z]+", " ", line).strip().lower() for line in lines]


def _join(files: dict[str, bytes]) -> str:
    """Returns the text of all files. A file starts on its own line, so that no word spans two files."""
    texts: list[str] = []
    for name, data in files.items():
        with error_origin(name) if len(files) > 1 else contextlib.nullcontext():
            text = _decode(data)
        if text and texts and not texts[-1].endswith(("\n", "\r")):
            texts.append("\n")
        texts += [text] if text else []
    return "".join(texts)


def _decode(data: bytes) -> str:
    """Returns UTF-8 text without its byte order mark."""
    null_index = data.find(b"\0")
    problem = f"not text, byte {null_index} is NUL"
    if null_index < 0:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
    if description := describe_file_format(data):
        raise UserError(*description)
    remedy = "use vocabulary.kind = byte, which reads any file"
    raise UserError(problem, remedy if null_index >= 0 else f"convert it to UTF-8, or {remedy}")


def _read_source(source: str) -> tuple[str, dict[str, bytes]]:
    """Returns the source that was read, which differs from ``source`` for ``auto``, and the bytes of its files."""
    if source == "auto":
        source, data = _time_machine_or_embedded()
    elif source == "time-machine":
        data = download_time_machine()
    elif source == "embedded":
        data = _embedded_text()
    elif match := _CONTENT_NAME.fullmatch(source):
        problem = f"is {match[1]} that job.train was given in Python, and that no file contains"
        raise UserError(problem, f"give job.train the same {match[1]} again, or name another source")
    elif source.startswith(("http://", "https://")):
        data = download_text(source)
    elif is_uri(source):
        data = _read_uri(source)
    else:
        return source, _read_files(source)
    return source, {source: data}


def _time_machine_or_embedded() -> tuple[str, bytes]:
    """Returns The Time Machine if it is cached or downloaded within seconds, else the embedded text."""
    try:
        return "time-machine", download_time_machine(max_retries=0, limit_s=AUTO_DOWNLOAD_TIMEOUT_S)
    except UserError:
        return "embedded", _embedded_text()


def _embedded_text() -> bytes:
    """Returns English prose of Python's standard library: the help topics, truncated to the book's length."""
    topics = importlib.import_module("pydoc_data.topics").topics  # large, so imported only if it is the corpus
    return "\n".join(topics[name] for name in sorted(topics))[:TIME_MACHINE_LENGTH].encode()


def _read_files(pattern: str) -> dict[str, bytes]:
    """Returns the bytes of the files that a path or glob names, in the order of their names."""
    path = folder = os.path.expanduser(pattern)
    paths = [path]
    if glob.has_magic(path) and not os.path.exists(path):
        while folder and not os.path.exists(folder):  # the part of the path that exists is literal
            folder = os.path.dirname(folder)
        names = glob.glob(glob.escape(folder) + path[len(folder) :], recursive=True)
        paths = [name for name in sorted(names) if not os.path.isdir(name)]
    if not paths:
        raise UserError("no file matches")
    try:
        return {path: Path(path).read_bytes() for path in paths}
    except FileNotFoundError:
        raise UserError("no such file", "give a file, a glob, a URL, auto, time-machine or embedded") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None


def _read_uri(uri: str) -> bytes:
    try:
        file = Folder.resolve(uri)
        return file.parent.read(file.name)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot be read: {str(error).splitlines()[0]}") from None
