"""Sources to clean text: names, files, globs and downloads, each wrong one told."""

import gzip
import hashlib
import http.server
import threading

import pytest
from conftest import BOOK
from hypothesis import given
from hypothesis import strategies as st

from job.config.schema import CorpusConfig, VocabularyConfig
from job.data import corpus
from job.data.vocabulary import Vocabulary, build_vocabulary, vocabulary_from_json
from job.errors import UserError


def read(source, kind="char", **options):
    return corpus.read_corpus(CorpusConfig(source=str(source), **options), kind)


@pytest.fixture
def web(monkeypatch, tmp_path):
    """A web server of the test's own: ``web[path] = bytes``; ``web.requests`` lists what was asked for."""

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
    yield pages
    server.shutdown()


@pytest.mark.shared
def test_read_time_machine_has_known_length():
    text = read(BOOK, cleaning="d2l")
    assert text.num_characters == 170_580
    words = build_vocabulary(VocabularyConfig(), text)
    assert words.tokens[:5] == ("<unk>", " ", "e", "t", "a")
    assert len(words) == 28


def test_globs_are_read_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt").lines == ["a.txtb.txt"]


def test_a_download_is_cached_and_never_fetched_twice(web):
    web["/text.txt"] = b"some text"
    assert read(f"{web.address}/text.txt").lines == ["some text"]
    assert read(f"{web.address}/text.txt").lines == ["some text"]
    assert web.requests == ["/text.txt"]


def test_a_damaged_cache_is_fetched_again(web, monkeypatch):
    data = b"The Time Machine!"
    monkeypatch.setattr(corpus, "TIME_MACHINE_URL", f"{web.address}/book")
    monkeypatch.setattr(corpus, "TIME_MACHINE_SHA1", hashlib.sha1(data).hexdigest())
    web["/book"] = data
    assert read("time-machine").lines == ["the time machine"]
    (corpus.cache_folder() / "timemachine.txt").write_bytes(b"The Tim")
    assert read("time-machine").lines == ["the time machine"]
    assert read("auto").source == "time-machine"
    assert len(web.requests) == 2


def test_auto_falls_back_to_the_text_in_python(web, monkeypatch):
    monkeypatch.setattr(corpus, "TIME_MACHINE_URL", "http://127.0.0.1:9/book")
    text = read("auto")
    assert (text.source, text.cleaning) == ("embedded", "d2l")
    assert 140_000 < text.num_characters <= corpus.TIME_MACHINE_LENGTH
    with pytest.raises(UserError, match="cannot be reached"):
        read("time-machine")


def test_compressed_transfers_are_read(web):
    web["/zip.txt"] = gzip.compress(b"text as it was")
    assert read(f"{web.address}/zip.txt").lines == ["text as it was"]


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/none.txt", None, "the server says 404"),
        ("/page.txt", b"\n<!DOCTYPE html><html>", "an HTML page, not text"),
        ("/text.txt#sha256=" + "0" * 64, b"some text", "wrong checksum"),
        ("/short.txt", b"some text", "broke off"),
        ("/empty.txt", b"", "holds no text"),
    ],
)
def test_wrong_downloads_are_told_and_not_kept(web, path, body, told):
    if body is not None:
        web[path.partition("#")[0]] = body
    with pytest.raises(UserError, match=told):
        read(f"{web.address}{path}")
    kept = [name for name in corpus.cache_folder().glob("*") if name.stat().st_size]
    assert kept == []


def test_a_wrong_time_machine_is_told(web, monkeypatch):
    monkeypatch.setattr(corpus, "TIME_MACHINE_URL", f"{web.address}/book")
    web["/book"] = b"another book"
    with pytest.raises(UserError, match=r"time-machine: wrong checksum, SHA-1 is .* and should be 090b5e7e"):
        read("time-machine")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "holds no text"),
        (b"123 !?", "holds no text after cleaning"),
        (b"ab\0cd", "byte 2 is NUL"),
        (b"abc\xff", "not UTF-8 at byte 3"),
    ],
)
def test_wrong_files_are_told(tmp_path, data, told):
    path = tmp_path / "text"
    path.write_bytes(data)
    with pytest.raises(UserError, match=told):
        read(path, cleaning="d2l")


@pytest.mark.parametrize(
    ("source", "told"), [("no/such", "no such file"), ("no/*", "no file matches"), ("/", "cannot")]
)
def test_missing_files_are_told(source, told):
    with pytest.raises(UserError, match=told):
        read(source)


@given(st.binary(min_size=1))
def test_bytes_take_any_file(data):
    text = corpus.Corpus("here", "none", [data])
    words = build_vocabulary(VocabularyConfig(kind="byte"), text)
    assert bytes(words.encode(text.lines).tolist()) == data


@given(st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text)))
def test_characters_come_back(text):
    words = build_vocabulary(VocabularyConfig(), corpus.Corpus("here", "none", [text]))
    assert words.decode(words.encode([text])) == text
    assert vocabulary_from_json(words.to_json().encode(), "here") == words
    assert Vocabulary("char", words.tokens[:1]).encode([text]).tolist() == [0] * len(text)


def test_words_are_counted_by_line():
    text = corpus.Corpus("here", "d2l", ["b a", "b c", "a d"])
    words = build_vocabulary(VocabularyConfig(kind="word", min_frequency=2), text)
    assert words.tokens == ("<unk>", "b", "a")
    assert words.decode(words.encode(text.lines)) == "b a b <unk> a <unk>"
    assert len(build_vocabulary(VocabularyConfig(kind="word", size=2), text)) == 2
