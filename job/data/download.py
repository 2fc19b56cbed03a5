"""Downloads texts over HTTP to files in the folder of caches, where they are verified before they are complete."""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import re
import shutil
import threading
import time
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from job.data.compression import expansion_limit
from job.errors import UserError, report_os_error
from job.paths import cache_folder

# The text of the d2l book's chapter on recurrent networks, with the URL and SHA-1 digest given there.
TIME_MACHINE_URL = "https://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
TIME_MACHINE_SHA1 = "090b5e7e70c295757f55df93cb0a180b9691891a"
TIME_MACHINE_LENGTH = 178_979  # characters

CHUNK_BYTES = 16 << 10
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
SPEED_INTERVAL_S = 30.0  # in each, at least MIN_INTERVAL_BYTES must arrive
MIN_INTERVAL_BYTES = 32 << 10
MAX_RETRIES, RETRY_DELAY_S = 3, 0.5  # after failures without progress; doubled each time
LOCK_INTERVAL_S = 0.1
_TEMPORARY_STATUSES = (429, 500, 502, 503, 504)


def download_time_machine(max_retries: int = MAX_RETRIES, limit_s: float = math.inf) -> bytes:
    """Returns the text of The Time Machine, from the cache if possible.

    Args:
        max_retries: attempts after a failed one
        limit_s: longest time for the download, in seconds

    Raises:
        UserError: it can be neither read from the cache nor downloaded
    """
    checksum = "sha1", TIME_MACHINE_SHA1
    return _download_cached(TIME_MACHINE_URL, "timemachine.txt", checksum, max_retries, limit_s).read_bytes()


def download_file(url: str) -> tuple[Path, str]:
    """Downloads what is at a URL to a file in the cache, unless it is there.

    Args:
        url: an HTTP or HTTPS URL; the digest in a fragment ``#sha256=DIGEST`` is verified

    Returns:
        The file, and its SHA-256 digest.

    Raises:
        UserError: the download fails or is too slow, is an HTML page, or has another digest; or the URL has another
            fragment; or the file cannot be written
    """
    url, mark, fragment = url.partition("#")
    digest = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment, re.IGNORECASE)
    if mark and not digest:
        raise UserError(f"#{fragment} is not a checksum", "write #sha256= and its 64 digits, or leave it out")
    file_name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.txt"
    path = _download_cached(url, file_name, ("sha256", digest[1].lower() if digest else ""))
    return path, _digest(path, "sha256")


def _download_cached(
    url: str, file_name: str, checksum: tuple[str, str], max_retries: int = MAX_RETRIES, limit_s: float = math.inf
) -> Path:
    deadline = time.monotonic() + limit_s
    with report_os_error("the download cannot be stored", "set XDG_CACHE_HOME to a folder with more space"):
        path = cache_folder() / file_name
        if not _is_valid(path, checksum):
            with open(path.with_name(f".{file_name}.lock"), "ab") as lock:
                _wait_for(lock, deadline)
                if not _is_valid(path, checksum):  # another process may have downloaded it meanwhile
                    _download(url, path, checksum, max_retries, deadline)
    return path


def _wait_for(lock: BinaryIO, deadline: float) -> None:
    """Waits until no other process on this machine downloads the same file."""
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError("another process is downloading it", "try again later") from None
        time.sleep(LOCK_INTERVAL_S)


def _is_valid(path: Path, checksum: tuple[str, str]) -> bool:
    with contextlib.suppress(OSError, UserError):
        _verify(path, checksum)
        return True
    return False


def _verify(path: Path, checksum: tuple[str, str]) -> None:
    """Raises UserError if a file is an HTML page or, unless the checksum is empty, has another one."""
    with open(path, "rb") as file:
        head = file.read(512)
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError("an HTML page, not text", "give the URL of the raw text")
    algorithm, expected = checksum
    if expected and (digest := _digest(path, algorithm)) != expected:
        raise UserError(f"wrong checksum, {algorithm} is {digest}, expected {expected}", "try again, or give a file")


