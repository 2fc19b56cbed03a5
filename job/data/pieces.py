"""Cuts the files of a corpus into pieces of similar size, which are a function of the files only."""

import codecs
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from job.config.text import CorpusConfig
from job.data.compression import compression
from job.data.cuts import MAX_UNCUT, last_cut
from job.data.file_format import SAMPLE_BYTES, has_format_name, is_json_lines, is_parquet, marked_encoding
from job.data.source import SourceFile
from job.errors import UserError, error_origin

PIECE_BYTES = 32 << 20  # of the text of a piece, about
_WINDOW_BYTES, _MAX_WINDOW_BYTES = 64 << 10, 1 << 20  # that are searched for a cut at a time, from the end of a piece
_CONTEXT_BYTES = 16  # before a window, on which a cut may depend
_FILES_AT_ONCE = 16  # whose sizes and formats are requested


@dataclass(frozen=True)
class Span:
    """A part of a file.

    Args:
        file: the number of the file
        start: its first byte, before it is moved to where the text may be cut, or its first row group
        stop: the byte or row group after its last; 0: the end of the file
        has_rows: whether it is a range of row groups
    """

    file: int
    start: int = 0
    stop: int = 0
    has_rows: bool = False


@dataclass(frozen=True)
class TextFormat:
    """How the files of a corpus become text.

    Args:
        corpus_config: the encoding, the field that contains a document, the cleaning
        vocabulary_kind: char, byte, word or bpe
        has_separator: whether the vocabulary can separate documents; if not, they are joined by newlines
        find_cut: returns the last position at which a text may be cut, as ``last_cut`` does
        field: what gave the source, for messages
        max_uncut: as of ``cut_text``
    """

    corpus_config: CorpusConfig
    vocabulary_kind: str
    has_separator: bool
    find_cut: Callable[[str | bytes], int]
    field: str = "corpus.source"
    max_uncut: int | None = MAX_UNCUT

    @property
    def is_raw(self) -> bool:
        """Whether the bytes of files are the tokens."""
        is_unchanged = self.corpus_config.cleaning == "none" and self.corpus_config.encoding == CorpusConfig.encoding
        return self.vocabulary_kind == "byte" and is_unchanged

    def is_plain(self, name: str) -> bool:
        """Returns whether a file of this name is neither decompressed nor parsed."""
        return self.is_raw and not has_format_name(name)


@dataclass(frozen=True)
class Pieces:
    """The files of a corpus, and the pieces into which they are cut.

    Args:
        files: in the order of the corpus
        sizes: of the files, in bytes
        text_format: how they become text
        spans: all parts of all files, in order
        boundaries: the first span of each piece, and the number of spans
    """

    files: tuple[SourceFile, ...]
    sizes: tuple[int, ...]
    text_format: TextFormat
    spans: tuple[Span, ...]
    boundaries: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def spans_of(self, piece: int) -> range:
        """Returns the numbers of the spans of a piece."""
        return range(self.boundaries[piece], self.boundaries[piece + 1])

    @cached_property
    def spans_of_file(self) -> tuple[range, ...]:
        """The numbers of the spans of each file."""
        counts = Counter(span.file for span in self.spans)
        stops = accumulate(counts[file] for file in range(len(self.files)))
        return tuple(range(stop - counts[file], stop) for file, stop in enumerate(stops))

    @cached_property
    def num_bytes(self) -> tuple[int, ...]:
        """The bytes of each piece's files that it reads, for the progress."""
        return tuple(sum(map(self._weight, self.spans_of(piece))) for piece in range(len(self)))

    def _weight(self, index: int) -> int:
        span = self.spans[index]
        size = self.sizes[span.file]
        if span.has_rows:  # row groups are of similar size
            last = self.spans[self.spans_of_file[span.file][-1]]
            return size * (span.stop - span.start) // last.stop
        return (min(span.stop, size) if span.stop else size) - span.start

    def byte_range(self, span: Span, stream: BinaryIO) -> tuple[int, int]:
        """Returns the first byte of a span, and the byte after its last, where the text may be cut.

        Args:
            span: part of a file
            stream: the file
        """
        size = self.sizes[span.file]
        if not span.stop:
            return 0, size
        name = self.files[span.file].name
        find_cut: Callable[[str | bytes], int] = self.text_format.find_cut
        if is_json_lines(name) and not self.text_format.is_plain(name):
            find_cut = _last_line_end
        if self.text_format.is_plain(name):
            return span.start, min(span.stop, size)
        stop = size if span.stop >= size else _find_cut(stream, range(span.start, span.stop), find_cut)
        return (_find_cut(stream, range(span.start), find_cut) if stop else 0), stop


