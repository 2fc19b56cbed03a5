"""The bytes of a file to its text, or to its documents."""

import codecs
import json
from collections.abc import Iterator

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from job.config.schema import CorpusConfig
from job.data.compression import decompress, expansion_limit
from job.data.file_format import describe_file_format, has_format_name, is_json_lines, is_parquet, marked_encoding
from job.errors import UserError, error_origin

MAX_NAMED_FIELDS = 10  # in a message
_BATCH_ROWS = 1024


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
        return list(_parse_parquet(data, corpus_config.text_field))
    text = _decode(data, corpus_config.encoding)
    return list(_parse_json_lines(text, corpus_config.text_field)) if is_json_lines(name) else text


def parse_file_of_bytes(name: str, data: bytes, corpus_config: CorpusConfig) -> bytes | list[bytes]:
    """Returns what ``parse_file`` does, as bytes. Text is not decoded, and a file of a plain name is not parsed."""
    if not has_format_name(name):
        return data
    content = decompress(data)
    if not is_parquet(name, content) and not is_json_lines(name):
        return content
    return [document.encode() for document in parse_file(name, content, corpus_config)]


def _decode(data: bytes, encoding: str) -> str:
    """Returns text without its byte order mark, which states its encoding where there is one."""
    encoding = codecs.lookup(marked_encoding(data) or encoding).name
    null_index = data.find(b"\0") if encoding.startswith("utf-8") else -1
    problem = f"not text, byte {null_index} is NUL"
    if null_index < 0:
        try:
            return _check_characters(data.decode(encoding))
        except UnicodeDecodeError as error:
            byte = data[error.start : error.start + 1].hex()
            problem = f"not {encoding.removesuffix('-sig').upper()} at byte {error.start} (0x{byte})"
    if description := describe_file_format(data):
        raise UserError(*description)
    remedy = "use vocabulary.kind = byte, which reads any file"
    raise UserError(problem, remedy if null_index >= 0 else f"set corpus.encoding, convert it to UTF-8, or {remedy}")


def _check_characters(text: str) -> str:
    """Returns a text. Raises UserError if a code point of it is half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code_point = ord(text[error.start])
        raise UserError(f"not text, character {error.start} is half of a pair, U+{code_point:04X}", "fix it") from None
    return text


def _parse_json_lines(text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
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


def _parse_parquet(data: bytes, field: str) -> Iterator[str]:
    """Yields the values of a column; empty ones for null. Dictionary encoded, a few bytes may be any number of rows."""
    limit, num_bytes = expansion_limit(len(data)), 0
    try:
        source = pyarrow.BufferReader(data)
        _check_column(pyarrow.parquet.ParquetFile(source).schema_arrow, field)
        file = pyarrow.parquet.ParquetFile(source, read_dictionary=[field])
        for batch in file.iter_batches(_BATCH_ROWS, columns=[field]):
            column = batch.column(field)
            lengths = pyarrow.compute.binary_length(column.dictionary).take(column.indices)
            num_bytes += len(column) + (pyarrow.compute.sum(lengths).as_py() or 0)
            if num_bytes > limit:
                raise UserError(f"the field {field} is larger than {limit:,} bytes", "split the file")
            for value in column.to_pylist():
                yield value or ""
    except UnicodeDecodeError as error:
        raise UserError(f"the field {field} is not UTF-8: {error}") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"its Parquet data are corrupt: {str(error).splitlines()[0]}", "get the file again") from None


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
