"""Downloads texts over HTTP and caches them after verification."""

import contextlib
import hashlib
import math
import re
import threading
import time
import zlib
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from job.data.compression import expansion_limit
from job.errors import UserError
from job.paths import cache_folder
from job.storage import Folder

# The text of the d2l book's chapter on recurrent networks, with the URL and SHA-1 digest given there.
TIME_MACHINE_URL = "https://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
TIME_MACHINE_SHA1 = "090b5e7e70c295757f55df93cb0a180b9691891a"
TIME_MACHINE_LENGTH = 178_979  # characters

MAX_DOWNLOAD_BYTES = 4 << 30
CHUNK_BYTES = 16 << 10
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
SPEED_INTERVAL_S = 30.0  # in each, at least MIN_INTERVAL_BYTES must arrive
MIN_INTERVAL_BYTES = 32 << 10


def download_time_machine(max_retries: int = 3, limit_s: float = math.inf) -> bytes:
    """Returns the text of The Time Machine, from the cache if possible.

    Args:
        max_retries: attempts after a failed one to connect
        limit_s: longest time for the download, in seconds

    Raises:
        UserError: it can be neither read from the cache nor downloaded
    """
    return _download_cached(TIME_MACHINE_URL, "timemachine.txt", "sha1", TIME_MACHINE_SHA1, max_retries, limit_s)


def download_text(url: str) -> bytes:
    """Returns the text at a URL, from the cache if possible.

    Args:
        url: an HTTP or HTTPS URL; the digest in a fragment ``#sha256=DIGEST`` is verified

    Raises:
        UserError: the download fails or is too slow, is an HTML page, or has another digest; or the URL has another
            fragment
    """
    url, mark, fragment = url.partition("#")
    digest = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment, re.IGNORECASE)
    if mark and not digest:
        raise UserError(f"#{fragment} is not a checksum", "write #sha256= and its 64 digits, or leave it out")
    file_name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.txt"
    return _download_cached(url, file_name, "sha256", digest[1].lower() if digest else "")


def _download_cached(
    url: str, file_name: str, algorithm: str, expected: str, max_retries: int = 3, limit_s: float = math.inf
) -> bytes:
    with contextlib.suppress(OSError, UserError):  # not cached, or damaged
        data = Folder(str(cache_folder())).read(file_name)
        _verify(data, algorithm, expected)
        return data
    data = _download(url, max_retries, limit_s)
    _verify(data, algorithm, expected)
    with contextlib.suppress(OSError):  # without a cache, the next run downloads the text again
        Folder(str(cache_folder())).write(file_name, data)
    return data


def _verify(data: bytes, algorithm: str, expected: str) -> None:
    """Raises UserError if the data is an HTML page or, unless ``expected`` is empty, has another digest."""
    if data[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError("an HTML page, not text", "give the URL of the raw text")
    if expected and (digest := hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()) != expected:
        raise UserError(f"wrong checksum, {algorithm} is {digest}, expected {expected}", "try again, or give a file")


def _download(url: str, max_retries: int, limit_s: float) -> bytes:
    """Downloads in a thread, since a name lookup and a header may block for longer than any timeout of a request."""
    body, errors = bytearray(), []

    def fetch() -> None:
        try:
            _fetch(url, max_retries, body)
        except BaseException as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    deadline = time.monotonic() + limit_s
    while thread.is_alive():
        num_before = len(body)
        thread.join(min(SPEED_INTERVAL_S, max(0.0, deadline - time.monotonic())))
        is_slow = len(body) - num_before < MIN_INTERVAL_BYTES or time.monotonic() >= deadline
        if thread.is_alive() and is_slow:
            problem = f"download is too slow: {len(body) - num_before:,} bytes in {min(SPEED_INTERVAL_S, limit_s):g} s"
            raise UserError(problem, "try again, or give a file")
    if errors:
        raise errors[0]
    return bytes(body)


def _fetch(url: str, max_retries: int, body: bytearray) -> None:
    """Appends what is at a URL to ``body``."""
    adapter = HTTPAdapter(max_retries=Retry(max_retries, backoff_factor=0.5))
    try:
        with requests.Session() as session:
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            session.headers["Accept-Encoding"] = "identity"
            session.hooks["response"].append(_skip_body_of_redirect)
            with session.get(url, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S), stream=True) as response:
                response.raise_for_status()
                _read_body(response, body)
    except requests.RequestException as error:
        reason = str(error) if isinstance(error, requests.HTTPError) else type(error).__name__
        raise UserError(f"download failed ({reason})", "check the URL and the network, or give a file") from None


def _skip_body_of_redirect(response: requests.Response, **_: Any) -> None:
    """Closes a redirect, whose body requests would otherwise decompress in memory, at any length."""
    if response.is_redirect:
        response.close()


def _read_body(response: requests.Response, body: bytearray) -> None:
    """Appends the body of an answer, decompressed in small pieces: urllib3 would inflate any amount at once."""
    encoding = response.raw.headers.pop("Content-Encoding", "").lower() or "identity"
    if encoding not in ("identity", "gzip"):
        raise UserError(f"the answer is compressed with {encoding}", "download it and give the file")
    decoder = zlib.decompressobj(31) if encoding == "gzip" else None
    num_received = 0
    try:
        for chunk in response.iter_content(CHUNK_BYTES):
            num_received += len(chunk)
            limit = min(MAX_DOWNLOAD_BYTES, expansion_limit(num_received))
            body += decoder.decompress(chunk, limit + 1 - len(body)) if decoder else chunk
            if len(body) > limit:
                raise UserError(f"larger than {limit:,} bytes", "download it and give the file")
    except zlib.error as error:
        raise UserError(f"the answer is not gzip: {error}", "download it and give the file") from None
    if decoder and (not decoder.eof or decoder.unused_data):
        raise UserError("the compressed answer does not end where it should", "download it and give the file")
