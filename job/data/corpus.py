"""A source (a name, a path, a glob or an address) to clean text."""

import contextlib
import glob
import hashlib
import importlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from job.config.schema import CorpusConfig
from job.errors import UserError
from job.storage import Folder, is_uri

# The text of the d2l book's chapter on recurrent networks: its address and SHA-1 there.
TIME_MACHINE_URL = "https://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
TIME_MACHINE_SHA1 = "090b5e7e70c295757f55df93cb0a180b9691891a"
TIME_MACHINE_LENGTH = 178_979

MAX_DOWNLOAD_BYTES = 4 << 30  # bytes
AUTO_DOWNLOAD_TIMEOUT_S = 5.0  # seconds that `auto` waits for a download before it falls back


@dataclass(frozen=True)
class Corpus:
    """Clean text, in the pieces that are tokenized apart (so a word never spans two lines).

    ``lines`` holds text, or bytes where tokens are bytes and nothing was cleaned.
    """

    source: str
    cleaning: str
    lines: list[str] | list[bytes]

    @property
    def num_characters(self) -> int:
        """Characters of the text; bytes where it is bytes."""
        return sum(map(len, self.lines))


def read_corpus(corpus_config: CorpusConfig, kind: str) -> Corpus:
    """The text that a configuration names, cleaned; ``kind`` is the vocabulary's."""
    source, data = _fetch(corpus_config.source)
    cleaning = corpus_config.cleaning
    if cleaning == "auto":
        cleaning = "d2l" if source in ("time-machine", "embedded") else "none"
    if kind == "byte" and cleaning == "none":
        text = Corpus(source, cleaning, [data])
    else:
        text = Corpus(source, cleaning, clean_text(_decoded(data, source), cleaning))
    if not text.num_characters:
        raise UserError(f"corpus.source = {source}: holds no text{_after_cleaning(data, cleaning)}")
    return text


def clean_text(text: str, cleaning: str) -> list[str]:
    """Text as the d2l book cleans it, line by line (letters only, lower case), or untouched."""
    if cleaning == "none":
        return [text]
    lines = re.split(r"\r\n|\r|\n", text)
    return [re.sub("[^A-Za-z]+", " ", line).strip().lower() for line in lines]


def _after_cleaning(data: bytes, cleaning: str) -> str:
    return f" after cleaning ({cleaning} keeps letters only)" if data.strip() and cleaning == "d2l" else ""


def _decoded(data: bytes, source: str) -> str:
    binary = data.find(b"\0")
    if binary >= 0:
        raise UserError(
            f"corpus.source = {source}: not text, byte {binary} is NUL; vocabulary.kind = byte takes any file"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"corpus.source = {source}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); "
            "convert it, or use vocabulary.kind = byte, which takes any file"
        ) from None


def _fetch(source: str) -> tuple[str, bytes]:
    """What the source turned out to be, and its bytes."""
    if source == "auto":
        return _time_machine_or_embedded()
    if source == "time-machine":
        return source, _time_machine(Retry(total=3, backoff_factor=0.5), connect=5.0)
    if source == "embedded":
        return source, _embedded()
    if source.startswith(("http://", "https://")):
        return source, _download(source)
    if is_uri(source):
        return source, _read_address(source)
    return source, _read_files(source)


def _time_machine_or_embedded() -> tuple[str, bytes]:
    """The Time Machine if it can be had within seconds; a resolver may hang far longer."""
    found: list[bytes] = []

    def fetch() -> None:
        try:
            found.append(_time_machine(Retry(0), connect=AUTO_DOWNLOAD_TIMEOUT_S / 2))
        except UserError:
            return

    attempt = threading.Thread(target=fetch, daemon=True)
    attempt.start()
    attempt.join(AUTO_DOWNLOAD_TIMEOUT_S)
    return ("time-machine", found[0]) if found else ("embedded", _embedded())


def _embedded() -> bytes:
    """English prose that every Python carries: the help topics, cut to the length of the book."""
    topics = importlib.import_module("pydoc_data.topics").topics  # large: read only where it is the corpus

    return "\n".join(topics[name] for name in sorted(topics))[:TIME_MACHINE_LENGTH].encode()


