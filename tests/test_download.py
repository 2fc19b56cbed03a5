"""Downloads of a corpus: verified, cached, and replaced by the embedded text if ``auto`` fails."""

import gzip
import hashlib
import http.server
import io
import re
import shutil
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import urllib3
from conftest import start_job

from job.config.text import CorpusConfig, VocabularyConfig
from job.console import Console
from job.data.corpus import Corpus, read_corpus
from job.errors import UserError
from job.paths import cache_folder
from job.run.text_cache import TextCache

pytestmark = pytest.mark.slow


def read(source: str) -> Corpus:
    return read_corpus(CorpusConfig(source=source), "char")


class Pages(dict[str, bytes]):
    """The pages of a web server: their contents by path."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.ranges: list[str | None] = []
        self.breaks: list[int] = []  # number of bytes after which the connection of each request breaks
        self.ended = threading.Event()
        self.address = ""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pages]:
    """A web server: ``web[path] = bytes`` defines a page, ``web.requests`` lists the paths requested."""
    pages = Pages()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages.requests.append(self.path)
            if "silent" in self.path:
                pages.ended.wait()
            body = pages.get(self.path)
            pages.ranges.append(self.headers.get("Range"))
            start, has_ranges = 0, "etag" in self.path
            if has_ranges and self.headers.get("If-Range") == f'"{len(body or b"")}"':
                start = int(str(self.headers["Range"]).removeprefix("bytes=").removesuffix("-"))
            found = 302 if "moved" in self.path else 206 if start else 200
            self.send_response(found if body is not None or found == 302 else 404)
            if has_ranges and body:
                self.send_header("ETag", f'"{len(body)}"')
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                body = body[start:]
            self.send_header("Location", self.path.replace("moved", "text"))
            self.send_header(
                "Content-Length", str(len(body or b"") + (10 if re.search("short|slow", self.path) else 0))
            )
            if encoding := re.search("gzip|deflate", self.path):
                self.send_header("Content-Encoding", encoding[0])
            self.end_headers()
            self.wfile.write((body or b"")[: pages.breaks.pop(0) if pages.breaks else None])
            if "slow" in self.path:
                self.wfile.flush()
                pages.ended.wait()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("job.data.download.TIME_MACHINE_URL", f"{pages.address}/book")
    monkeypatch.setattr("job.data.download.RETRY_DELAY_S", 0.001)
    yield pages
    pages.ended.set()
    server.shutdown()


def test_download_is_cached(web: Pages) -> None:
    web["/text.txt"] = b"some text"
    assert read(f"{web.address}/text.txt").documents == [["some text"]]
    assert read(f"{web.address}/text.txt").documents == [["some text"]]
    assert web.requests == ["/text.txt"]


def test_download_replaces_damaged_cache_file(web: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"The Time Machine!"
    monkeypatch.setattr("job.data.download.TIME_MACHINE_SHA1", hashlib.sha1(data).hexdigest())
    web["/book"] = data
    assert read("time-machine").documents == [["the time machine"]]
    (cache_folder() / "timemachine.txt").write_bytes(b"The Tim")
    assert read("time-machine").documents == [["the time machine"]]
    assert read("auto").source == "time-machine"
    assert len(web.requests) == 2


def test_download_failure_falls_back_to_embedded_text_only_for_auto(
    web: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.data.download.TIME_MACHINE_URL", "http://127.0.0.1:9/book")
    assert read("auto").source == "embedded"
    with pytest.raises(UserError, match=r"download failed \(ConnectionError"):
        read("time-machine")


def test_download_with_compressed_transfer_is_decompressed(web: Pages) -> None:
    web["/gzip.txt"] = gzip.compress(b"original text")
    assert read(f"{web.address}/gzip.txt").documents == [["original text"]]


def test_download_follows_redirect_without_reading_its_body(web: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed body of a redirect was inflated in memory, whatever its size."""
    lengths = []

    def read_counted(*arguments: Any, **options: Any) -> bytes:
        lengths.append(len(data := read_body(*arguments, **options)))
        return data

    read_body = urllib3.HTTPResponse.read
    monkeypatch.setattr(urllib3.HTTPResponse, "read", read_counted)
    web["/moved.gzip"], web["/text.gzip"] = gzip.compress(bytes(1 << 20)), gzip.compress(b"some text")
    assert read(f"{web.address}/moved.gzip").documents == [["some text"]]
    assert web.requests == ["/moved.gzip", "/text.gzip"]
    assert sum(lengths) < 1000


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/none.txt", None, r"download failed \(404"),
        ("/page.txt", b"\n<!DOCTYPE html><html>", "an HTML page, not text"),
        ("/text.txt#sha256=" + "0" * 64, b"some text", "wrong checksum"),
        ("/short.txt", b"some text", r"download failed \(ChunkedEncodingError"),
        ("/empty.txt", b"", "contains no text"),
        ("/a.gzip", gzip.compress(bytes(40_000_000)), "larger than [0-9,]+ bytes"),
        ("/b.gzip", gzip.compress(b"some text " * 999)[:-9], "does not end where it should"),
        ("/c.gzip", b"some text", "the answer is not gzip"),
        ("/d.deflate", b"some text", "compressed with deflate"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("/") else "",
)
def test_download_of_invalid_text_raises_and_is_not_cached(
    web: Pages, path: str, body: bytes | None, problem: str
) -> None:
    if body is not None:
        web[path.partition("#")[0]] = body
    with pytest.raises(UserError, match=problem):
        read(f"{web.address}{path}")
    assert [file for file in cache_folder().glob("*") if file.stat().st_size] == []


def test_download_continues_after_a_break_of_the_connection(web: Pages) -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))
    web["/etag.txt"], web.breaks = text.encode(), [70_000, 3, 100_000]  # whole blocks of 16 KiB count
    assert read(f"{web.address}/etag.txt").documents == [[text]]
    assert web.ranges == [None, "bytes=65536-", "bytes=65536-", "bytes=163840-"]


