"""Decompresses files that are recognized by their first bytes, block by block and up to a limit."""

import bz2
import io
import lzma
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, BinaryIO

import pyarrow

from job.errors import UserError, report_os_error
from job.paths import cache_folder

MAX_EXPANSION, FREE_BYTES = 100, 16 << 20  # compressed data may become that many times as long, and as much longer
BLOCK_BYTES = 1 << 20
_FORMATS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)"),  # with the mark of a block, or of the end
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
SIGNATURE_BYTES = 10  # the longest
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "bz2": bz2.BZ2Decompressor,
    "xz": partial(lzma.LZMADecompressor, lzma.FORMAT_XZ),
}


def expansion_limit(num_bytes: int) -> int:
    """Returns the number of bytes that compressed data may become, so that a small file cannot fill the memory."""
    return MAX_EXPANSION * num_bytes + FREE_BYTES


def compression(head: bytes) -> str | None:
    """Returns the compression of a file, gzip, zstd, bz2 or xz, by its first bytes; None for other data."""
    return next((name for name, signature in _FORMATS.items() if signature.match(head)), None)


def decompress(data: bytes) -> bytes:
    """Returns the content of a gzip, zstd, bz2 or xz file, all streams of it; other data as they are.

    Raises:
        UserError: the file is corrupt, or its content is larger than ``expansion_limit``
    """
    name = compression(data)
    return b"".join(decompress_stream(io.BytesIO(data), name, len(data))) if name else data


def decompress_stream(stream: BinaryIO, name: str, num_bytes: int) -> Iterator[bytes]:
    """Yields the content of a file in blocks of at most ``BLOCK_BYTES``.

    Args:
        stream: the compressed file, at its beginning
        name: what ``compression`` returned
        num_bytes: its size

    Raises:
        UserError: as ``decompress``
    """
    length, limit = 0, expansion_limit(num_bytes)
    decompress_blocks = _decompress_streams if name in _DECOMPRESSORS else _decompress
    for block in decompress_blocks(stream, name):
        length += len(block)
        if length > limit:
            raise UserError(
                f"larger than {limit:,} bytes after decompression with {name}", "give the decompressed file"
            )
        yield block


def write_temporary_file(blocks: Iterable[bytes]) -> BinaryIO:
    """Returns a file of these blocks in the folder of caches, which is removed when it is closed.

    Raises:
        UserError: it cannot be written
    """
    with report_os_error("cannot be decompressed", "set XDG_CACHE_HOME to a folder with more space"):
        with ExitStack() as stack:
            file: BinaryIO = stack.enter_context(tempfile.TemporaryFile(dir=cache_folder()))
            file.writelines(blocks)
            file.flush()
            stack.pop_all()
        return file


def _decompress(stream: BinaryIO, name: str) -> Iterator[bytes]:
    source = pyarrow.PythonFile(stream, "r")
    content = pyarrow.CompressedInputStream(source, name)
    try:
        while block := content.read(BLOCK_BYTES):
            yield block
    except (OSError, pyarrow.ArrowException) as error:
        raise _corrupt(name, source.tell(), error) from None


def _decompress_streams(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Decompresses each stream of a file to blocks of ``BLOCK_BYTES``, whatever the sizes of the streams.

    ``lzma.open`` would ignore what follows a first stream that is damaged, and pyarrow fails at an empty one of bz2.
    """
    data, content = file.read(BLOCK_BYTES), bytearray()
    while data:
        decompressor = _DECOMPRESSORS[name]()
        try:
            while not decompressor.eof:
                content += decompressor.decompress(data, BLOCK_BYTES - len(content))
                if len(content) == BLOCK_BYTES:
                    yield bytes(content)
                    content.clear()
                data = file.read(BLOCK_BYTES) if decompressor.needs_input else b""
                if decompressor.needs_input and not data:
                    raise EOFError("Truncated compressed stream")
        except (lzma.LZMAError, OSError, EOFError) as error:
            raise _corrupt(name, file.tell(), error) from None
        data = decompressor.unused_data.lstrip(b"\0")  # streams may be padded
        while not data and (block := file.read(BLOCK_BYTES)):
            data = block.lstrip(b"\0")
    if content:
        yield bytes(content)


def _corrupt(name: str, position: int, error: Exception) -> UserError:
    return UserError(f"its {name} data are corrupt or cut off near byte {position:,}: {error}", "get the file again")
