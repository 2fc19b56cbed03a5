"""The bytes of a file to its text, or to its documents."""

import codecs
import io
import json
import uuid
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from job.config.text import CorpusConfig
from job.data.compression import BLOCK_BYTES, decompress, expansion_limit
from job.data.file_format import (
    SAMPLE_BYTES,
    describe_file_format,
    has_format_name,
    is_json_lines,
    is_parquet,
    marked_encoding,
)
from job.errors import UserError, error_origin

MAX_NAMED_FIELDS = 10  # in a message
_BATCH_ROWS = 512  # that are parsed at a time, fewer than begin a garbage collection
_MAX_BATCH_ROWS = 1 << 14  # of Parquet that are read at a time
_JSON = json.JSONDecoder(parse_int=float)  # of any size: numbers are not used
_MARK = uuid.uuid4().hex  # between lines that are parsed at once; no text contains it
_BETWEEN_LINES = f',"{_MARK}",'


def parse_file(name: str, data: bytes, corpus_config: CorpusConfig) -> str | list[str]:
    """Returns the text of a text file, or the documents of JSON lines or Parquet; compressed files are decompressed.

    Args:
        name: the file's name, which distinguishes JSON lines from text
        data: its bytes
        corpus_config: the encoding, and the field that contains a document

    Raises:
        UserError: the file is corrupt or in another encoding or format, or has no such field, or one that is not text
    """
    data = decompress(data)
    if is_parquet(name, data):
        return [*chain.from_iterable(parse_parquet(io.BytesIO(data), len(data), corpus_config.text_field))]
    blocks = decode_blocks([data], corpus_config.encoding)
    if is_json_lines(name):
        return [*chain.from_iterable(parse_json_lines(blocks, corpus_config.text_field))]
    return "".join(blocks)


def parse_file_of_bytes(name: str, data: bytes, corpus_config: CorpusConfig) -> bytes | list[bytes]:
    """Returns what ``parse_file`` does, as bytes. Text is not decoded, and a file of a plain name is not parsed."""
    if not has_format_name(name):
        return data
    content = decompress(data)
    if not is_parquet(name, content) and not is_json_lines(name):
        return content
    return [document.encode() for document in parse_file(name, content, corpus_config)]


def decode_blocks(blocks: Iterable[bytes], encoding: str, position: int = 0) -> Iterator[str]:
    """Yields text without its byte order mark, which states its encoding where there is one.

    Args:
        blocks: successive parts of a file
        encoding: that of a file without a byte order mark
        position: of the first block in its file; if not 0, a byte order mark there is text

    Raises:
        UserError: it is in another encoding, or no text
    """
    head, decoder, num_characters = b"", None, 0
    for block in chain(blocks, [b""]):  # the last call of the decoder finds a character that is cut off
        if decoder is None:
            head = b"" if position else block[:SAMPLE_BYTES]
            encoding = codecs.lookup(marked_encoding(head) or encoding).name
            decoder = codecs.getincrementaldecoder(encoding)()
        pending, _ = decoder.getstate()
        is_utf_8 = encoding.startswith("utf-8")
        if is_utf_8 and (index := block.find(b"\0")) >= 0:
            raise _no_text(head, f"not text, byte {position + index} is NUL", "")
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte, place = error.object[error.start : error.start + 1].hex(), position - len(pending) + error.start
            problem = f"not {encoding.removesuffix('-sig').upper()} at byte {place} (0x{byte})"
            raise _no_text(head, problem, "set corpus.encoding, convert it to UTF-8, or ") from None
        yield text if is_utf_8 else _check_characters(text, num_characters)
        position, num_characters = position + len(block), num_characters + len(text)


def _no_text(head: bytes, problem: str, remedy: str) -> UserError:
    if description := describe_file_format(head):
        return UserError(*description)
    return UserError(problem, f"{remedy}use vocabulary.kind = byte, which reads any file")


