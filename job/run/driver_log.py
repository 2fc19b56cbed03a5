"""The log of a run's driver: ``driver.log`` in the run's folder.

A line is ``TIME LEVEL ATTEMPT MESSAGE``; the lines of a message after its first are indented. The file is limited in
size by rotation: ``driver.log.1`` is the one before. On a storage that cannot append, both grow in a local folder and
are uploaded with each checkpoint and at the end.
"""

import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from logging.handlers import RotatingFileHandler
from pathlib import Path

from job.console import escape_controls
from job.errors import RunFailed
from job.paths import mask_credentials
from job.run.lease import Lease
from job.storage import Folder

LOG_FILE = "driver.log"
MAX_FILE_BYTES = 1 << 20
MAX_RECORD_CHARACTERS = 10_000
_TAIL_BYTES = 1 << 16  # that contain the beginning of the last record
_LEVEL = re.compile(rb"^\S+Z ([A-Z]+) ", re.MULTILINE)
_package_logger = logging.getLogger("job")
_logger = logging.getLogger(__name__)


class _Formatter(logging.Formatter):
    converter = time.gmtime  # type: ignore[assignment]  # mypy takes it for a method
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(attempt)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record without credentials and control characters. None of its lines looks like another record."""
        text = escape_controls(mask_credentials(super().format(record)[:MAX_RECORD_CHARACTERS]))
        return "\n    ".join(text.splitlines())


class _File(RotatingFileHandler):
    """A file that never raises an error, and is not written once another driver has taken the run over."""

    def __init__(self, directory: Path, lease: Lease, attempts: Sequence[str]) -> None:
        options = {"encoding": "utf-8", "errors": "backslashreplace", "delay": True}
        super().__init__(directory / LOG_FILE, maxBytes=MAX_FILE_BYTES, backupCount=1, **options)  # type: ignore[arg-type]
        self.lease, self.attempts = lease, attempts
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        record.attempt = self.attempts[-1] if self.attempts else "-"
        with suppress(OSError, RunFailed):
            if self.lease.folder.local_path:  # otherwise each upload checks the lease
                self.lease.check()
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does nothing: a full disk does not end a run because of its log."""


class DriverLog(logging.Handler):
    """Collects the records of this package. They are written once the run's folder belongs to this driver."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.pending: list[logging.LogRecord] = []
        self.file: _File | None = None
        self.upload_folder: Folder | None = None  # if the storage cannot append

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, or stores it until there is a file."""
        if self.file:
            self.file.handle(record)
        else:
            self.pending.append(record)

    @contextmanager
    def opened(self, lease: Lease, attempts: Sequence[str]) -> Iterator[None]:
        """Writes the records to the run's folder within the block, and an error that ends it.

        Args:
            lease: of the run
            attempts: the worker groups so far; a record has the name of the last one
        """
        directory = lease.folder.local_path or Path(tempfile.mkdtemp(prefix="lanes-"))
        if lease.folder.local_path is None:
            self.upload_folder = replace(lease.folder, retry=False)
            with suppress(OSError):  # there may be none
                (directory / LOG_FILE).write_bytes(lease.folder.read(LOG_FILE, 2 * MAX_FILE_BYTES))
        self.file = _File(directory, lease, attempts)
        try:
            for record in self.pending:
                self.file.handle(record)
            yield
        except Exception as error:
            _logger.exception("%s", error)
            raise
        finally:
            with suppress(OSError):
                self.file.close()
            self.sync()
            self.file = None
            if self.upload_folder:
                shutil.rmtree(directory, ignore_errors=True)

    def sync(self) -> None:
        """Uploads the log to a storage that cannot append."""
        if self.upload_folder and self.file:
            with suppress(OSError, RunFailed):
                self.upload_folder.upload(Path(self.file.baseFilename).parent)


@contextmanager
def driver_log() -> Iterator[DriverLog]:
    """Collects the records of this package within the block, and passes them to no other logger's handlers."""
    log, level, propagate = DriverLog(), _package_logger.level, _package_logger.propagate
    _package_logger.addHandler(log)
    _package_logger.setLevel(logging.INFO)
    _package_logger.propagate = False
    try:
        yield log
    finally:
        _package_logger.removeHandler(log)
        _package_logger.setLevel(level)
        _package_logger.propagate = propagate


def last_level(folder: Folder) -> str:
    """Returns the level of the last record in a run's folder: ``ERROR`` if its driver failed. Empty if unknown."""
    levels = _LEVEL.findall(folder.read_block(LOG_FILE, -_TAIL_BYTES, _TAIL_BYTES))
    return levels[-1].decode() if levels else ""