def test_download_of_a_file_that_changes_between_two_requests_is_of_one_version(web: Pages) -> None:
    class Changing(list[int]):
        def pop(self, index: Any = -1) -> int:
            web["/etag.txt"] = b"new" * 9000
            return super().pop(index)

    web["/etag.txt"], web.breaks = b"old" * 8000, Changing([20_000])
    assert read(f"{web.address}/etag.txt").documents == [["new" * 9000]]
    assert web.ranges == [None, "bytes=16384-"]


def test_download_that_breaks_without_ranges_begins_again_and_ends_with_one_error(web: Pages) -> None:
    web["/text.txt"], web.breaks = b"some text " * 9999, [5000, 70_000]
    assert read(f"{web.address}/text.txt").documents == [["some text " * 9999]]
    assert web.ranges == [None] * 3
    web["/other.txt"], web.breaks = b"some text", [3] * 99
    with pytest.raises(UserError, match=r"other\.txt: download failed \(ChunkedEncodingError\); check the URL"):
        read(f"{web.address}/other.txt")
    assert [path.name for path in cache_folder().iterdir() if "part" in path.name] == []


def test_download_that_does_not_fit_on_the_disk_is_one_error(web: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    web["/text.txt"] = b"some text"
    usage = shutil.disk_usage(cache_folder())._replace(free=8)
    monkeypatch.setattr("job.data.download.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        UserError, match=r"text\.txt: the download cannot be stored: No space left on device; set XDG_CACHE_HOME"
    ):
        read(f"{web.address}/text.txt")
    assert [path for path in cache_folder().iterdir() if path.stat().st_size] == []


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "table.parquet", "table.parquet.gz"])
def test_large_text_on_the_web_is_read_in_bounded_memory(
    web: Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What the server sends is made before the measurement."""
    lines = [f"{number:x} the time machine {number * 7919 % 1000003} " * 60 for number in range(4000)]
    text = "\n".join(lines)
    table = io.BytesIO()
    options = {"row_group_size": 100, "compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), table, **options)
    content = text.encode() if "text" in name else table.getvalue()
    web[f"/{name}"] = gzip.compress(content, 1) if name.endswith("gz") else content
    for constant in ("job.data.pieces.PIECE_BYTES", "job.data.piece_encoder.SHARD_CHARACTERS"):
        monkeypatch.setattr(constant, 200_000)
    for constant in (
        "piece_reader.BLOCK_BYTES", "parse.BLOCK_BYTES", "compression.BLOCK_BYTES", "tokens._BLOCK_TOKENS"
    ):  # fmt: skip
        monkeypatch.setattr(f"job.data.{constant}", 50_000)
    monkeypatch.setattr("job.run.text_cache.MAX_TEXT_BYTES", 1000)
    config = CorpusConfig(source=f"{web.address}/{name}")
    cache = TextCache(Console(io.StringIO()), is_local=True)
    tracemalloc.start()
    stored = cache.open(config, VocabularyConfig(kind="char"), None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stored and peak < 3_000_000 < len(text) / 2
    decoded = stored.vocabulary.decode(np.asarray(stored.tokens).tolist())
    assert decoded.replace("<|endoftext|>", "\n") == text
    web.clear()
    assert read(f"{web.address}/{name}").num_characters >= len(text) - len(lines)  # it is not downloaded again


def test_download_of_changed_time_machine_raises(web: Pages) -> None:
    web["/book"] = b"another book"
    with pytest.raises(UserError, match=r"time-machine: wrong checksum, sha1 is .*, expected 090b5e7e"):
        read("time-machine")


@pytest.mark.parametrize(
    "fragment",
    ["", "sha256=", "sha256", "sha256=0", "sha256=" + "0" * 63, "sha256=" + "0" * 65, "sha256=" + "g" * 64,
     "sha1=" + "0" * 40, "md5=1", "chapter-1", "sha256=" + "0" * 64 + "#"],
)  # fmt: skip
def test_download_with_fragment_that_is_no_checksum_is_refused_before_a_request(web: Pages, fragment: str) -> None:
    web["/text.txt"] = b"some text"
    with pytest.raises(UserError, match=f"#{fragment} is not a checksum"):
        read(f"{web.address}/text.txt#{fragment}")
    assert web.requests == []


@pytest.mark.parametrize("path", ["/silent", "/slow"])
def test_download_from_slow_server_is_refused(web: Pages, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    web[path] = b"s"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="download is too slow"):
        patch.setattr("job.data.download.SPEED_INTERVAL_S", 0.2)
        read(f"{web.address}{path}")
    web["/fast"] = b"some text"
    assert read(f"{web.address}/fast").documents == [["some text"]]


@pytest.mark.parametrize("path", ["/silent", "/slow"])
@pytest.mark.parametrize("verb", ["train", "tune"])
def test_command_that_downloads_ends_at_the_first_interrupt(web: Pages, tmp_path: Path, path: str, verb: str) -> None:
    web[path] = b"s"
    (tmp_path / "a.toml").write_text(
        '[search]\nmetric = "perplexity"\n[search.space]\n"model.dropout" = { uniform = [0, 0.5] }'
    )
    flags = ["--corpus.source", f"{web.address}{path}", "--run.storage", tmp_path / "runs", "--scale.workers", 0]
    process = start_job(verb, tmp_path / "a.toml", *flags)
    while not web.requests and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert not (tmp_path / "runs").exists()
