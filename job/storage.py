"""Folders on a local disk or on any file system that pyarrow supports: atomic writes, retries."""

import contextlib
import glob
import logging
import os
import random
import re
import shlex
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote, unquote

import pyarrow
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from job.errors import UserError, error_origin, report_os_error
from job.hub import SCHEME, hub_error, open_hub
from job.paths import check_no_credentials, escape_dollars, is_uri

_URI_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"  # have a meaning in a URI; others, such as blanks, are percent-encoded

_logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])
Result = TypeVar("Result")

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
RETRY_JITTER = 0.5, 1.5  # factors of these, so that workers do not retry in step
MAX_RETRY_S = RETRY_JITTER[1] * sum(RETRY_DELAYS_S)
# Errors that a retry cannot fix, by their names in pyarrow's messages.
PERMANENT_ERRORS = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|NO_SUCH_KEY|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH"
)
_PROBE = bytes(4096)  # a full disk still has room for empty files


class TooLarge(OSError):
    """A file is larger than the limit of a read."""


def _retried(method: Method) -> Method:
    """Repeats a request of a ``Folder`` after errors that may pass, if its ``retry`` is set."""

    def attempt(folder: "Folder", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(folder, *args, **kwargs)
        except Exception as error:
            if not folder.address.startswith(SCHEME):
                raise
            raise hub_error(error) from None

    @wraps(method)
    def request(folder: "Folder", *args: Any, **kwargs: Any) -> Any:
        is_retried = folder.retry and folder.local_path is None and not folder.address.startswith(SCHEME)
        for delay in RETRY_DELAYS_S if is_retried else ():  # the hub's own library retries
            try:
                return attempt(folder, *args, **kwargs)
            except (FileNotFoundError, PermissionError, TooLarge):
                raise
            except OSError as error:
                if PERMANENT_ERRORS.search(str(error)):
                    raise
                _logger.warning("%s of %s failed and is retried: %s", method.__name__, folder, error)
            time.sleep(delay * random.uniform(*RETRY_JITTER))
        return attempt(folder, *args, **kwargs)

    return cast(Method, request)


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or an object store. It is created by the first write into it.

    A written file is complete or absent: local files are renamed into place, and object stores
    show an object only once it is complete. Methods raise OSError if the storage fails.

    Args:
        address: an absolute local path, or a URI
        retry: retry failed requests to an object store for one to two minutes
        location: the file system and the path in it; opened from the address if None
        before_change: called before each attempt of a request that changes something, and again before a local file
            is renamed into place; may raise; not pickled
    """

    address: str
    retry: bool = False
    location: tuple[fs.FileSystem, str] | None = field(default=None, compare=False, repr=False)
    before_change: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def resolve(cls, source: str, is_named: bool = False) -> "Folder":
        """Returns the folder of a path or URI; a relative path becomes absolute.

        Args:
            source: the path or URI
            is_named: whether the caller adds it to the message of an error

        Raises:
            UserError: if the URI contains credentials or cannot be opened
        """
        if not is_uri(source):
            path = str(Path(source).absolute())
            if re.search("[\ud800-\udfff]", path):
                raise UserError(f"{path!a}: contains bytes that are not UTF-8", "choose another folder")
            return cls(path)
        check_no_credentials("storage", source)
        address = quote(source.rstrip("/"), safe=_URI_CHARACTERS)
        with contextlib.nullcontext() if is_named else error_origin(address):
            return cls(address, location=_open_location(address))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before_change": None}

    def __fspath__(self) -> str:
        return self.address

    def _check_change(self) -> None:
        if self.address.startswith(SCHEME):
            raise PermissionError("the Hugging Face hub is only read")
        if self.before_change:
            self.before_change()

    @cached_property
    def _location(self) -> tuple[fs.FileSystem, str]:
        with error_origin(self.address):
            return self.location or _open_location(self.address)

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self._location[1].rpartition("/")[2]

    @property
    def parent(self) -> "Folder":
        """The folder that contains this one."""
        base, query = self._base_and_query
        file_system, path = self._location
        return replace(self, address=base.rpartition("/")[0] + query, location=(file_system, path.rpartition("/")[0]))

    def contains(self, other: "Folder") -> bool:
        """Returns whether the other folder is this one or below it."""
        inner, outer = (str(folder.local_path and folder.local_path.resolve()) for folder in (other, self))
        if None in (other.local_path, self.local_path):
            inner, outer = other._base_and_query[0], self._base_and_query[0]
        return f"{inner}/".startswith(f"{outer}/")

    @property
    def _base_and_query(self) -> tuple[str, str]:
        """The address without and its query, which only a URI has: in a path, a question mark is literal."""
        base, mark, query = self.address.partition("?") if is_uri(self.address) else (self.address, "", "")
        return base, mark + query

    @property
    def local_path(self) -> Path | None:
        """The path on a local (or mounted) disk, None for an object store."""
        file_system, path = self._location
        return Path(path) if isinstance(file_system, fs.LocalFileSystem) else None

    def __truediv__(self, name: str) -> "Folder":
        base, query = self._base_and_query
        file_system, path = self._location  # shared: a new connection costs requests
        component = quote(name) if is_uri(self.address) else name
        return replace(self, address=f"{base}/{component}{query}", location=(file_system, f"{path}/{name}"))

    def __str__(self) -> str:
        """For messages: a local path relative to the working directory if below it, a URI without its query."""
        path = self.local_path
        if path is None:
            return self._base_and_query[0]
        with contextlib.suppress(ValueError, OSError):  # the working directory may have been deleted
            return str(path.relative_to(Path.cwd()))
        return str(path)

    @property
    def shell_quoted(self) -> str:
        """The path or the whole URI as a shell argument."""
        return shlex.quote(str(self) if self.local_path else escape_dollars(self.address))

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """Returns a file's bytes; raises as ``read_with``."""
        data: bytes = self.read_with(name, lambda stream, _: stream.read(), max_bytes)
        return data

    @_retried
    def read_with(
        self, name: str, parse: Callable[[pyarrow.NativeFile, int], Result], max_bytes: int | None = None
    ) -> Result:
        """Returns what ``parse`` makes of a file's stream and size; after a failed request it is called again.

        Raises:
            FileNotFoundError: if there is no such file
            TooLarge: if it has more than ``max_bytes``
        """
        file_system, path = self._location
        size = file_system.get_file_info(f"{path}/{name}").size
        if size is None:
            raise FileNotFoundError(f"{self / name}: no such file")
        if max_bytes is not None and size > max_bytes:
            raise TooLarge(f"{self / name}: {size} bytes, more than the {max_bytes} expected")
        with file_system.open_input_stream(f"{path}/{name}", compression=None) as stream:
            return parse(stream, size)

    @_retried
    def read_block(self, name: str, start: int, max_bytes: int) -> bytes:
        """Returns up to ``max_bytes`` of a file from the byte ``start``; a negative one counts from the end."""
        if self.local_path and not (self.local_path / name).is_file():  # to open a FIFO would wait for its writer
            raise FileNotFoundError(f"{self / name}: no such file")
        file_system, path = self._location
        with file_system.open_input_file(f"{path}/{name}") as file:
            file.seek(start if start >= 0 else max(0, file.size() + start))
            return file.read(max_bytes)

    @_retried
    def describe(self, name: str) -> tuple[int, str]:
        """Returns a file's size in bytes, and when it was changed or, where that is not known, a checksum.

        Raises FileNotFoundError if there is no such file.
        """
        file_system, path = self._location
        info = file_system.get_file_info(f"{path}/{name}")
        if info.size is None:
            raise FileNotFoundError(f"{self / name}: no such file")
        handler = getattr(file_system, "handler", None)
        if info.mtime is None and isinstance(handler, fs.FSSpecHandler):  # the Hugging Face hub
            return info.size, str(handler.fs.checksum(f"{path}/{name}"))
        return info.size, str(info.mtime_ns)

    @_retried
    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Writes a file, part by part, atomically and durably: it is on the disk when this returns."""
        self._check_change()
        if self.local_path is not None:
            return _write_local(self.local_path, name, parts, self._check_change)
        file_system, path = self._location
        with file_system.open_output_stream(f"{path}/{name}") as stream:
            for part in parts:
                stream.write(part)

    def replace_tail(self, name: str, num_bytes: int, data: bytes = b"") -> None:
        """Replaces the last bytes of a file durably. An object store, which cannot do so, gets the whole file."""
        if self.local_path is None:
            content = self.read(name)
            return self.write(name, content[: len(content) - num_bytes] + data)
        self._check_change()
        with open(self.local_path / name, "r+b") as stream:
            stream.seek(-num_bytes, os.SEEK_END)
            stream.truncate()
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    @_retried
    def infos(self) -> list[fs.FileInfo]:
        """Returns pyarrow's description of each file and folder in it; empty if it does not exist.

        Leaves out those whose names are not UTF-8, which are not of this program.
        """
        file_system, path = self._location
        return [*filter(_has_valid_name, file_system.get_file_info(fs.FileSelector(path, allow_not_found=True)))]

    def sizes(self) -> dict[str, int | None]:
        """Returns the sizes of the files in it by name, None for folders; empty if it does not exist."""
        return {info.base_name: info.size for info in self.infos()}

    def names(self) -> list[str]:
        """Returns the names of the files and folders in it, sorted; empty if it does not exist."""
        return sorted(self.sizes())

    @property
    @_retried
    def is_folder(self) -> bool:
        """Whether it exists and is not a file."""
        file_system, path = self._location
        return file_system.get_file_info(path).type == fs.FileType.Directory

    @_retried
    def find(self, pattern: str) -> list[str]:
        """Returns the relative paths of the files below it that match a glob, sorted, without hidden ones.

        ``*`` matches within a name, ``**`` any folders.
        """
        file_system, path = self._location
        handler = getattr(file_system, "handler", None)
        listed = handler.fs if isinstance(handler, fs.FSSpecHandler) else ArrowFSWrapper(file_system)
        found = listed.glob(f"{glob.escape(path)}/{pattern}", detail=True)
        names = [name.removeprefix(path).lstrip("/") for name, info in found.items() if info["type"] == "file"]
        return sorted(name for name in names if "/." not in f"/{name}")

    @_retried
    def exists(self) -> bool:
        """Returns whether it exists: on an object store, whether there is a file in it."""
        file_system, path = self._location
        return file_system.get_file_info(path).type != fs.FileType.NotFound

    @_retried
    def size(self, name: str) -> int | None:
        """Returns the number of bytes of a file, None if there is no such file."""
        file_system, path = self._location
        size: int | None = file_system.get_file_info(f"{path}/{name}").size
        return size

    @_retried
    def has(self, name: str) -> bool:
        """Returns whether it contains a file or folder of that name."""
        file_system, path = self._location
        return file_system.get_file_info(f"{path}/{name}").type != fs.FileType.NotFound

    @_retried
    def remove(self, name: str) -> None:
        """Removes a file, or a folder with its contents; does nothing if there is none."""
        self._check_change()
        if self.local_path is not None:
            target = self.local_path / name
            if target.is_dir() and not target.is_symlink():
                return shutil.rmtree(target, ignore_errors=True)
            return target.unlink(missing_ok=True)
        file_system, path = self._location
        deletes = {fs.FileType.Directory: file_system.delete_dir, fs.FileType.File: file_system.delete_file}
        with contextlib.suppress(FileNotFoundError):  # an earlier attempt, whose answer was lost, has removed it
            if delete := deletes.get(file_system.get_file_info(f"{path}/{name}").type):
                delete(f"{path}/{name}")

    @_retried
    def upload(self, source: Path) -> None:
        """Copies a local folder's files into this one; other files here stay."""
        self._check_change()
        file_system, path = self._location
        fs.copy_files(str(source), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=file_system)

    def check_writable(self) -> None:
        """Raises UserError unless files can be written, overwritten and deleted here; leaves none behind."""
        with self.probe_file():
            pass

    @contextlib.contextmanager
    def probe_file(self, field: str = "run.storage") -> Iterator[str]:
        """Yields the name of a file that exists here inside the ``with`` block.

        Raises:
            UserError: if it cannot be written, overwritten or, at the end of the block, deleted
        """
        name, missing = f".writable-{uuid.uuid4().hex[:8]}", list[Path]()
        local, remedy = self.local_path, "grant write access, free space there, or choose another folder"
        try:
            with report_os_error(f"{field} = {self}: cannot be written to", remedy):
                missing += [folder for folder in (local, *local.parents) if not folder.exists()] if local else []
                self.write(name, _PROBE)
                self.write(name, _PROBE)
            try:
                yield name
            finally:
                with report_os_error(f"{field} = {self}: files cannot be deleted", remedy):
                    self.remove(name)
        finally:
            with contextlib.suppress(OSError):  # another run may be using the folders by now
                for folder in missing:
                    folder.rmdir()


def _has_valid_name(info: fs.FileInfo) -> bool:
    try:
        return bool(info.base_name)
    except UnicodeDecodeError:
        return False


def _open_location(address: str) -> tuple[fs.FileSystem, str]:
    if not is_uri(address):
        return fs.LocalFileSystem(), address
    if address.startswith(SCHEME):
        path = unquote(address.removeprefix(SCHEME))
        return open_hub(path), path
    try:
        file_system, path = fs.FileSystem.from_uri(address)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0].removesuffix(f": {address}")
        raise UserError(f"not a URI that pyarrow supports: {reason}") from None
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot be reached: {reason}", "check region, credentials and network") from None
    if "\0" in path:  # written as %00
        raise UserError("contains a NUL character")
    return file_system, path


def _write_local(
    folder: Path, name: str, parts: Iterable[bytes | memoryview], check_change: Callable[[], None]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}-{threading.get_ident()}"
    try:
        with open(temporary, "wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        check_change()  # again: a network file system that does not respond may have blocked the write for minutes
        os.replace(temporary, folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(folder)


def _fsync_folder(folder: Path) -> None:
    """Makes a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
