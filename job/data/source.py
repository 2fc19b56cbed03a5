"""The files that ``corpus.source`` names: on a disk, in an object store, or on the web."""

import contextlib
import glob
import hashlib
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit

import pyarrow

from job.data.content import check_no_content_name
from job.data.download import TIME_MACHINE_LENGTH, download_file, download_time_machine
from job.data.file_format import is_text_name
from job.data.manifest import MANIFEST, MARKER, SHARD_FILE
from job.errors import UserError, error_origin
from job.paths import check_no_credentials, is_uri
from job.storage import Folder

BUILT_IN = ("auto", "time-machine", "embedded")  # never paths, even if there are files of these names
_BUFFER_BYTES = 4 << 20  # of a file, that are requested at a time
_LOCAL_BUFFER_BYTES = 128 << 10  # of a file on a disk; longer reads need no buffer
AUTO_DOWNLOAD_TIMEOUT_S = 5.0  # before `auto` falls back to the embedded text


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Args:
        name: its path, by which its format is recognized; for messages
        read: returns its bytes; raises UserError if it cannot be read
        place: its folder and its name there; None: it is not in storage, or may not be read twice
        url: its address on the web, with the digest of its content; each process that reads it has it in its cache
    """

    name: str
    read: Callable[[], bytes]
    place: tuple[Folder, str] | None = None
    url: str = ""

    def describe(self) -> tuple[int, str]:
        """Returns its size in bytes, and what identifies its content: when it was changed, or the content's digest."""
        if self.url:
            path, digest = download_file(self.url)
            return path.stat().st_size, digest
        if self.place is None:
            data = self.read()
            return len(data), hashlib.sha256(data).hexdigest()
        folder, name = self.place
        with _report_storage_error():
            return folder.describe(name)

    def open(self, num_bytes: int) -> BinaryIO:
        """Opens the file to read any part of it.

        Args:
            num_bytes: its size

        Raises:
            UserError: it cannot be read, now or later
        """
        if self.url:
            return open(download_file(self.url)[0], "rb")
        if self.place is None:
            return io.BytesIO(self.read())
        buffer_bytes = _LOCAL_BUFFER_BYTES if self.place[0].local_path else _BUFFER_BYTES
        return io.BufferedReader(_StoredFile(*self.place, num_bytes), buffer_bytes)


class _StoredFile(io.RawIOBase):
    """A file in storage, whose blocks are requested one by one: a request that fails is retried."""

    def __init__(self, folder: Folder, name: str, num_bytes: int) -> None:
        self.folder, self.file_name, self.num_bytes, self.position = folder, name, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.num_bytes}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.num_bytes - self.position))
        with _report_storage_error():
            data = self.folder.read_block(self.file_name, self.position, length) if length else b""
        if len(data) != length:
            raise UserError("is shorter than it was", "do not change it while it is read")
        buffer[:length] = data
        self.position += length
        return length


def find_files(source: str) -> tuple[str, list[SourceFile]]:
    """Returns the source that is read, which differs from ``source`` for ``auto``, and its files in their order.

    Args:
        source: a name, or a file, a folder or a glob as a path or URI

    Raises:
        UserError: nothing is found, or a built-in text cannot be downloaded
    """
    if source == "auto":
        return _time_machine_or_embedded()
    if source == "time-machine":
        return source, [_in_memory(source, download_time_machine())]
    if source == "embedded":
        return source, [_in_memory(source, _embedded_text())]
    check_no_content_name(source)
    if source.startswith(("http://", "https://")):
        return source, [_download(source)]
    return source, _find_in_storage(source) if is_uri(source) else _find_on_disk(source)


def check_source_exists(source: str, field: str) -> None:
    """Raises UserError if a text or tokens are missing that will be read later; nothing is requested by http.

    Args:
        source: as ``corpus.source``
        field: what gave the source, for messages
    """
    if source in BUILT_IN or source.startswith(("http://", "https://")):
        return
    with error_origin(f"{field} = {source}"), _report_storage_error():
        check_no_credentials(field, source)
        if is_uri(source):
            path = Folder.resolve(source)
            found = path.exists() or path.parent.has(f"{path.name}.bin")
        else:
            found = any(os.path.exists(os.path.expanduser(source) + suffix) for suffix in ("", ".bin"))
        if not found:
            files = find_files(source)[1]  # raises if it is a glob
            if not glob.has_magic(source):
                files[0].read()  # raises


def _in_memory(source: str, data: bytes) -> SourceFile:
    return SourceFile(source, lambda: data)


