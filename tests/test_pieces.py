"""Pieces of a corpus: their tokens are those of the corpus in memory, whatever the size of a piece."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config.text import CorpusConfig, VocabularyConfig
from job.data import parse, piece_reader
from job.data import pieces as pieces_module
from job.data.corpus import has_token, read_corpus
from job.data.piece_reader import PieceReader
from job.data.pieces import Pieces, TextFormat, cut_files, default_cut
from job.data.source import find_files
from job.data.vocabulary import Vocabulary
from job.data.vocabulary_builder import build_vocabulary
from job.errors import UserError

TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["\n", "\r\n", "\r", " ", "a", "it's", "1", "\x85", "天", "one two\n", "\n\n", "   ", "\ufeff"]
        ),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3),
    ),
    max_size=15,
).map("".join)
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def parquet(documents: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array(documents, pyarrow.string())}), file, row_group_size=2
    )
    return file.getvalue()


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The suffix of a file, and its bytes."""
    kind = draw(st.sampled_from([".txt", ".txt", ".bom", ".utf16", ".jsonl", ".parquet"]))
    suffix = draw(st.sampled_from(["", "", *COMPRESSIONS]))
    if kind in (".jsonl", ".parquet"):
        documents = draw(st.lists(TEXTS, max_size=5))
        return kind + suffix, COMPRESSIONS[suffix]((json_lines if kind == ".jsonl" else parquet)(documents))
    encoding = {".txt": "utf-8", ".bom": "utf-8-sig", ".utf16": "utf-16"}[kind]
    return f"{kind}.txt{suffix}", COMPRESSIONS[suffix](draw(TEXTS).encode(encoding))


def cut(source: object, corpus_config: CorpusConfig, kind: str, *, has_separator: bool = True) -> Pieces:
    _, found = find_files(str(source))
    find_cut = default_cut(kind, corpus_config.cleaning)
    sizes = [file.describe()[0] for file in found]
    return cut_files(found, sizes, TextFormat(corpus_config, kind, has_separator, find_cut))


