"""Downloads texts over HTTP and caches them after verification."""

import contextlib
import hashlib

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from job.errors import UserError
from job.paths import cache_folder
from job.storage import Folder

# The text of the d2l book's chapter on recurrent networks, with the URL and SHA-1 digest given there.
TIME_MACHINE_URL = "https://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
TIME_MACHINE_SHA1 = "090b5e7e70c295757f55df93cb0a180b9691891a"
TIME_MACHINE_LENGTH = 178_979  # characters

MAX_DOWNLOAD_BYTES = 4 << 30
CHUNK_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0


def download_time_machine(max_retries: int = 3) -> bytes:
    """Returns the text of The Time Machine, from the cache if possible.

    Raises:
        UserError: it can be neither read from the cache nor downloaded
    """
    return _download_cached(TIME_MACHINE_URL, "timemachine.txt", "sha1", TIME_MACHINE_SHA1, max_retries)


def download_text(url: str) -> bytes:
    """Returns the text at a URL, from the cache if possible.

    Args:
        url: an HTTP or HTTPS URL; the digest in a fragment ``#sha256=DIGEST`` is verified

    Raises:
        UserError: the download fails, is an HTML page, or has another digest
    """
    url, _, sha256 = url.partition("#sha256=")
    file_name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.txt"
    return _download_cached(url, file_name, "sha256", sha256.lower())


def _download_cached(url: str, file_name: str, algorithm: str, expected: str, max_retries: int = 3) -> bytes:
    with contextlib.suppress(OSError, UserError):  # not cached, or damaged
        data = Folder(str(cache_folder())).read(file_name)
        _verify(data, algorithm, expected)
        return data
    data = _download(url, max_retries)
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


def _download(url: str, max_retries: int) -> bytes:
    adapter = HTTPAdapter(max_retries=Retry(max_retries, backoff_factor=0.5))
    try:
        with requests.Session() as session:
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            with session.get(url, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S), stream=True) as response:
                response.raise_for_status()
                return _read_body(response)
    except requests.RequestException as error:
        reason = str(error) if isinstance(error, requests.HTTPError) else type(error).__name__
        raise UserError(f"download failed ({reason})", "check the URL and the network, or give a file") from None


def _read_body(response: requests.Response) -> bytes:
    body = bytearray()
    for chunk in response.iter_content(CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_DOWNLOAD_BYTES:
            raise UserError(f"larger than {MAX_DOWNLOAD_BYTES >> 30} GiB", "download it and give the file")
    return bytes(body)