def _download(url: str) -> SourceFile:
    """Downloads a file. Other processes that read it download it, too, if they do not share the cache."""
    _, digest = download_file(url)
    url = f"{url.partition('#')[0]}#sha256={digest}"
    return SourceFile(urlsplit(url).path, partial(_read_download, url), url=url)


def _read_download(url: str) -> bytes:
    return download_file(url)[0].read_bytes()


def _time_machine_or_embedded() -> tuple[str, list[SourceFile]]:
    """Returns The Time Machine if it is cached or downloaded within seconds, else the embedded text."""
    try:
        data = download_time_machine(max_retries=0, limit_s=AUTO_DOWNLOAD_TIMEOUT_S)
        return "time-machine", [_in_memory("time-machine", data)]
    except UserError:
        return find_files("embedded")


def _embedded_text() -> bytes:
    """Returns English prose of Python's standard library: the help topics, truncated to the book's length."""
    topics = importlib.import_module("pydoc_data.topics").topics  # large, so imported only if it is the corpus
    return "\n".join(topics[name] for name in sorted(topics))[:TIME_MACHINE_LENGTH].encode()


def _find_on_disk(pattern: str) -> list[SourceFile]:
    """Returns the files that a path or glob names, or that a folder contains, in the order of their names."""
    path = existing = os.path.expanduser(pattern)
    paths = [path]
    if os.path.isdir(path):
        files = sorted(name for name in _walk(path) if not Path(name).is_fifo())  # whose read may never end
        paths = files or _raise_no_text(os.listdir(path))
    elif glob.has_magic(path) and not os.path.exists(path):
        while existing and not os.path.exists(existing):  # the part of the path that exists is literal
            existing = os.path.dirname(existing)
        names = glob.glob(glob.escape(existing) + path[len(existing) :], recursive=True)
        paths = [name for name in sorted(names) if not os.path.isdir(name)]
    if not paths:
        raise UserError("no file matches")
    return [SourceFile(path, partial(_read_from_disk, path), _place_on_disk(path)) for path in paths]


def _place_on_disk(path: str) -> tuple[Folder, str] | None:
    """Returns where a file is. None if there is no such file, it is a pipe, or its name is not UTF-8."""
    absolute = os.path.abspath(path)
    if not os.path.isfile(absolute) or re.search("[\ud800-\udfff]", absolute):
        return None
    return Folder(os.path.dirname(absolute)), os.path.basename(absolute)


def _walk(folder: str) -> Iterator[str]:
    """Yields the files of readable types below a folder. Skips hidden files and folders, and links to folders."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot be read: {error.filename}: {error.strerror}") from None

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if is_text_name(name) and not name.startswith("."))


def _raise_no_text(names: list[str]) -> NoReturn:
    """Raises UserError about a folder of files, none of which is a text."""
    if MARKER in names or any(map(SHARD_FILE.fullmatch, names)):
        if MANIFEST in names:
            raise UserError("a token store, not a text", "train from it, or give the text that it was made of")
        raise UserError(f"an incomplete token store: it has no {MANIFEST}", "run prepare again")
    kinds = "text (.txt, .md, .rst), JSON lines (.jsonl) or Parquet (.parquet)"
    raise UserError(f"a folder without files of {kinds}", "give a glob for files of other names")


def _read_from_disk(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(
            "no such file", "give a file, a folder, a glob, a URL, auto, time-machine or embedded"
        ) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None


def _find_in_storage(uri: str) -> list[SourceFile]:
    """Returns the files that a URI names, that its folder contains, or that match its glob (of ``*`` and ``**``)."""
    with _report_storage_error():
        path = Folder.resolve(uri, is_named=True)
        if path.local_path is not None:
            return _find_on_disk(str(path.local_path))
        folder, pattern = path.parent, path.name
        if path.is_folder:
            names = [*filter(is_text_name, path.find("**"))] or _raise_no_text(path.names())
            return [_stored_file(path, name) for name in names]
        while "*" in str(folder):
            folder, pattern = folder.parent, f"{folder.name}/{pattern}"
        is_glob = "*" in pattern and not path.parent.has(path.name)
        names = folder.find(pattern) if is_glob else [pattern]
    if not names:
        raise UserError("no file matches")
    return [_stored_file(folder, name) for name in names]


def _stored_file(folder: Folder, name: str) -> SourceFile:
    folder = replace(folder, retry=True)

    def read() -> bytes:
        with _report_storage_error():
            return folder.read(name)

    return SourceFile(str(folder / name), read, (folder, name))


@contextlib.contextmanager
def _report_storage_error() -> Iterator[None]:
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot be read: {str(error).splitlines()[0]}") from None