def cut_files(files: list[SourceFile], sizes: list[int], text_format: TextFormat) -> Pieces:
    """Cuts the files of a corpus into pieces of about ``PIECE_BYTES``, small files together.

    Text and JSON lines in UTF-8 are cut by bytes, and Parquet by row groups. Other files, of which any part can be read
    only after all before it, are not cut.

    Raises:
        UserError: a file cannot be read
    """
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        cut = partial(_cut_file, text_format=text_format, num_files=len(files))
        cut_spans = list(threads.map(cut, range(len(files)), files, sizes))
    spans, boundaries, weight = list[Span](), [0], 0
    for file_spans, size in zip(cut_spans, sizes, strict=True):
        for span in file_spans:
            spans.append(span)
            rest = size // len(file_spans) if span.has_rows else size - span.start
            weight += rest if span is file_spans[-1] else PIECE_BYTES
            if weight >= PIECE_BYTES:
                boundaries.append(len(spans))
                weight = 0
    if boundaries[-1] < len(spans):
        boundaries.append(len(spans))
    return Pieces(tuple(files), tuple(sizes), text_format, tuple(spans), tuple(boundaries))


def _cut_file(number: int, file: SourceFile, size: int, text_format: TextFormat, num_files: int) -> list[Span]:
    if size <= PIECE_BYTES:
        return [Span(number)]
    if not text_format.is_plain(file.name):
        with error_origin(file.name) if num_files > 1 else nullcontext(), file.open(size) as stream:
            if is_stored_parquet(file.name, stream, size):
                return _cut_row_groups(number, stream)
            head = stream.read(SAMPLE_BYTES)
            encoding = codecs.lookup(marked_encoding(head) or text_format.corpus_config.encoding).name
            if compression(head) or encoding not in ("utf-8", "utf-8-sig"):
                return [Span(number)]
    return [Span(number, start, start + PIECE_BYTES) for start in range(0, size, PIECE_BYTES)]


def is_stored_parquet(name: str, stream: BinaryIO, size: int) -> bool:
    """Returns whether a file that is not compressed is Parquet, by its name or its first and last bytes."""
    stream.seek(0)
    sample = stream.read(16)
    if size > len(sample):
        stream.seek(size - 4)
        sample += stream.read(4)
    stream.seek(0)
    return not compression(sample) and is_parquet(name, sample)


def _cut_row_groups(number: int, stream: BinaryIO) -> list[Span]:
    try:
        metadata = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(stream, "r")).metadata
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"its Parquet data are corrupt: {str(error).splitlines()[0]}", "get the file again") from None
    spans, start, num_bytes = list[Span](), 0, 0
    for index in range(metadata.num_row_groups):
        num_bytes += metadata.row_group(index).total_byte_size
        if num_bytes >= PIECE_BYTES or index == metadata.num_row_groups - 1:
            spans.append(Span(number, start, index + 1, has_rows=True))
            start, num_bytes = index + 1, 0
    return spans or [Span(number)]


def _last_line_end(text: str | bytes) -> int:
    assert isinstance(text, str)
    return text.rfind("\n") + 1


def _find_cut(stream: BinaryIO, places: range, find_cut: Callable[[str | bytes], int]) -> int:
    """Returns the last byte up to the end of a range at which a text in UTF-8 may be cut; 0 if it is before the range.

    Reads each byte once, in bounded memory: there may be no such place in a file of any size.
    """
    size, stop = _WINDOW_BYTES, places.stop
    while stop > places.start:
        window = min(size, stop - places.start)
        start = max(0, stop - window - _CONTEXT_BYTES)
        stream.seek(start)
        data = stream.read(stop - start)
        # The rest of a character, or a byte order mark, which is no text.
        data = data.lstrip(bytes(range(0x80, 0xC0))) if start else data.removeprefix(codecs.BOM_UTF8)
        # Bytes that are not UTF-8 stay what they are, until the text is decoded.
        text, _ = codecs.utf_8_decode(data, "surrogateescape", False)
        cut = find_cut(text)
        if cut:
            return stop - len(data) + len(text[:cut].encode("utf-8", "surrogateescape"))
        stop -= window
        size = min(8 * size, _MAX_WINDOW_BYTES)
    return 0


def default_cut(vocabulary_kind: str, cleaning: str) -> Callable[[str | bytes], int]:
    """Returns where a text may be cut whose vocabulary is not known."""
    return partial(last_cut, kind=vocabulary_kind, cleaning=cleaning)