def _read_files(pattern: str) -> bytes:
    expanded = os.path.expanduser(pattern)
    is_pattern = glob.has_magic(expanded) and not os.path.exists(expanded)
    paths = sorted(glob.glob(expanded, recursive=True)) if is_pattern else [expanded]
    if not paths:
        raise UserError(f"corpus.source = {pattern}: no file matches")
    try:
        return b"".join(Path(path).read_bytes() for path in paths if not (len(paths) > 1 and os.path.isdir(path)))
    except FileNotFoundError:
        names = "auto, time-machine and embedded"
        raise UserError(f"corpus.source = {pattern}: no such file; beside files, {names} are known") from None
    except OSError as error:
        raise UserError(f"corpus.source = {pattern}: cannot be read: {error.strerror}") from None


def _read_address(address: str) -> bytes:
    path, mark, query = address.partition("?")
    folder, _, name = path.rpartition("/")
    try:
        return Folder.resolve(folder + mark + query).read(name)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"corpus.source = {address}: cannot be read: {reason}") from None


# --- downloads ---------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloads are kept for good: ``$XDG_CACHE_HOME/lanes``, else ``~/.cache/lanes``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lanes"


def _time_machine(retry: Retry, connect: float) -> bytes:
    def check(data: bytes) -> None:
        digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        _expect(digest, TIME_MACHINE_SHA1, "SHA-1", "time-machine")

    return _cached("timemachine.txt", TIME_MACHINE_URL, check, retry, connect)


def _download(source: str) -> bytes:
    """A text from the web, cached under its address; ``#sha256=…`` at its end is checked."""
    address, _, expected = source.partition("#sha256=")

    def check(data: bytes) -> None:
        head = data[:512].lstrip().lower()
        if head.startswith((b"<!doctype html", b"<html")):
            raise UserError(f"corpus.source = {address}: an HTML page, not text; give the address of the raw text")
        if expected:
            _expect(hashlib.sha256(data).hexdigest(), expected.lower(), "SHA-256", address)

    name = f"{hashlib.sha256(address.encode()).hexdigest()[:16]}.txt"
    return _cached(name, address, check, Retry(total=3, backoff_factor=0.5), connect=5.0)


def _expect(found: str, expected: str, algorithm: str, source: str) -> None:
    if found != expected:
        raise UserError(
            f"corpus.source = {source}: wrong checksum, {algorithm} is {found} and should be {expected}; "
            "the download is not what it was: try again, or give a file of your own"
        )


def _cached(name: str, address: str, check: Callable[[bytes], None], retry: Retry, connect: float) -> bytes:
    """The cached file if it passes ``check``, else the download, checked and then cached."""
    folder = Folder(str(cache_folder()))
    try:
        data = folder.read(name)
        check(data)
        return data
    except (OSError, UserError):
        data = _get(address, retry, connect)
    check(data)
    with contextlib.suppress(OSError):  # what is not cached is fetched again
        folder.write(name, data)
    return data


def _get(address: str, retry: Retry, connect: float) -> bytes:
    """The body of an address; UserError where it cannot be had."""
    try:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=retry))
            session.mount("https://", HTTPAdapter(max_retries=retry))
            with session.get(address, timeout=(connect, 30.0), stream=True) as response:
                response.raise_for_status()
                return _body(response, address)
    except requests.HTTPError as error:
        reason = f"the server says {error.response.status_code}"
    except requests.Timeout:
        reason = "no answer in time"
    except requests.exceptions.ChunkedEncodingError:
        reason = "the transfer broke off; try again"
    except requests.ConnectionError:
        reason = "cannot be reached"
    except requests.RequestException as error:
        reason = str(error)
    raise UserError(f"corpus.source = {address}: {reason}; check the address and the network, or give a file")


def _body(response: requests.Response, address: str) -> bytes:
    parts, size = [], 0
    for part in response.iter_content(1 << 20):
        parts.append(part)
        size += len(part)
        if size > MAX_DOWNLOAD_BYTES:
            raise UserError(
                f"corpus.source = {address}: larger than {MAX_DOWNLOAD_BYTES >> 30} GiB; download it yourself"
            )
    return b"".join(parts)
