"""Recognizes the formats of files by their names and their first bytes."""

import codecs

TEXT_SUFFIXES = (".txt", ".md", ".rst")  # of the text files in a folder; by a path or glob, a file of any name is text
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")

_DECOMPRESS, _EXTRACT = "decompress it", "extract the text"
_SIGNATURES = {
    b"\x1f\x9d": ("compressed with compress (.Z)", _DECOMPRESS),
    b"\x04\x22\x4d\x18": ("compressed with lz4", _DECOMPRESS),
    b"PK\x03\x04": ("a zip archive (.docx, .epub and .odt files are, too)", _EXTRACT),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _EXTRACT),
    b"Rar!\x1a\x07": ("a RAR archive", _EXTRACT),
    b"%PDF-": ("a PDF file", _EXTRACT),
    b"\xd0\xcf\x11\xe0": ("an early Office document (.doc)", _EXTRACT),
    b"PAR1": ("a Parquet file that is cut off", "get the file again"),
    b"ARROW1\0": ("an Arrow file", _EXTRACT),
}
SAMPLE_BYTES = 4096  # of a file, by which its format is described
_TAR_OFFSET, _TAR_SIGNATURE = 257, b"ustar"
PARQUET_SIGNATURE = b"PAR1"
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, with whose mark it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def base_name(name: str) -> str:
    """Returns a file's name in lower case, without the suffix of its compression."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSION_SUFFIXES if name.endswith(suffix)), name)


def is_json_lines(name: str) -> bool:
    """Returns whether a file of this name contains a JSON object per line."""
    return base_name(name).endswith(JSON_LINES_SUFFIXES)


def is_parquet(name: str, data: bytes) -> bool:
    """Returns whether a file is Parquet by its name, or begins and ends as Parquet does."""
    signature = PARQUET_SIGNATURE
    is_marked = len(data) > 2 * len(signature) and data.startswith(signature) and data.endswith(signature)
    return is_marked or base_name(name).endswith(PARQUET_SUFFIX)


def is_text_name(name: str) -> bool:
    """Returns whether a file in a folder belongs to a corpus."""
    return base_name(name).endswith((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES, PARQUET_SUFFIX))


def is_compressed_name(name: str) -> bool:
    """Returns whether a file of this name is compressed as a whole, or contains compressed columns."""
    return name.lower().endswith((*COMPRESSION_SUFFIXES, PARQUET_SUFFIX))


def has_format_name(name: str) -> bool:
    """Returns whether a name states another format than the plain bytes of a file."""
    return name.lower().endswith((*COMPRESSION_SUFFIXES, *JSON_LINES_SUFFIXES, PARQUET_SUFFIX))


def marked_encoding(data: bytes) -> str | None:
    """Returns the encoding that a byte order mark states, None without one."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)


def describe_file_format(data: bytes) -> tuple[str, str] | None:
    """Returns what a file is that is not UTF-8 text, and the remedy. None if its format is not recognized."""
    for signature, description in _SIGNATURES.items():
        if data.startswith(signature):
            return description
    if data.startswith(_TAR_SIGNATURE, _TAR_OFFSET):
        return "a tar archive", _EXTRACT
    encoding = _unmarked_encoding(data[:SAMPLE_BYTES])
    return (f"{encoding} text", f"set corpus.encoding = {encoding}") if encoding else None


def _unmarked_encoding(sample: bytes) -> str | None:
    """Returns the encoding without a byte order mark by which most characters of a sample are printable Latin ones."""
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample)
        except UnicodeDecodeError:
            continue
        latin = [character for character in text if character < "\u0100"]
        if 2 * len(latin) > len(text) and "".join("".join(latin).split()).isprintable():
            return encoding
    return None
