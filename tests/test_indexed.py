"""Token ids in files of other trainers: pairs of the Megatron format and flat files."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import job
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import (
    TEXT,
    prepare,
    read_independently,
    refused,
    run,
    spec_of,
    words,
    write_independently,
)

from job.config.text import CorpusConfig, VocabularyConfig
from job.data.indexed import format_index, parse_index, smallest_dtype
from job.data.token_store import open_stored
from job.data.tokens import ShardedTokens
from job.data.vocabulary import Vocabulary
from job.errors import UserError

pytestmark = pytest.mark.slow


@settings(deadline=None)  # a loaded machine is slow
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.sampled_from([np.uint8, np.uint16, np.int32]),
    st.integers(1, 60),
)
def test_indexed_files_are_read_by_another_reader_with_their_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], dtype: type, max_length: int
) -> None:
    prefix = tmp_path_factory.mktemp("pair") / "a"
    tokens: np.ndarray = np.arange(sum(lengths)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.data.indexed._MAX_LENGTH", max_length)  # longer documents have several sequences
        prefix.with_suffix(".idx").write_bytes(format_index(np.array(lengths), np.dtype(dtype)))
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    documents = read_independently(prefix)
    assert [len(document) for document in documents] == lengths
    np.testing.assert_array_equal(np.concatenate(documents), tokens)
    assert parse_index(prefix.with_suffix(".idx").read_bytes(), "a.idx") == (tokens.dtype, len(tokens))


@settings(deadline=None)  # a loaded machine is slow
@given(
    st.lists(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=3), min_size=1, max_size=9).filter(
        lambda documents: any(any(document) for document in documents)
    ),
    st.sampled_from([1, 2, 3, 4, 5, 8]),
)
def test_pair_written_by_another_implementation_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], code: int
) -> None:
    prefix = tmp_path_factory.mktemp("pair") / "text_document"
    write_independently(prefix, documents, code)
    vocabulary = Vocabulary("char", ("<unk>", *"abcdefghi"))
    config = replace(CorpusConfig(), source=str(prefix))
    stored = open_stored(config, VocabularyConfig(), vocabulary, True)
    assert stored
    expected = [index for document in documents for sequence in document for index in sequence]
    assert np.asarray(stored.tokens).tolist() == expected
    rows = stored.tokens.read_rows(0, len(expected) // 3, 3, len(expected) // 3)
    assert rows.ravel().tolist() == expected[: rows.size]


@pytest.mark.parametrize(
    ("size", "name"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]
)
def test_smallest_dtype_holds_all_ids(size: int, name: str) -> None:
    assert smallest_dtype(size) == np.dtype(name)
    assert np.iinfo(name).max >= size - 1


def test_evaluation_of_a_flat_file_of_ids_equals_that_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    run(tmp_path, "a", corpus__source=tmp_path / "text")
    (ids,) = read_independently(prepare(tmp_path, tmp_path / "text") / "tokens-00000")
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    found, expected = (
        job("evaluate", tmp_path / "runs" / "a", "--corpus.source", tmp_path / name) for name in ("ids.bin", "text")
    )
    assert (found.status, found.out) == (0, expected.out.replace("/text)", "/ids.bin)")), found.err


@pytest.mark.parametrize("kind", ["char", "word"])
def test_run_from_files_of_another_trainer_equals_the_run_from_the_text(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text", vocabulary__kind=kind)
    expected = run(tmp_path, "a", corpus__source=tmp_path / "text", vocabulary__kind=kind)
    (ids,) = read_independently(store / "tokens-00000")
    (tmp_path / "flat.bin").write_bytes(ids.astype("<u2").tobytes())
    for number, source in enumerate(
        (store / "tokens-00000", store / "tokens-00000.bin", store / "tokens-00000.idx", tmp_path / "flat.bin")
    ):
        flags = {"corpus__source": source, "vocabulary__kind": kind, "vocabulary__file": store / "vocabulary.json"}
        assert run(tmp_path, f"b{number}", **flags)["weights_sha256"] == expected["weights_sha256"]


def test_text_is_not_taken_for_tokens_because_of_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_name = "n" * 253  # to which no suffix can be appended
    for name in ("text", long_name):
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "few").write_text("ab" * 99)
    store = prepare(tmp_path, tmp_path / "text")
    prepare(tmp_path, tmp_path / "few").rename(tmp_path / "embedded")
    monkeypatch.chdir(tmp_path)
    expected = spec_of(tmp_path, "text").dataset.train_tokens
    for name, copy in (("tokens-00000.bin", "text.bin"), ("tokens-00000.idx", "text.idx")):
        (store / name).rename(copy)
    flags = {"vocabulary__file": store / "vocabulary.json"}
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    (tmp_path / "texts" / "manifest.json").write_text('{"license": "MIT"}')
    for copy in ("text.bin", "text.idx"):
        shutil.copy(copy, copy.replace("text", "texts"))  # a folder of this name exists
    for source in ("text", long_name, "texts"):
        dataset = spec_of(tmp_path, source, **flags).dataset
        assert isinstance(dataset.train_tokens, np.ndarray)
        np.testing.assert_array_equal(dataset.train_tokens, expected)
    assert isinstance(spec_of(tmp_path, "text.bin", **flags).dataset.train_tokens, ShardedTokens)
    assert isinstance(spec_of(tmp_path, "embedded").dataset.train_tokens, np.ndarray)


@pytest.mark.parametrize("size", [1, 50, 40_000])
def test_large_files_of_another_trainer_are_recognized_by_samples_of_all_their_parts(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.data.token_store._MAX_VERIFIED_BYTES", 0)
    monkeypatch.setattr("job.data.token_store._SAMPLE_TOKENS", 100)
    ids = np.arange(size) % 3 + 1
    holes = ids.copy()
    holes[size // 2 - size // 50 : size // 2 + size // 50] = 0  # an interrupted download may leave such a hole
    found = []
    for array in (ids, holes, np.append(ids, 1)):
        array.astype("<u2").tofile(tmp_path / "a.bin")
        config = replace(CorpusConfig(), source=str(tmp_path / "a.bin"))
        stored = open_stored(config, VocabularyConfig(), Vocabulary("char", ("<unk>", *"abc")), True)
        assert stored
        found.append(stored.sha256)
    assert len(set(found)) == (3 if size > 49 else 2)


@pytest.mark.parametrize("name", ["a", "a.bin", "a.idx", "flat.bin"])
def test_ids_of_another_trainer_without_vocabulary_file_are_one_error_and_no_text(tmp_path: Path, name: str) -> None:
    write_independently(tmp_path / "a", [[[1, 2, 3] * 999]], 1)  # these bytes are characters in UTF-8, too
    (tmp_path / "flat.bin").write_bytes(bytes([1, 0, 2, 0]) * 999)
    found = refused("train", *words(corpus__source=tmp_path / name, run__storage=tmp_path / "runs"))
    assert f"{name}: contains token ids, whose vocabulary is not given; set vocabulary.file" in found


@pytest.mark.parametrize(
    ("index", "data", "problem"),
    [
        (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 2, 1, 0, 0), b"a", "version 2 with dtype 1"),
        (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 7, 0, 0), b"a", "version 1 with dtype 7"),
        (b"something else" * 9, b"a", "not an index of the Megatron format"),
        (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 1, 2**40, 0), b"a", "is cut off"),
        (format_index(np.array([3]), np.dtype(np.uint8)), b"ab", "has 2 bytes, which are not the sequences"),
        (format_index(np.array([2]), np.dtype(np.uint8)), b"\0\x09", "9 is not the id of a token"),
        (format_index(np.array([2]), np.dtype(np.int32)), struct.pack("<2i", -1, 0), "-1 is not the id of a token"),
        (None, b"\0\0\0", "has 3 bytes, which are no token ids of 2 bytes"),
        (None, b"\x09\0\0\0", "9 is not the id of a token"),
    ],
)
def test_files_of_another_trainer_that_are_wrong_are_one_error(
    tmp_path: Path, index: bytes | None, data: bytes, problem: str
) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    if index is not None:
        (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "vocabulary.json").write_text(json.dumps({"kind": "char", "tokens": ["<unk>", "a", "b"]}))
    flags = words(corpus__source=tmp_path / "a.bin", vocabulary__file=tmp_path / "vocabulary.json")
    found = refused("train", *flags)
    assert f"corpus.source = {tmp_path / 'a.bin'}: " in found and problem in found


@pytest.mark.parametrize(("dtype", "size"), [("uint8", 257), ("uint16", 65_537)])
def test_open_stored_ids_of_a_type_that_cannot_hold_the_vocabulary_are_refused(
    tmp_path: Path, dtype: str, size: int
) -> None:
    """Such ids were cut off when they were written, or are those of another vocabulary."""
    ids = np.zeros(10, dtype)
    (tmp_path / "ids.bin").write_bytes(ids.tobytes())
    (tmp_path / "ids.idx").write_bytes(format_index(np.array([10]), ids.dtype))
    vocabulary = Vocabulary("word", ("<unk>", *map(str, range(size - 1))))
    corpus_config = CorpusConfig(source=str(tmp_path / "ids"))
    with pytest.raises(UserError, match=rf"ids\.bin: its ids are {dtype}, which cannot hold all {size:,} tokens"):
        open_stored(corpus_config, VocabularyConfig(kind="word"), vocabulary, reads_flat=True)
    smaller = replace(vocabulary, tokens=vocabulary.tokens[:-1])
    stored = open_stored(corpus_config, VocabularyConfig(kind="word"), smaller, reads_flat=True)
    assert stored is not None
