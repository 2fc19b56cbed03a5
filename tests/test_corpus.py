"""Reading a corpus from files, globs, URIs and the embedded text."""

import bz2
import gzip
from pathlib import Path
from typing import Any

import pytest
from conftest import BOOK

from job.config.text import CorpusConfig, VocabularyConfig
from job.data.corpus import Corpus, read_corpus
from job.data.download import TIME_MACHINE_LENGTH
from job.data.vocabulary_builder import build_vocabulary
from job.errors import UserError


def read(source: str | Path, vocabulary_kind: str = "char", **fields: Any) -> Corpus:
    return read_corpus(CorpusConfig(source=str(source), **fields), vocabulary_kind)


@pytest.mark.shared
def test_read_corpus_of_the_book_has_its_length_and_vocabulary() -> None:
    corpus = read(BOOK, cleaning="d2l")
    assert corpus.num_characters == 170_580
    vocabulary = build_vocabulary(VocabularyConfig(), corpus)
    assert vocabulary.tokens[:5] == ("<unk>", " ", "e", "t", "a")
    assert len(vocabulary) == 28


def test_read_corpus_with_glob_joins_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    assert read(tmp_path / "*.txt").documents == [["a.txt\nb.txt"]]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([b"\xef\xbb\xbfone last", b"\xef\xbb\xbffirst two\n"], "one last\nfirst two\n"),
        ([b"last\n", b"first\r\n", b"second\r", b"third"], "last\nfirst\r\nsecond\rthird"),
        ([b"", b"last", b"", b"\xef\xbb\xbf", b"first"], "last\nfirst"),
        (["天气".encode(), "你好".encode()], "天气\n你好"),
    ],
)
def test_read_corpus_with_glob_separates_files_by_a_newline_and_drops_byte_order_marks(
    tmp_path: Path, files: list[bytes], text: str
) -> None:
    for number, data in enumerate(files):
        (tmp_path / f"{number}.txt").write_bytes(data)
    for vocabulary_kind in ("char", "word"):
        assert read(tmp_path / "*.txt", vocabulary_kind).documents == [[text]]
    assert read(tmp_path / "*.txt", "byte").documents == [[b"".join(files)]]


def test_read_corpus_with_glob_and_d2l_cleaning_keeps_words_of_two_files_apart(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_bytes(b"\xef\xbb\xbfone last")
    for vocabulary_kind in ("char", "word", "byte"):
        assert read(tmp_path / "*.txt", vocabulary_kind, cleaning="d2l").documents == [["one last", "one last"]]


def test_read_corpus_with_glob_names_the_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"\*\.txt: .*b\.txt: not UTF-8 at byte 3"):
        read(tmp_path / "*.txt")


def test_read_corpus_with_uri_reads_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert read(f"file://{tmp_path}/a.txt").documents == [["text"]]
    with pytest.raises(UserError, match=r"no\.txt: no such file"):
        read(f"file://{tmp_path}/no.txt")


def test_read_corpus_of_bytes_without_cleaning_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\xff\0")
    assert read(tmp_path / "data", "byte", cleaning="none").documents == [[b"\xff\0"]]


def test_read_corpus_embedded_is_cleaned_and_as_long_as_the_book() -> None:
    corpus = read("embedded")
    assert (corpus.source, corpus.cleaning) == ("embedded", "d2l")
    assert 140_000 < corpus.num_characters <= TIME_MACHINE_LENGTH


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "contains no text"),
        (b"123 !?", "contains no text after cleaning"),
        (b"ab\0cd", "not text, byte 2 is NUL"),
        (b"abc\xff", "not UTF-8 at byte 3"),
    ],
)
def test_read_corpus_of_invalid_file_raises(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"corpus.source = {path}: {problem}"):
        read(path, cleaning="d2l")


LINES = "One line and\nanother one.\n" * 50


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(LINES.encode(), mtime=0)[:-9], "its gzip data are corrupt or cut off near byte"),
        (bz2.compress(LINES.encode())[:-9], "its bz2 data are corrupt or cut off near byte"),
        (b"PK\x03\x04\x14\0\0\xff", r"a zip archive \(.*\); extract the text"),
        (b"PAR1\x15\x04\xff", "a Parquet file that is cut off; get the file again"),
        (b"Rar!\x1a\x07\1\0", "a RAR archive; extract the text"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an early Office document"),
        (b"text.txt".ljust(257, b"\0") + b"ustar", "a tar archive; extract the text"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF file; extract the text"),
        (LINES.encode("utf-16-le"), "UTF-16LE text; set corpus.encoding = UTF-16LE"),
        (LINES.encode("utf-16-be"), "UTF-16BE text; set corpus.encoding = UTF-16BE"),
        (LINES.encode("utf-32-le"), "UTF-32LE text; set corpus.encoding = UTF-32LE"),
        (LINES.encode("utf-32-be"), "UTF-32BE text; set corpus.encoding = UTF-32BE"),
        (b"hello\0world\n", "not text, byte 5 is NUL; use vocabulary.kind = byte"),
        (bytes(1000), "not text, byte 0 is NUL; use vocabulary.kind = byte"),
        (bytes(range(256)), "not text, byte 0 is NUL; use vocabulary.kind = byte"),
        (
            "na\xefve".encode("latin-1"),
            "not UTF-8 at byte 2 .*; set corpus.encoding, convert it to UTF-8, or use vocabulary.kind = byte",
        ),
    ],
)
def test_read_corpus_of_another_format_names_it(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "data").write_bytes(data)
    for kind, cleaning in (("char", "none"), ("word", "none"), ("byte", "d2l")):
        with pytest.raises(UserError, match=f"data: {message}"):
            read(tmp_path / "data", kind, cleaning=cleaning)
    assert read(tmp_path / "data", "byte").documents == [[data]]


@pytest.mark.parametrize("text", ["BZh is no archive", "PK\x03\x04", "%PDF- starts a PDF"])
def test_read_corpus_of_text_that_begins_like_another_format_reads_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "data").write_text(text)
    assert read(tmp_path / "data").documents == [[text]]


@pytest.mark.parametrize(
    ("source", "problem"), [("no/such", "no such file"), ("no/*", "no file matches"), ("/dev/null/a", "cannot be read")]
)
def test_read_corpus_of_missing_file_raises(source: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read(source)