def _check_characters(text: str, num_before: int = 0) -> str:
    """Returns a text. Raises UserError if a code point of it is half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        number, code_point = num_before + error.start, ord(text[error.start])
        raise UserError(f"not text, character {number} is half of a pair, U+{code_point:04X}", "fix it") from None
    return text


def parse_json_lines(blocks: Iterable[str], field: str) -> Iterator[list[str]]:
    """Yields a field of the object on each line that is not blank, in lists of some; an empty text for null.

    Args:
        blocks: successive parts of a text
        field: the name of the field

    Raises:
        UserError: a line is not a JSON object with such a field, or the field is not text
    """
    number = 1
    for block_lines in _split_lines(blocks):
        for start in range(0, len(block_lines), _BATCH_ROWS):
            lines = block_lines[start : start + _BATCH_ROWS]
            documents = _parse_at_once([*filter(str.strip, lines)], field)
            yield [*_parse_each(lines, number, field)] if documents is None else documents
            number += len(lines)


def _split_lines(blocks: Iterable[str]) -> Iterator[list[str]]:
    """Yields the lines of a text, in lists of some."""
    parts: list[str] = []  # of a line, joined once: it may be very long
    for block in blocks:
        first, *lines = block.split("\n")
        parts.append(first)
        if lines:
            yield ["".join(parts), *lines[:-1]]
            parts = lines[-1:]
    yield ["".join(parts)]


def _parse_at_once(lines: list[str], field: str) -> list[str] | None:
    """Returns a field of the object on each line, in a fifth of the time; None if a line is not such an object."""
    try:
        values = _JSON.decode(f"[{_BETWEEN_LINES.join(lines)}]")
        records, marks = values[::2], values[1::2]
        if len(records) != len(lines) or marks.count(_MARK) != len(marks) or {*map(type, records)} - {dict}:
            return None  # a line has several values, or an array spans lines
        documents = [record[field] for record in records]
        if None in documents:
            documents = ["" if document is None else document for document in documents]
        "".join(documents).encode()
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return documents


def _parse_each(lines: list[str], first_number: int, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, first_number):
        if line.strip():
            with error_origin(f"line {number:,}"):
                yield _document(line, field)


def _document(line: str, field: str) -> str:
    """Returns a field of a JSON object; empty if it is null."""
    try:
        record = json.loads(line, parse_int=float)  # of any size: numbers are not used
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON at column {error.colno:,}: {error.msg}") from None
    except RecursionError:
        raise UserError("not JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise UserError("not a JSON object", "each line must be an object with a field for the text")
    if field not in record:
        raise _missing_field(field, list(record))
    value = record[field]
    if not isinstance(value, str | None):
        kind = "number" if isinstance(value, float) else type(value).__name__
        raise UserError(f"the field {field} is not text, but {kind}", "set corpus.text_field")
    return _check_characters(value or "")


def _missing_field(field: str, names: list[str]) -> UserError:
    found = ", ".join(names[:MAX_NAMED_FIELDS]) + ", …" * (len(names) > MAX_NAMED_FIELDS)
    return UserError(f"has no field {field} but {found or 'none'}", "set corpus.text_field to one of them")


def parse_parquet(file: BinaryIO, file_bytes: int, field: str, row_groups: range | None = None) -> Iterator[list[str]]:
    """Yields the values of a column, in lists of some; empty ones for null.

    Dictionary encoded, a few bytes may be any number of rows.

    Args:
        file: the file, which can be read at any position
        file_bytes: its size
        field: the name of the column
        row_groups: those that are read; None: all

    Raises:
        UserError: the file is corrupt, has no such column, or one that is not text
    """
    limit, num_bytes = expansion_limit(file_bytes), 0
    try:
        source = pyarrow.PythonFile(file, "r")
        plain = pyarrow.parquet.ParquetFile(source)
        _check_column(plain.schema_arrow, field)
        options = {"buffer_size": BLOCK_BYTES, "pre_buffer": False}  # which would read all row groups at once
        table = pyarrow.parquet.ParquetFile(source, read_dictionary=[field], **options)
        for batch in table.iter_batches(_rows_at_once(plain.metadata), row_groups and [*row_groups], [field]):
            column = batch.column(field)
            lengths = pyarrow.compute.binary_length(column.dictionary).take(column.indices)
            num_bytes += len(column) + _sum(lengths)
            if num_bytes > limit:
                raise UserError(f"the field {field} is larger than {limit:,} bytes", "split the file")
            for start in range(0, len(column), _BATCH_ROWS):
                rows = column.slice(start, _BATCH_ROWS)
                if _sum(lengths.slice(start, _BATCH_ROWS)) <= BLOCK_BYTES:
                    yield [value or "" for value in rows.dictionary_decode().to_pylist()]
                else:
                    yield from ([value.as_py() or ""] for value in rows)
    except UnicodeDecodeError as error:
        raise UserError(f"the field {field} is not UTF-8: {error}") from None
    except (OSError, pyarrow.ArrowException) as error:
        problem = f"its Parquet data are corrupt before byte {file.tell():,}: {str(error).splitlines()[0]}"
        raise UserError(problem, "get the file again") from None


def _rows_at_once(metadata: pyarrow.parquet.FileMetaData) -> int:
    """Returns how many rows are read at a time: more of short ones, since each time costs as much as many of them."""
    num_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(_BATCH_ROWS, min(_MAX_BATCH_ROWS, BLOCK_BYTES * metadata.num_rows // max(1, num_bytes)))


def _sum(lengths: pyarrow.Array) -> int:
    return pyarrow.compute.sum(lengths).as_py() or 0


def _check_column(schema: pyarrow.Schema, field: str) -> None:
    """Raises UserError unless there is one column of that name, and it is text."""
    if field not in schema.names:
        raise _missing_field(field, schema.names)
    if schema.names.count(field) > 1:
        raise UserError(f"has {schema.names.count(field)} columns {field}", "set corpus.text_field to another one")
    column_type = schema.types[schema.names.index(field)]
    is_dictionary = pyarrow.types.is_dictionary(column_type)
    value_type = column_type.value_type if is_dictionary else column_type
    if not (pyarrow.types.is_string(value_type) or pyarrow.types.is_large_string(value_type)):
        raise UserError(f"the field {field} is not text, but {column_type}", "set corpus.text_field")
