"""Decompresses files that are recognized by their first bytes, up to a limit."""

import lzma
import re
from collections.abc import Iterator

import pyarrow

from job.errors import UserError

MAX_EXPANSION, FREE_BYTES = 100, 16 << 20  # compressed data may become that many times as long, and as much longer
_CHUNK_BYTES = 1 << 20
_FORMATS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)"),  # with the mark of a block, or of the end
    "xz": re.compile(rb"\xfd7zXZ\0"),
}


def expansion_limit(num_bytes: int) -> int:
    """Returns the number of bytes that compressed data may become, so that a small file cannot fill the memory."""
    return MAX_EXPANSION * num_bytes + FREE_BYTES


def decompress(data: bytes) -> bytes:
    """Returns the content of a gzip, zstd, bz2 or xz file, all streams of it; other data as they are.

    Raises:
        UserError: the file is corrupt, or its content is larger than ``expansion_limit``
    """
    name = next((name for name, signature in _FORMATS.items() if signature.match(data)), None)
    if name is None:
        return data
    content, limit = bytearray(), expansion_limit(len(data))
    for chunk in _decompress_xz(data) if name == "xz" else _decompress(data, name):
        content += chunk
        if len(content) > limit:
            raise UserError(
                f"larger than {limit:,} bytes after decompression with {name}", "give the decompressed file"
            )
    return bytes(content)


def _decompress(data: bytes, name: str) -> Iterator[bytes]:
    source = pyarrow.BufferReader(data)
    stream = pyarrow.CompressedInputStream(source, name)
    try:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk
    except OSError as error:
        raise _corrupt(name, source.tell(), error) from None


def _decompress_xz(data: bytes) -> Iterator[bytes]:
    """Decompresses each stream of a file; ``lzma.open`` would ignore what follows the first that is damaged."""
    remaining = data
    while remaining:
        decompressor, chunk = lzma.LZMADecompressor(lzma.FORMAT_XZ), remaining
        try:
            while not decompressor.eof:
                yield decompressor.decompress(chunk, _CHUNK_BYTES)
                if decompressor.needs_input:
                    raise EOFError("Truncated compressed stream")
                chunk = b""
        except (lzma.LZMAError, EOFError) as error:
            raise _corrupt("xz", len(data) - len(remaining), error) from None
        remaining = decompressor.unused_data.lstrip(b"\0")  # streams may be padded


def _corrupt(name: str, position: int, error: Exception) -> UserError:
    return UserError(f"its {name} data are corrupt or cut off near byte {position:,}: {error}", "get the file again")