def _digest(path: Path, algorithm: str) -> str:
    status = path.stat()
    return _file_digest(path, algorithm, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@lru_cache(maxsize=64)
def _file_digest(path: Path, algorithm: str, _identity: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _download(url: str, path: Path, checksum: tuple[str, str], max_retries: int, deadline: float) -> None:
    """Downloads to another file, which takes the place of ``path`` when it is complete and verified."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            _run_in_thread(_Transfer(url, file, max_retries), deadline)
            file.flush()
            os.fsync(file.fileno())
        _verify(part, checksum)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _run_in_thread(transfer: "_Transfer", deadline: float) -> None:
    """Runs a transfer in a thread, since a name lookup and a header may block for longer than any timeout."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            transfer.run()
        except BaseException as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        num_before, started_at = transfer.num_received, time.monotonic()
        thread.join(min(SPEED_INTERVAL_S, max(0.0, deadline - started_at)))
        num_bytes, now = transfer.num_received - num_before, time.monotonic()
        if thread.is_alive() and (num_bytes < MIN_INTERVAL_BYTES or now >= deadline):
            problem = f"download is too slow: {num_bytes:,} bytes in {now - started_at:.2g} s"
            raise UserError(problem, "try again, or give a file")
    if errors:
        raise errors[0]


class _Transfer:
    """The transfer of what is at a URL to a file, which is continued or repeated if the connection breaks.

    Args:
        url: the URL
        file: an empty file
        max_retries: attempts after a failed one that has brought nothing new
    """

    def __init__(self, url: str, file: BinaryIO, max_retries: int) -> None:
        self.url, self.file, self.max_retries = url, file, max_retries
        self.num_received = 0  # bytes of all attempts
        self._version = ""  # the ETag of what was received, if the rest of it can be requested

    def run(self) -> None:
        """Raises UserError if the download fails, and OSError if the file cannot be written."""
        retry = Retry(self.max_retries, backoff_factor=RETRY_DELAY_S, status_forcelist=_TEMPORARY_STATUSES,
                      raise_on_status=False)  # fmt: skip
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            session.headers["Accept-Encoding"] = "identity"
            session.hooks["response"].append(_skip_body_of_redirect)
            try:
                self._receive(session)
            except requests.RequestException as error:
                reason = str(error) if isinstance(error, requests.HTTPError) else type(error).__name__
                raise UserError(
                    f"download failed ({reason})", "check the URL and the network, or give a file"
                ) from None

    def _receive(self, session: requests.Session) -> None:
        num_failed, longest = 0, 0
        while True:
            with self._request(session) as response:
                try:
                    return self._write_body(response)
                except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError):  # in the middle of it
                    is_farther = self.file.tell() >= longest + MIN_INTERVAL_BYTES
                    longest, num_failed = max(longest, self.file.tell()), 1 if is_farther else num_failed + 1
                    if num_failed > self.max_retries:
                        raise
            time.sleep(RETRY_DELAY_S * 2**num_failed)

    def _request(self, session: requests.Session) -> requests.Response:
        """Requests what is missing, or all if the answer may have changed. The file ends where the answer begins."""
        position = self.file.tell() if self._version else 0
        headers = {"Range": f"bytes={position}-", "If-Range": self._version} if position else {}
        response = session.get(self.url, headers=headers, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S), stream=True)
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            position = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {position}-"):
            raise UserError("the server sends another part than the one requested", "download it and give the file")
        self.file.seek(position)
        self.file.truncate()
        return response

    def _write_body(self, response: requests.Response) -> None:
        """Writes the body of an answer, decompressed in small pieces: urllib3 would inflate any amount at once."""
        encoding = response.raw.headers.pop("Content-Encoding", "").lower() or "identity"
        if encoding not in ("identity", "gzip"):
            raise UserError(f"the answer is compressed with {encoding}", "download it and give the file")
        decoder = zlib.decompressobj(31) if encoding == "gzip" else None
        length, version = response.headers.get("Content-Length", ""), response.headers.get("ETag", "")
        self._version = version if version.startswith('"') and length and not decoder else ""
        if length.isdecimal() and int(length) > shutil.disk_usage(self.file.fileno()).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for chunk in response.iter_content(CHUNK_BYTES):
            self.num_received += len(chunk)
            self.file.write(self._inflate(decoder, chunk) if decoder else chunk)
        if decoder and (not decoder.eof or decoder.unused_data):
            raise UserError("the compressed answer does not end where it should", "download it and give the file")

    def _inflate(self, decoder: Any, chunk: bytes) -> bytes:
        limit = expansion_limit(self.num_received)
        try:
            data: bytes = decoder.decompress(chunk, limit + 1 - self.file.tell())
        except zlib.error as error:
            raise UserError(f"the answer is not gzip: {error}", "download it and give the file") from None
        if self.file.tell() + len(data) > limit:
            raise UserError(f"larger than {limit:,} bytes", "download it and give the file")
        return data


def _skip_body_of_redirect(response: requests.Response, **_: Any) -> None:
    """Closes a redirect, whose body requests would otherwise decompress in memory, at any length."""
    if response.is_redirect:
        response.close()
