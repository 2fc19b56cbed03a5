"""Folders on a local disk or on any of pyarrow's file systems, with atomic writes."""

import contextlib
import os
import random
import re
import shlex
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import fs

from job.errors import UserError


def is_uri(source: str) -> bool:
    """Whether the text names a file system of its own (``s3://…``) and not a local path."""
    return "://" in source


def expand_env(source: str) -> str:
    """The text with ``~`` and ``$NAME`` filled in; UserError where no such name is set.

    A cluster says in its environment where its runs lie: ``run.storage = $RUNS``.
    """
    missing = [name for name in re.findall(r"\$\{?(\w+)", source) if name not in os.environ]
    if missing:
        raise UserError(f"{source}: {missing[0]} is not set in the environment; set it, or write the place itself")
    return os.path.expanduser(os.path.expandvars(source))


RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between tries where a store falters
# What no further try mends, in the words of pyarrow's errors.
PERMANENT_ERRORS = re.compile("ACCESS_DENIED|NO_SUCH|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH")


class TooLarge(OSError):
    """A file is larger than it may be."""


@dataclass(frozen=True)
class Folder:
    """A folder by its address; it exists once something is written into it.

    A file that is written is there whole or not at all: on a local disk by renaming, elsewhere
    because object stores show an object only when it is complete. Errors are OSError. One that is
    ``patient`` tries for a minute or two where a store falters, as they do under load.
    """

    address: str
    retry: bool = False

    @classmethod
    def at(cls, address: str) -> "Folder":
        """A folder from what a user wrote; a local path is made absolute."""
        address = expand_env(address)
        if not is_uri(address):
            return cls(str(Path(address).absolute()))
        folder = cls(address.rstrip("/"))
        folder._place  # noqa: B018  an address that nobody understands is refused here
        return folder

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        if not is_uri(self.address):
            return fs.LocalFileSystem(), self.address
        try:
            return fs.FileSystem.from_uri(self.address)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.address}: not an address pyarrow understands: {reason}") from None
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.address}: cannot be reached: {reason}; see region, credentials and network"
            ) from None

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.partition("?")[0].rpartition("/")[2]

    @property
    def parent(self) -> "Folder":
        """The folder that this one lies in."""
        base, mark, query = self.address.partition("?")
        return Folder(f"{base.rpartition('/')[0]}{mark}{query}", self.retry)

    @property
    def local(self) -> Path | None:
        """The folder's path where it lies on a local (or mounted) disk."""
        system, path = self._place
        return Path(path) if isinstance(system, fs.LocalFileSystem) else None

    def __truediv__(self, name: str) -> "Folder":
        base, mark, query = self.address.partition("?")
        inner = Folder(f"{base}/{name}{mark}{query}", self.retry)
        if is_uri(self.address):  # by the connection that there is
            system, path = self._place
            inner.__dict__["_place"] = (system, f"{path}/{name}")
        return inner

    def __str__(self) -> str:
        """As a person would write it: a local path relative to where one stands, if below it."""
        path = self.local
        if path is None:
            return self.address.partition("?")[0]
        with contextlib.suppress(ValueError, OSError):  # where one stands may be gone
            return str(path.relative_to(Path.cwd()))
        return str(path)

    @property
    def shell_quoted(self) -> str:
        """As one would type it: an address whole, and safe from the shell."""
        return shlex.quote(str(self) if self.local else self.address)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A file's bytes; OSError where it is missing, or larger than ``limit`` bytes."""
        return self._tried(lambda: self._read(name, limit))

    def _read(self, name: str, limit: int | None) -> bytes:
        system, path = self._place
        size = system.get_file_info(f"{path}/{name}").size
        if size is None:
            raise FileNotFoundError(f"{self / name}: no such file")
        if limit is not None and size > limit:
            raise TooLarge(f"{self / name}: {size} bytes, more than the {limit} expected")
        with system.open_input_stream(f"{path}/{name}") as stream:
            return stream.read()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all, and has it on the disk before it returns."""
        if self.local is not None:
            _write_local(self.local, name, data)
            return
        self._tried(lambda: self._write(name, data))

    def _write(self, name: str, data: bytes) -> None:
        system, path = self._place
        with system.open_output_stream(f"{path}/{name}") as stream:
            stream.write(data)

    def names(self) -> list[str]:
        """What lies directly in the folder, sorted; nothing where it does not exist."""
        system, path = self._place
        found = self._tried(lambda: system.get_file_info(fs.FileSelector(path, allow_not_found=True)))
        return sorted(info.base_name for info in found)

    def has(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        return self._kind(name) != fs.FileType.NotFound

    def _kind(self, name: str) -> fs.FileType:
        system, path = self._place
        return self._tried(lambda: system.get_file_info(f"{path}/{name}").type)

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all it holds; nothing where there is none."""
        if self.local is not None:
            target = self.local / name
            if target.is_dir() and not target.is_symlink():
                return shutil.rmtree(target, ignore_errors=True)
            return target.unlink(missing_ok=True)
        system, path = self._place
        delete = {fs.FileType.Directory: system.delete_dir, fs.FileType.File: system.delete_file}.get(self._kind(name))
        if delete:
            self._tried(lambda: delete(f"{path}/{name}"))

    def upload(self, source: Path) -> None:
        """Copies a local folder's files into this one; those elsewhere are left alone."""
        system, path = self._place
        here = fs.LocalFileSystem()
        self._tried(lambda: fs.copy_files(str(source), path, source_filesystem=here, destination_filesystem=system))

    def _tried(self, action: Callable[[], Any]) -> Any:
        """What an action gives; a store's passing trouble is waited out."""
        for pause in RETRY_DELAYS_S if self.retry and self.local is None else ():
            try:
                return action()
            except (FileNotFoundError, PermissionError, TooLarge):
                raise
            except OSError as error:
                if PERMANENT_ERRORS.search(str(error)):
                    raise
            time.sleep(pause * random.uniform(0.5, 1.5))  # workers shall not come back all at once
        return action()

    def check_writable(self) -> None:
        """UserError where nothing can be written here; leaves nothing behind."""
        with self.probe_file():
            pass

    @contextlib.contextmanager
    def probe_file(self) -> Iterator[str]:
        """A file that lies here meanwhile, by its name; UserError where nothing can be written."""
        marker = f".writable-{uuid.uuid4().hex[:8]}"
        try:
            missing = self._missing_parents()
            self.write(marker, b"")
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(
                f"run.storage = {self}: cannot be written to: {reason}; choose another, or grant it"
            ) from None
        try:
            yield marker
        finally:
            with contextlib.suppress(OSError):  # another run may have begun to use the folders
                self.remove(marker)
                for folder in missing:
                    folder.rmdir()

    def _missing_parents(self) -> list[Path]:
        """Folders that a write here would make, the deepest first."""
        if self.local is None:
            return []
        return [folder for folder in (self.local, *self.local.parents) if not folder.exists()]


def _write_local(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}-{threading.get_ident()}"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(folder)


def _sync(folder: Path) -> None:
    """Has the folder's own entries, and so a rename in it, on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
