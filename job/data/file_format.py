"""Recognizes files that are not UTF-8 text by their first bytes, for messages."""

import codecs


def _encoded_text(encoding: str) -> tuple[str, str]:
    return f"{encoding} text", f"convert it: iconv -f {encoding} -t UTF-8"


_DECOMPRESS, _EXTRACT = "decompress it", "extract the text"
_SIGNATURES = {
    b"\x1f\x8b": ("compressed with gzip", _DECOMPRESS),
    b"\x1f\x9d": ("compressed with compress (.Z)", _DECOMPRESS),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", _DECOMPRESS),
    b"\x04\x22\x4d\x18": ("compressed with lz4", _DECOMPRESS),
    b"BZh": ("compressed with bzip2", _DECOMPRESS),
    b"\xfd7zXZ\0": ("compressed with xz", _DECOMPRESS),
    b"PK\x03\x04": ("a zip archive (.docx, .epub and .odt files are, too)", _EXTRACT),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _EXTRACT),
    b"Rar!\x1a\x07": ("a RAR archive", _EXTRACT),
    b"%PDF-": ("a PDF file", _EXTRACT),
    b"\xd0\xcf\x11\xe0": ("an early Office document (.doc)", _EXTRACT),
    b"PAR1": ("a Parquet file", _EXTRACT),
    b"ARROW1\0": ("an Arrow file", _EXTRACT),
    codecs.BOM_UTF32_LE: _encoded_text("UTF-32"),  # before UTF-16, with whose mark it begins
    codecs.BOM_UTF32_BE: _encoded_text("UTF-32"),
    codecs.BOM_UTF16_LE: _encoded_text("UTF-16"),
    codecs.BOM_UTF16_BE: _encoded_text("UTF-16"),
}
_SAMPLE_BYTES = 4096
_TAR_OFFSET, _TAR_SIGNATURE = 257, b"ustar"


def describe_file_format(data: bytes) -> tuple[str, str] | None:
    """Returns what a file is that is not UTF-8 text, and the remedy. None if its format is not recognized."""
    for signature, description in _SIGNATURES.items():
        if data.startswith(signature):
            return description
    if data.startswith(_TAR_SIGNATURE, _TAR_OFFSET):
        return "a tar archive", _EXTRACT
    encoding = _unmarked_encoding(data[:_SAMPLE_BYTES])
    return _encoded_text(encoding) if encoding else None


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
