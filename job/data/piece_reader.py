"""Reads a piece of a corpus as parts of cleaned documents, in bounded memory: the same text as of the whole corpus."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, cast

from job.data.compression import BLOCK_BYTES, SIGNATURE_BYTES, compression, decompress_stream, write_temporary_file
from job.data.corpus import NEWLINE, changes_text, clean_text, has_token, with_token
from job.data.cuts import cut_text
from job.data.file_format import PARQUET_SIGNATURE, is_json_lines, is_parquet
from job.data.parse import decode_blocks, parse_json_lines, parse_parquet
from job.data.pieces import Pieces, Span, is_stored_parquet
from job.errors import error_origin


@dataclass(frozen=True)
class Part:
    """A part of a document, or several successive documents, between which are separators.

    Args:
        documents: the text of each, cleaned, as ``Vocabulary.encode_documents`` expects it
        has_separator: whether a separator follows, because the last document ends and there is another one
    """

    documents: list[list[str]] | list[list[bytes]]
    has_separator: bool = False

    @property
    def lines(self) -> list[str] | list[bytes]:
        """The text without the separators."""
        return [*chain.from_iterable(cast(Any, self.documents))]

    @property
    def num_characters(self) -> int:
        """Number of characters, or of bytes if the text is bytes."""
        return sum(map(len, self.lines))


@dataclass(frozen=True)
class _Text:
    """A text that is not cleaned: successive documents, or a part of one.

    Args:
        file: the number of its file
        parts: the part, or documents, any of which may be empty, or all that are; text, or its bytes
        is_start: whether a document or file begins with it, and so a line
        has_documents: whether they are documents, which no other text continues
    """

    file: int
    parts: list[str] | list[bytes]
    is_start: bool
    has_documents: bool


class PieceReader:
    """Reads any piece of a corpus; what depends on the text around the piece, it reads there.

    Args:
        pieces: the pieces of the corpus
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.format = pieces, pieces.text_format
        self.joins_files = not (self.format.has_separator and self.format.corpus_config.separator)

    def read(self, piece: int) -> Iterator[Part]:
        """Yields the parts of the documents in a piece, without blank documents.

        Raises:
            UserError: a file is corrupt or in another encoding or format, or has no such field
        """
        spans = self.pieces.spans_of(piece)
        held: list[Any] | None = None  # until it is known whether another document follows
        held_ends, is_blank = False, None  # whether a document ends with it; whether the document has no token
        for index, text, following in self._texts_with_next(spans):
            continues = following is not None and self._continues(text, following)
            documents = self._clean(text, following if continues else None)
            if self._have_token(documents):
                is_blank = False
            elif is_blank is None:
                is_blank = text.has_documents or not self._has_joined_token(index)
            if not is_blank:
                if held is not None:
                    yield Part(held, held_ends)
                held, held_ends = documents, not continues
            is_blank = is_blank if continues else None
        if held is not None:
            yield Part(held, held_ends and self._has_token_from(spans.stop))

    def has_separators(self) -> bool:
        """Returns whether there are two documents that are not blank. Reads only the beginning of each text file."""
        has_earlier, has_current, previous = False, False, None
        for text in chain.from_iterable(map(self._until_token, range(len(self.pieces.files)))):
            if previous is None or not self._continues(previous, text):
                has_earlier, has_current = has_earlier or has_current, False
            documents, previous = self._clean(text, None), text
            has_current = has_current or self._have_token(documents)
            if (has_earlier and has_current) or len(documents) > 1:
                return True
        return False

    def _until_token(self, file: int) -> Iterator[_Text]:
        """Yields the texts of a file; of one that is no document, only up to the first that is not blank."""
        if self.format.is_plain(self.pieces.files[file].name):
            yield _Text(file, [b"." * min(1, self.pieces.sizes[file])], is_start=True, has_documents=False)
            return
        for _, text in self._texts(self.pieces.spans_of_file[file]):
            yield text
            if not text.has_documents and self._text_has_token(text):
                return

    def _has_token_from(self, first: int) -> bool:
        later = self._texts(range(first, len(self.pieces.spans)))
        return any(self._text_has_token(text) for _, text in later)

    def _has_joined_token(self, index: int) -> bool:
        """Returns whether there is a token in any part of the text to which a span belongs."""
        file = self.pieces.spans[index].file
        for indexes in (range(index, len(self.pieces.spans)), range(index - 1, -1, -1)):
            for _, text in self._texts(indexes):
                if text.has_documents or (text.file != file and not self.joins_files):
                    break
                if self._text_has_token(text):
                    return True
        return False

    def _text_has_token(self, text: _Text) -> bool:
        return self._have_token(self._clean(text, None))

    def _have_token(self, documents: list[Any]) -> bool:
        return any(has_token(lines, self.format.vocabulary_kind) for lines in documents)

    def _continues(self, text: _Text, following: _Text) -> bool:
        """Returns whether a text and the next one are of the same document."""
        are_joined = text.file == following.file or self.joins_files
        return are_joined and not (text.has_documents or following.has_documents)

    def _clean(self, text: _Text, following: _Text | None) -> list[Any]:
        """Returns the cleaned lines of a part, or of each document that has a token."""
        if text.has_documents:
            is_changed = not self.format.is_raw and changes_text(self.format.corpus_config)
            documents = [*map(self._lines_of, text.parts)] if is_changed else [[part] for part in text.parts if part]
            return with_token(documents, self.format.vocabulary_kind)
        return [self._lines_of(self._with_line_end(text, following))]

    def _lines_of(self, content: Any) -> list[Any]:
        return [content] if self.format.is_raw else clean_text(content, self.format.corpus_config)

    def _with_line_end(self, text: _Text, following: _Text | None) -> Any:
        """Returns a part of a text, which ends with a line end if the next one begins a line."""
        content: Any = text.parts[0]
        config, is_raw = self.format.corpus_config, self.format.is_raw
        if following and following.is_start and not (is_raw and text.file != following.file):
            newlines = (b"\n", b"\r") if isinstance(content, bytes) else ("\n", "\r")
            is_cut = content.endswith(newlines[1]) and cast(Any, following.parts[0]).startswith(newlines[0])
            if not content.endswith(newlines):
                content += newlines[0]
            elif is_cut and not is_raw and self.format.vocabulary_kind != "bpe":  # one line end, of the following text
                is_changed = config.cleaning == "d2l" or config.newlines == "normalize"
                is_blank = self.format.vocabulary_kind == "word"  # and a blank is as good
                content = content[:-1] + ("" if is_changed else " " if is_blank else "\r")
        return content

    def _texts_with_next(self, spans: range) -> Iterator[tuple[int, _Text, _Text | None]]:
        """Yields each text with the number of its span, and the next text, which may be in another piece."""
        previous: tuple[int, _Text] | None = None
        for index, text in self._texts(spans):
            if previous:
                yield *previous, text
            previous = index, text
        if previous:
            later = self._texts(range(spans.stop, len(self.pieces.spans)))
            yield *previous, next((text for _, text in later), None)

    def _texts(self, indexes: Iterable[int]) -> Iterator[tuple[int, _Text]]:
        """Yields the texts of spans, without empty ones unless they are documents."""
        for index in indexes:
            span = self.pieces.spans[index]
            file = self.pieces.files[span.file]
            origin = error_origin(file.name) if len(self.pieces.files) > 1 else nullcontext()
            source = error_origin(f"{self.format.field} = {self.format.corpus_config.source}")
            with source, origin, file.open(self.pieces.sizes[span.file]) as stream:
                for text in self._read_span(span, stream):
                    if text.has_documents or text.parts[0]:
                        yield index, text

    def _read_span(self, span: Span, stream: BinaryIO) -> Iterator[_Text]:
        name, size, field = (
            self.pieces.files[span.file].name,
            self.pieces.sizes[span.file],
            self.format.corpus_config.text_field,
        )
        if not self.format.is_plain(name) and (span.has_rows or is_stored_parquet(name, stream, size)):
            row_groups = range(span.start, span.stop) if span.has_rows else None
            return self._documents(span, parse_parquet(stream, size, field, row_groups))
        start, stop = self.pieces.byte_range(span, stream)
        blocks = _read_blocks(stream, start, stop)
        if self.format.is_plain(name):
            return self._parts(span, start, blocks)
        stream.seek(0)
        if not span.stop and (method := compression(stream.read(SIGNATURE_BYTES))):
            stream.seek(0)
            blocks = decompress_stream(stream, method, size)
            head = next(blocks, b"")
            blocks = chain([head], blocks)
            if is_parquet(name, b"") or head.startswith(PARQUET_SIGNATURE):
                return self._read_compressed_parquet(span, name, blocks)
        return self._read_text(span, name, start, blocks)

    def _read_compressed_parquet(self, span: Span, name: str, blocks: Iterable[bytes]) -> Iterator[_Text]:
        """Reads what may be Parquet, whose end is read first, so that it is decompressed on a disk."""
        with write_temporary_file(blocks) as file:
            size = file.tell()
            if is_stored_parquet(name, file, size):
                field = self.format.corpus_config.text_field
                yield from self._documents(span, parse_parquet(file, size, field))
            else:
                yield from self._read_text(span, name, 0, _read_blocks(file, 0, size))

    def _read_text(self, span: Span, name: str, start: int, blocks: Iterable[bytes]) -> Iterator[_Text]:
        if is_json_lines(name):
            origin = error_origin(f"from byte {start:,}") if start else nullcontext()
            field = self.format.corpus_config.text_field
            documents = parse_json_lines(decode_blocks(blocks, self._encoding(start), start), field)
            return self._documents(span, _with_origin(documents, origin))
        if self.format.is_raw:
            return self._parts(span, start, blocks)
        texts = decode_blocks(blocks, self._encoding(start), start)
        is_normalized = self.format.corpus_config.newlines == "normalize" and self.format.vocabulary_kind == "bpe"
        return self._parts(span, start, _normalize(texts) if is_normalized else texts)

    def _encoding(self, start: int) -> str:
        return "utf-8" if start else self.format.corpus_config.encoding

    def _documents(self, span: Span, batches: Iterable[list[str]]) -> Iterator[_Text]:
        """Yields documents, the first of a file after none, which end the text before the file."""
        has_documents = self.format.has_separator
        if has_documents and not span.start:
            yield _Text(span.file, [], is_start=True, has_documents=True)
        for batch in batches:
            documents = [*map(str.encode, batch)] if self.format.is_raw else batch
            groups = [documents] if has_documents else ([document] for document in documents)
            for group in cast(Iterable[list[str] | list[bytes]], groups):
                yield _Text(span.file, group, is_start=True, has_documents=has_documents)

    def _parts(self, span: Span, start: int, blocks: Iterable[Any]) -> Iterator[_Text]:
        max_uncut = None if self.format.corpus_config.cleaning == "d2l" else self.format.max_uncut
        for number, text in enumerate(cut_text(blocks, self.format.find_cut, max_uncut)):
            yield _Text(span.file, [text], is_start=not start and not number, has_documents=False)


def _read_blocks(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        stream.seek(start)  # again: another part of the file may have been read since
        block = stream.read(min(BLOCK_BYTES, stop - start))
        yield block
        start += len(block)


def _normalize(blocks: Iterable[str]) -> Iterator[str]:
    """Makes all line ends ``\\n``, but for a last ``\\r``: where a text for bpe may be cut depends on them."""
    rest = ""
    for block in blocks:
        text = rest + block
        rest = "\r" * text.endswith("\r")
        yield NEWLINE.sub("\n", text[: len(text) - len(rest)])
    yield rest


def _with_origin(batches: Iterator[list[str]], origin: AbstractContextManager[None]) -> Iterator[list[str]]:
    with origin:
        yield from batches
