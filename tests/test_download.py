"""Downloads of a corpus: verified, cached, and replaced by the embedded text if ``auto`` fails."""

import gzip
import hashlib
import http.server
import threading

import pytest

from job.config.schema import CorpusConfig
from job.data.corpus import read_corpus
from job.errors import UserError
from job.paths import cache_folder


def read(source):
    return read_corpus(CorpusConfig(source=source), "char")


@pytest.fixture
def web(monkeypatch, tmp_path):
    """A web server: ``web[path] = bytes`` defines a page, ``web.requests`` lists the paths requested."""

    class Pages(dict):
        requests: list[str] = []

    pages = Pages()
    pages.requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            pages.requests.append(self.path)
            body = pages.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"") + (10 if "short" in self.path else 0)))
            if "zip" in self.path:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("job.data.download.TIME_MACHINE_URL", f"{pages.address}/book")
    yield pages
    server.shutdown()


def test_download_is_cached(web):
    web["/text.txt"] = b"some text"
    assert read(f"{web.address}/text.txt").lines == ["some text"]
    assert read(f"{web.address}/text.txt").lines == ["some text"]
    assert web.requests == ["/text.txt"]


def test_download_replaces_damaged_cache_file(web, monkeypatch):
    data = b"The Time Machine!"
    monkeypatch.setattr("job.data.download.TIME_MACHINE_SHA1", hashlib.sha1(data).hexdigest())
    web["/book"] = data
    assert read("time-machine").lines == ["the time machine"]
    (cache_folder() / "timemachine.txt").write_bytes(b"The Tim")
    assert read("time-machine").lines == ["the time machine"]
    assert read("auto").source == "time-machine"
    assert len(web.requests) == 2


def test_download_failure_falls_back_to_embedded_text_only_for_auto(web, monkeypatch):
    monkeypatch.setattr("job.data.download.TIME_MACHINE_URL", "http://127.0.0.1:9/book")
    assert read("auto").source == "embedded"
    with pytest.raises(UserError, match=r"download failed \(ConnectionError"):
        read("time-machine")


def test_download_with_compressed_transfer_is_decompressed(web):
    web["/zip.txt"] = gzip.compress(b"original text")
    assert read(f"{web.address}/zip.txt").lines == ["original text"]


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/none.txt", None, r"download failed \(404"),
        ("/page.txt", b"\n<!DOCTYPE html><html>", "an HTML page, not text"),
        ("/text.txt#sha256=" + "0" * 64, b"some text", "wrong checksum"),
        ("/short.txt", b"some text", r"download failed \(ChunkedEncodingError"),
        ("/empty.txt", b"", "contains no text"),
    ],
)
def test_download_of_invalid_text_raises_and_is_not_cached(web, path, body, problem):
    if body is not None:
        web[path.partition("#")[0]] = body
    with pytest.raises(UserError, match=problem):
        read(f"{web.address}{path}")
    assert [file for file in cache_folder().glob("*") if file.stat().st_size] == []


def test_download_of_changed_time_machine_raises(web):
    web["/book"] = b"another book"
    with pytest.raises(UserError, match=r"time-machine: wrong checksum, sha1 is .*, expected 090b5e7e"):
        read("time-machine")