def encode(pieces: Pieces, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """The tokens of all pieces, and the number of their characters."""
    tokens, characters = [np.empty(0, np.int32)], 0
    for piece in range(len(pieces)):
        for part in PieceReader(pieces).read(piece):
            characters += part.num_characters
            separator = np.full(int(part.has_separator), len(vocabulary) - 1, np.int32)
            tokens += [vocabulary.encode_documents(part.documents), separator]
    return np.concatenate(tokens), characters


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and blocks so small that short texts are cut everywhere."""
    monkeypatch.setattr(pieces_module, "_WINDOW_BYTES", 3)
    monkeypatch.setattr(piece_reader, "BLOCK_BYTES", 7)
    monkeypatch.setattr(parse, "_BATCH_ROWS", 2)
    monkeypatch.setattr(parse, "BLOCK_BYTES", 12)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["char", "byte", "word", "word by line"])
@settings(deadline=None, max_examples=100)  # a loaded machine is slow
@given(
    contents=st.lists(files(), min_size=1, max_size=5), piece_bytes=st.sampled_from([4, 9, 40, 1000]),
    cleaning=st.sampled_from(["none", "d2l"]), newlines=st.sampled_from(["keep", "normalize"]),
    separator=st.booleans(), has_separator=st.booleans(),
)  # fmt: skip
def test_tokens_of_pieces_are_those_of_the_corpus_in_memory(
    tmp_path_factory: pytest.TempPathFactory, kind: str, contents: list[tuple[str, bytes]], piece_bytes: int,
    cleaning: str, newlines: str, separator: bool, has_separator: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("corpus")
    for number, (suffix, data) in enumerate(contents):
        (folder / f"{number}{suffix}").write_bytes(data)
    config = CorpusConfig(source=str(folder), cleaning=cleaning, newlines=newlines, separator=separator)
    vocabulary_config = VocabularyConfig(kind=kind.split(maxsplit=1)[0], end_of_line="line" in kind)
    try:
        corpus = read_corpus(config, vocabulary_config.kind, has_separator=has_separator)
    except UserError:  # no text
        corpus = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE_BYTES", piece_bytes)
        pieces = cut(folder, config, vocabulary_config.kind, has_separator=has_separator)
    if corpus is None or not any(has_token(document, vocabulary_config.kind) for document in corpus.documents):
        assert not len(encode(pieces, Vocabulary(vocabulary_config.kind, ("<unk>",), True))[0])
        return
    vocabulary = build_vocabulary(vocabulary_config, corpus)
    tokens, characters = encode(pieces, vocabulary)
    np.testing.assert_array_equal(tokens, vocabulary.encode_documents(corpus.documents))
    assert PieceReader(pieces).has_separators() == (len(corpus.documents) > 1)
    if len(tokens):
        assert characters == corpus.num_characters


def test_files_are_cut_into_pieces_of_similar_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of more than one piece had half as many, of twice the size, unless its size was a multiple of theirs."""
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 10)
    for number, size in enumerate([25, 3, 2, 30, 4]):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    (tmp_path / "5.parquet").write_bytes(parquet(["y" * 20] * 6))  # three row groups
    pieces = cut(tmp_path, CorpusConfig(source=str(tmp_path), cleaning="none"), "char")
    spans = [[(pieces.spans[index].file, pieces.spans[index].start) for index in pieces.spans_of(piece)]
             for piece in range(len(pieces))]  # fmt: skip
    assert spans == [
        [(0, 0)], [(0, 10)], [(0, 20), (1, 0), (2, 0)], [(3, 0)], [(3, 10)], [(3, 20)], [(4, 0), (5, 0)], [(5, 1)],
        [(5, 2)],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a\nb\ufeffc\ufeff\nd", "\ufeff\ufeffab"])
def test_byte_order_mark_within_a_file_is_text_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    config = CorpusConfig(source=str(tmp_path / "a.txt"), cleaning="none")
    corpus = read_corpus(config, "char")
    vocabulary = build_vocabulary(VocabularyConfig(kind="char"), corpus)
    for piece_bytes, window in ((1, 1), (3, 1), (4, 5), (5, 3)):
        monkeypatch.setattr(pieces_module, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(pieces_module, "_WINDOW_BYTES", window)
        tokens, _ = encode(cut(tmp_path / "a.txt", config, "char"), vocabulary)
        np.testing.assert_array_equal(tokens, vocabulary.encode_documents(corpus.documents))


def test_compressed_parquet_on_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(parquet(["one", "two"])))
    pieces = cut(tmp_path / "a.parquet.gz", CorpusConfig(source="a.parquet.gz", cleaning="none"), "char")
    assert [line for part in PieceReader(pieces).read(0) for line in part.lines] == ["one", "two"]
    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    with pytest.raises(UserError, match=r"gz: cannot be decompressed: No space left on device; set XDG_CACHE_HOME"):
        list(PieceReader(pieces).read(0))


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_file_without_a_place_to_cut_is_read_once_and_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A text without blanks was read again by each of its pieces, which grew with the file."""
    (tmp_path / "a.txt").write_text("x" * 400_000 + "\n\n" + "y" * 400_000)
    for name, value in (("PIECE_BYTES", 10_000), ("_WINDOW_BYTES", 100), ("_MAX_WINDOW_BYTES", 1000)):
        monkeypatch.setattr(pieces_module, name, value)
    monkeypatch.setattr(piece_reader, "BLOCK_BYTES", 1000)
    pieces = cut(tmp_path / "a.txt", CorpusConfig(source="a.txt", cleaning="none"), kind)
    pieces = replace(pieces, text_format=replace(pieces.text_format, max_uncut=3000))
    sizes: list[int | None] = []

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            sizes.append(size)
            return super().read(size)

    monkeypatch.setattr("io.BufferedReader", Counting)
    parts = [line for piece in range(len(pieces)) for part in PieceReader(pieces).read(piece) for line in part.lines]
    assert "".join(map(str, parts)) == (tmp_path / "a.txt").read_text()
    assert max(map(len, parts)) <= 3000
    assert sum(filter(None, sizes)) < 5 * 800_000
