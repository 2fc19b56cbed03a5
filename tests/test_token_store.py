"""Token stores and files of other trainers: the same bits as from the text."""

import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import job, result
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from job.config.config_file import load_config
from job.config.text import CorpusConfig, StreamConfig, VocabularyConfig
from job.data.indexed import format_index, parse_index, smallest_dtype
from job.data.lanes import split_evenly
from job.data.read_ahead import WindowReader
from job.data.stream import Stream
from job.data.token_store import open_stored
from job.data.tokens import ShardedTokens, Shards
from job.data.vocabulary import Vocabulary
from job.errors import UserError
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.loop import lane_windows

pytestmark = pytest.mark.slow

TEXT = "the time machine\nwas a machine of time and other things\r\n" * 40
FLAGS = {
    "stream.batch_size": 4, "stream.num_steps": 8, "model.hidden_size": 8, "train.max_steps": 5, "generate.length": 5,
    "scale.workers": 0, "corpus.validation_fraction": 0.25, "train.epochs": 2,
}  # fmt: skip
KINDS = ["char", "word", "byte"]


@pytest.fixture
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts become stores of several shards."""
    monkeypatch.setattr("job.data.pieces.PIECE_BYTES", 150)


def words(**flags: object) -> list[object]:
    values = {**FLAGS, **{name.replace("__", "."): value for name, value in flags.items()}}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def run(tmp_path: Path, name: str, **flags: object) -> dict[str, Any]:
    ended = job("train", *words(run__storage=tmp_path / "runs", run__name=name, **flags))
    assert ended.status == 0, ended.err
    return result(tmp_path / "runs" / name)


def prepare(tmp_path: Path, source: Path, **flags: object) -> Path:
    store = tmp_path / f"store-{source.name}"
    ended = job("prepare", *words(corpus__source=source, corpus__store=store, **flags))
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1].startswith(f"{store}: ")  # after the progress, on a slow machine
    return store


def read_independently(prefix: Path) -> list[np.ndarray]:
    """The documents of a pair, by the format's description alone."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, num_sequences, num_boundaries = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    lengths = struct.unpack_from(f"<{num_sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{num_sequences}q", index, 34 + 4 * num_sequences)
    boundaries = struct.unpack_from(f"<{num_boundaries}q", index, 34 + 12 * num_sequences)
    assert len(index) == 34 + 12 * num_sequences + 8 * num_boundaries
    data = prefix.with_suffix(".bin").read_bytes()
    sequences = [np.frombuffer(data, dtype, n, start) for n, start in zip(lengths, pointers, strict=True)]
    assert boundaries[0] == 0 and boundaries[-1] == num_sequences
    parts = [sequences[start:stop] for start, stop in pairwise(boundaries)]
    return [np.concatenate(part) for part in parts]


def shards_of(folder: Path, tokens: np.ndarray, num_ids: int, shard_tokens: int) -> ShardedTokens:
    """Writes tokens as files of a store, and opens them as a worker does."""
    dtype = smallest_dtype(num_ids)
    parts = np.split(tokens, range(shard_tokens, len(tokens), shard_tokens))
    for number, part in enumerate(parts):
        part.astype(dtype).tofile(folder / f"{number}.bin")
    names, lengths = tuple(f"{number}.bin" for number in range(len(parts))), tuple(map(len, parts))
    shards = Shards(Folder(str(folder)), names, lengths, (0,) * len(parts), dtype, num_ids)
    stored: ShardedTokens = pickle.loads(pickle.dumps(ShardedTokens.whole(shards)))
    return stored


def json_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


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


def write_independently(prefix: Path, documents: list[list[list[int]]], code: int) -> None:
    """A pair of documents of sequences, by the format's description alone."""
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    sequences = [sequence for document in documents for sequence in document]
    ids = [index for sequence in sequences for index in sequence]
    starts = [sum(map(len, sequences[:number])) for number in range(len(sequences))]
    boundaries = [sum(map(len, documents[:number])) for number in range(len(documents) + 1)]
    size = struct.calcsize(letter)
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *(start * size for start in starts))
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )  # fmt: skip


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


@pytest.mark.usefixtures("several_shards")
@pytest.mark.parametrize("kind", [*KINDS, "bpe"])
@pytest.mark.parametrize("has_documents", [False, True])
def test_run_from_a_store_equals_the_run_from_the_text(tmp_path: Path, kind: str, has_documents: bool) -> None:
    (tmp_path / "text").write_text(TEXT)
    documents = json_lines(tmp_path / "a.jsonl", TEXT.split("\r\n"))
    source = documents if has_documents else tmp_path / "text"
    flags: dict[str, object] = {"vocabulary__kind": kind}
    if kind == "word":
        flags |= {"vocabulary__size": 7, "vocabulary__end_of_line": "true"}
    elif kind == "bpe":
        flags |= {"vocabulary__size": 280}
    store = prepare(tmp_path, source, **flags)
    expected, found = (
        run(tmp_path, name, corpus__source=text, **flags) for name, text in (("a", source), ("b", store))
    )
    ignored = {"seconds", "checkpoint", "best_checkpoint", "corpus"}
    assert {key: value for key, value in found.items() if key not in ignored} == {
        key: value for key, value in expected.items() if key not in ignored
    }
    changed = {"source": None, "sha256": None}  # of several shards, the digest is that of their digests
    assert {**found["corpus"], **changed} == {**expected["corpus"], **changed}
    evaluated = {
        job("evaluate", tmp_path / "runs" / name, "--corpus.source", text).out.partition(" (step")[0]
        for name in ("a", "b") for text in (source, store)
    }  # fmt: skip
    assert len(evaluated) == 1 and "" not in evaluated
    assert job("generate", tmp_path / "runs" / "b").out == job("generate", tmp_path / "runs" / "a").out


@pytest.mark.parametrize("kind", KINDS)
def test_store_is_read_by_an_independent_reader_document_by_document(tmp_path: Path, kind: str) -> None:
    texts = ["one two", "three one", "two two two"]
    store = prepare(tmp_path, json_lines(tmp_path / "a.jsonl", texts), vocabulary__kind=kind)
    content = json.loads((store / "manifest.json").read_text())["content"]
    assert content["documents"] == 3 and content["settings"]["corpus.source"] == str(tmp_path / "a.jsonl")
    documents = read_independently(store / "tokens-00000")
    vocabulary = json.loads((store / "vocabulary.json").read_text())
    assert sum(map(len, documents)) == content["tokens"]
    separator = 256 if kind == "byte" else len(vocabulary["tokens"])
    assert [document[-1] == separator for document in documents] == [True, True, False]
    for document, text in zip(documents, texts, strict=True):
        ids = [index for index in document.tolist() if index != separator]
        tokens = [chr(index) if kind == "byte" else vocabulary["tokens"][index] for index in ids]
        assert (" " if kind == "word" else "").join(tokens) == text


@pytest.mark.usefixtures("several_shards")
def test_run_from_a_store_resumes_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text")
    whole = run(tmp_path, "whole", corpus__source=tmp_path / "text", train__max_steps=12)
    run(tmp_path, "cut", corpus__source=store, train__max_steps=7)
    assert run(tmp_path, "cut", corpus__source=store, train__max_steps=12)["weights_sha256"] == whole["weights_sha256"]


def test_run_of_a_text_resumes_from_a_store_that_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text")
    whole = run(tmp_path, "whole", corpus__source=tmp_path / "text", train__max_steps=12)
    run(tmp_path, "cut", corpus__source=tmp_path / "text", train__max_steps=7)
    (tmp_path / "text").unlink()
    store.rename(tmp_path / "text")
    resumed = run(tmp_path, "cut", corpus__source=tmp_path / "text", train__max_steps=12)
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def spec_of(tmp_path: Path, source: object, **flags: object) -> Any:
    values = {**FLAGS, "corpus.source": source, **{name.replace("__", "."): value for name, value in flags.items()}}
    return build_run_spec(
        load_config(None, {name: str(value) for name, value in values.items()}), Folder(str(tmp_path))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"corpus__max_tokens": 150}, {"corpus__validation_fraction": 0}])
def test_dataset_of_a_store_stays_in_its_file_and_is_pickled_by_its_place(
    tmp_path: Path, kind: str, flags: dict[str, object]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    settings: dict[str, object] = {"vocabulary__kind": kind, "vocabulary__min_frequency": 41 if kind == "word" else 0}
    store = prepare(tmp_path, tmp_path / "text", **settings)
    expected = spec_of(tmp_path, tmp_path / "text", **settings, **flags).dataset
    dataset = spec_of(tmp_path, store, **settings, **flags).dataset
    data = pickle.dumps(dataset)  # as Ray does it on the way to a worker
    assert len(data) < 3000
    for found in (dataset, pickle.loads(data)):
        assert isinstance(found.train_tokens, ShardedTokens) and found.train_tokens.dtype == np.uint8
        np.testing.assert_array_equal(found.train_tokens, expected.train_tokens)
        np.testing.assert_array_equal(found.validation_tokens, expected.validation_tokens)
        assert found.unknown_shares == expected.unknown_shares
        assert {**found.metadata, "source": 0} == {**expected.metadata, "source": 0}
    copied = pickle.loads(pickle.dumps(expected))
    np.testing.assert_array_equal(copied.train_tokens, expected.train_tokens)


@settings(deadline=None)  # a loaded machine is slow
@given(
    st.integers(20, 200), st.integers(1, 90), st.integers(1, 4), st.integers(1, 6), st.integers(0, 9),
    st.integers(1, 4), st.sampled_from([2, 250, 300, 70_000]), st.sampled_from([1, 50, 8000]), st.integers(0, 5),
)  # fmt: skip
def test_windows_of_a_store_equal_those_of_memory(
    tmp_path_factory: pytest.TempPathFactory,
    num_tokens: int, shard_tokens: int, batch: int, steps: int, offset: int, workers: int, num_ids: int,
    block_bytes: int, resumed_at: int,
) -> None:  # fmt: skip
    tokens = (np.arange(num_tokens) * 7919 % num_ids).astype(np.int32)
    stored = shards_of(tmp_path_factory.mktemp("store"), tokens, num_ids, shard_tokens)
    np.testing.assert_array_equal(stored, tokens)
    config = StreamConfig(batch_size=batch, num_steps=steps, offset=offset)
    memory = Stream(tokens, config, 3)
    steps_of_epochs = [(epoch, window) for epoch in (0, 1) for window in range(memory.partition(0).num_windows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.data.read_ahead.BLOCK_BYTES", block_bytes)
        for lanes in split_evenly(batch, min(workers, batch)):
            reader = WindowReader(Stream(stored, config, 3), lanes, epochs=2)
            for epoch, window in steps_of_epochs[resumed_at:]:
                expected = memory.read_window(epoch, window, lanes)
                for found_TB, expected_TB in zip(reader.read(epoch, window), expected, strict=True):
                    assert torch.equal(found_TB, expected_TB)  # of the same dtype, too


def test_windows_of_many_lanes_request_each_part_of_a_bucket_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more lanes than cached requests, each block of windows requested all parts again."""
    for name, num_bytes in (("tokens._REQUEST_BYTES", 64), ("read_ahead.BLOCK_BYTES", 1500 * 16)):
        monkeypatch.setattr(f"job.data.{name}", num_bytes)  # four blocks to a request
    tokens, store, requests = np.arange(1500 * 64 + 1, dtype="<u2") % 300, fs._MockFileSystem(), list[int]()
    store.create_dir("bucket")
    folder = Folder("s3://bucket", location=(store, "bucket"))
    folder.write("a.bin", tokens.tobytes())
    read_block = Folder.read_block

    def record(self: Folder, name: str, start: int, max_bytes: int) -> bytes:
        requests.append(start)
        return read_block(self, name, start, max_bytes)

    monkeypatch.setattr(Folder, "read_block", record)
    stored = ShardedTokens.whole(Shards(folder, ("a.bin",), (len(tokens),), (0,), tokens.dtype, 300))
    config = StreamConfig(1500, 8, 0)
    reader, memory = WindowReader(Stream(stored, config, 0), range(1500), epochs=1), Stream(tokens, config, 0)
    for window in range(memory.partition(0).num_windows):
        assert torch.equal(reader.read(0, window)[1], memory.read_window(0, window, range(1500))[1])
    assert len(requests) == len(set(requests)) == math.ceil(tokens.nbytes / 64)
    stored.read_rows(0, 1, 3000, 2)
    assert stored.shards._cached_request.cache_info().maxsize == 4096


def test_windows_of_a_shard_that_is_truncated_while_it_is_mapped_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its missing tokens were read as zeros, or, if whole pages were missing, SIGBUS ended the process."""
    monkeypatch.setattr("job.data.read_ahead.BLOCK_BYTES", 64)
    tokens = np.arange(4000, dtype=np.int32) % 300 + 1
    reader = WindowReader(Stream(shards_of(tmp_path, tokens, 301, 4000), StreamConfig(2, 8, 0), 0), range(2), epochs=2)
    reader.read(0, 0)
    os.truncate(tmp_path / "0.bin", 100)
    with pytest.raises(UserError, match=r"0\.bin: token ids cannot be read: has 100 bytes and not 8,000; put them"):
        for window in range(200):
            reader.read(0, window)


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 90), st.integers(1, 5), st.integers(1, 6), st.integers(1, 40))
def test_evaluated_windows_of_a_store_equal_those_of_memory(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, shard_tokens: int, num_lanes: int, steps: int, block: int
) -> None:
    tokens = (np.arange(num_tokens) * 7919 % 300).astype(np.int32)
    stored = shards_of(tmp_path_factory.mktemp("store"), tokens, 300, shard_tokens)
    lanes = split_evenly(num_tokens - 1, num_lanes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.training.loop.BLOCK_TOKENS", block)
        found, expected = [*lane_windows(stored, lanes, steps)], [*lane_windows(tokens, lanes, steps)]
        assert [*map(torch.equal, found, expected)] == [True] * len(expected) and len(found) == len(expected)
    whole = [*lane_windows(tokens, lanes, steps)]
    assert [*map(torch.equal, whole, expected)] == [True] * len(expected) and len(whole) == len(expected)
    targets = torch.cat([window[1:] for window in whole])
    assert targets.T[targets.T >= 0].tolist() == tokens[1:].tolist()  # each once


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


def refused(*arguments: object) -> str:
    ended = job(*arguments)
    assert ended.status == 2 and ended.err.count("\n") == 1 and not ended.out, ended
    return ended.err


def test_store_that_is_damaged_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text")
    flags = words(corpus__source=store, run__storage=tmp_path / "runs")
    damages = {
        "tokens-00000.bin": (lambda data: data[:-1], "tokens-00000.bin is missing, or does not have the"),
        "./tokens-00000.bin": (lambda data: data[::-1], "tokens-00000.bin was changed: its checksum is wrong"),
        "tokens-00000.idx": (lambda data: data[:-1] + b"x", "tokens-00000.idx was changed: its checksum is wrong"),
        "vocabulary.json": (lambda data: data.replace(b"m", b"z"), "vocabulary.json was changed"),
        "manifest.json": (
            lambda data: data.replace(b'"tokens": ', b'"tokens": 1'),
            "manifest.json: its checksum is wrong",
        ),
    }
    for name, (damage, problem) in damages.items():
        data = (store / name).read_bytes()
        (store / name).write_bytes(damage(data))
        assert f"corpus.source = {store}: {problem}" in refused("train", *flags)
        (store / name).write_bytes(data)
    (store / "tokens-00000.bin").unlink()
    assert "tokens-00000.bin is missing" in refused("train", *flags)
    assert not (tmp_path / "runs").exists()


def with_version_1(data: bytes) -> bytes:
    """The manifest of a store of another version, with the right checksum."""
    content = {**json.loads(data)["content"], "version": 1}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"content": content, "sha256": digest}).encode()


@pytest.mark.usefixtures("several_shards")
def test_store_of_several_shards_that_is_damaged_is_one_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text")
    flags = words(corpus__source=store, run__storage=tmp_path / "runs")
    last = max(file.name for file in store.glob("tokens-*.bin"))
    damages = [
        (last, None, f"{last} is missing, or does not have the"),
        (last, lambda data: data + b"a", f"{last} is missing, or does not have the"),
        (last, lambda data: data[:-1] + bytes([data[-1] ^ 1]), f"{last} was changed: its checksum is wrong"),
        ("manifest.json", with_version_1, "manifest.json: lanes token store of version 1, and version 2 is read"),
        ("manifest.json", lambda data: data[:-9], "manifest.json: "),
        ("manifest.json", lambda data: data.replace(b"tokens-00001", b"../oken-00001"), "manifest.json: "),
    ]
    for name, damage, problem in damages:
        data = (store / name).read_bytes()
        (store / name).unlink()
        if damage:
            (store / name).write_bytes(damage(data))
        assert f"corpus.source = {store}: {problem}" in refused("train", *flags)
        (store / name).write_bytes(data)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("several_shards")
def test_store_with_a_shard_that_may_not_be_read_is_one_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(TEXT)
    store, open_file = prepare(tmp_path, tmp_path / "text"), Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:  # as for another user, which root is not
        if path.name == "tokens-00001.bin":
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    problem = f"corpus.source = {store}: tokens-00001.bin: cannot be read: Permission denied"
    assert problem in refused("train", *words(corpus__source=store, run__storage=tmp_path / "runs"))


def test_stores_of_more_shards_than_a_process_may_open_files_are_read(tmp_path: Path) -> None:
    tokens = (np.arange(600) % 3).astype(np.uint8)
    folders = tmp_path / "a", tmp_path / "b"  # for training and for validation
    for folder in folders:
        folder.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/dev/fd"))
    stores = [shards_of(folder, tokens, 3, 1) for folder in folders]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 200, limits[1]))
        for store in stores:
            np.testing.assert_array_equal(store, tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_worker_whose_shard_was_changed_after_the_start_fails_with_one_line_that_names_it(tmp_path: Path) -> None:
    tokens = (np.arange(100) % 3).astype(np.uint8)
    stored = shards_of(tmp_path, tokens, 3, 30)
    problems = {
        b"": "3.bin: token ids cannot be read: has 0 bytes and not 10",
        bytes(11): "3.bin: token ids cannot be read: has 11 bytes and not 10",
        bytes([1] * 9 + [3]): "3.bin: 3 is not the id of a token, of which the vocabulary has 3",
        None: "3.bin: token ids cannot be read: No such file or directory",
    }
    for data, problem in problems.items():
        (tmp_path / "3.bin").unlink(missing_ok=True)
        if data is not None:
            (tmp_path / "3.bin").write_bytes(data)
        found: ShardedTokens = pickle.loads(pickle.dumps(stored))
        np.testing.assert_array_equal(found[:90], tokens[:90])  # of shards that are as they were
        with pytest.raises(UserError, match=f"^{tmp_path}/{re.escape(problem)}[^\n]*$"):
            np.asarray(found)


@pytest.mark.parametrize(
    "entry", [5, None, "ab", [1], [1, "a", 2], ["x", "y"], {"a": 1, "b": 2}, [1.5, "a"], [1, None]]
)
def test_store_whose_manifest_has_a_malformed_file_is_one_error(tmp_path: Path, entry: Any) -> None:
    (tmp_path / "text").write_text(TEXT)
    manifest = prepare(tmp_path, tmp_path / "text") / "manifest.json"
    document = json.loads(manifest.read_text())
    document["content"]["shards"][0]["files"]["tokens-00000.idx"] = entry
    document["sha256"] = hashlib.sha256(json.dumps(document["content"], sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(document))
    problem = "manifest.json: its files are not pairs of a size and a checksum; prepare the store again"
    assert problem in refused("train", *words(corpus__source=manifest.parent, run__storage=tmp_path / "runs"))


def test_run_of_a_store_whose_tokens_changed_is_not_resumed_or_evaluated(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text")
    run(tmp_path, "a", corpus__source=store)
    (store / "tokens-00000.bin").write_bytes((store / "tokens-00000.bin").read_bytes()[::-1])
    flags = words(corpus__source=store, run__storage=tmp_path / "runs", run__name="a", train__max_steps=9)
    assert "tokens-00000.bin was changed: its checksum is wrong" in refused("train", *flags)
    evaluated = refused("evaluate", tmp_path / "runs" / "a", "--corpus.source", store)
    assert "tokens-00000.bin was changed: its checksum is wrong" in evaluated


def test_large_store_of_changed_tokens_is_found_by_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.token_store._MAX_VERIFIED_BYTES", 1000)
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text")
    data = bytearray((store / "tokens-00000.bin").read_bytes())
    data[100] ^= 1
    (store / "tokens-00000.bin").write_bytes(data)
    ended = job("doctor", *words(corpus__source=store, run__storage=tmp_path / "runs"))
    assert ended.status == 1 and "tokens-00000.bin was changed: its checksum is wrong" in ended.out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"vocabulary.kind": "word"}, 'vocabulary.kind = "word", and the store was made with "char"'),
        ({"corpus.cleaning": "d2l"}, 'corpus.cleaning = "d2l", and the store was made with "none"'),
        ({"corpus.newlines": "keep"}, 'corpus.newlines = "keep", and the store was made with "normalize"'),
        ({"vocabulary.size": "9"}, "vocabulary.size = 9, and the store was made with 0"),
    ],
)
def test_configuration_that_contradicts_the_store_is_one_error(
    tmp_path: Path, flags: dict[str, str], problem: str
) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text", corpus__newlines="normalize")
    values = {"corpus.newlines": "normalize", **flags}
    found = refused(
        "train", *words(corpus__source=store), *(word for pair in values.items() for word in (f"--{pair[0]}", pair[1]))
    )
    assert f"corpus.source = {store}: {problem}" in found


def test_prepare_writes_all_or_nothing_and_never_over_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(TEXT)
    assert "corpus.store is empty" in refused("prepare", "--corpus.source", tmp_path / "text")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    arguments = ["prepare", "--corpus.source", tmp_path / "text", "--corpus.store"]
    assert "exists and contains mine" in refused(*arguments, tmp_path / "used")
    problem = f"corpus.store = {tmp_path / 'text'}: is not a folder; choose another one"
    assert problem in refused(*arguments, tmp_path / "text")
    for name in ("tokens-00000.bin", "vocabulary.json"):  # not of a store
        (tmp_path / "pair").mkdir(exist_ok=True)
        (tmp_path / "pair" / name).write_text("mine")
        assert f"exists and contains {name}" in refused(*arguments, tmp_path / "pair")
        (tmp_path / "pair" / name).unlink()
    write = Folder.write

    def fail_at_manifest(folder: Folder, name: str, *parts: bytes) -> None:
        if name == "manifest.json":
            raise OSError(28, "No space left on device")
        write(folder, name, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", fail_at_manifest)
        assert "cannot be written: No space left on device" in refused(*arguments, tmp_path / "store")
    problem = (
        f"corpus.source = {tmp_path / 'store'}: an incomplete token store: it has no manifest.json; run prepare again"
    )
    assert problem in refused("train", "--corpus.source", tmp_path / "store")
    (tmp_path / "started").mkdir()  # a store whose first shard is not written yet
    (tmp_path / "store" / ".preparing").rename(tmp_path / "started" / ".preparing")
    assert f"corpus.source = {tmp_path / 'started'}: an incomplete token store: " in refused(
        "train", "--corpus.source", tmp_path / "started"
    )
    (tmp_path / "started" / ".preparing").rename(tmp_path / "store" / ".preparing")
    for name in (".tokens-00000.bin.12-34", "..preparing.12-34"):
        (tmp_path / "store" / name).write_text("left by a process that was killed")
    first = {file.name: file.read_bytes() for file in prepare(tmp_path, tmp_path / "text").iterdir()}
    assert job(*arguments, tmp_path / "store").status == 0
    assert (tmp_path / "store" / "tokens-00000.bin").read_bytes() == first["tokens-00000.bin"]
    assert "exists and contains manifest.json" in refused(*arguments, tmp_path / "store")
    problem = f"corpus.source = {tmp_path / 'store'}: a token store, not a text; train from it"
    assert problem in refused("prepare", "--corpus.source", tmp_path / "store", "--corpus.store", tmp_path / "other")
    assert {file.name for file in (tmp_path / "store").iterdir()} == first.keys()


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


@pytest.mark.parametrize("name", ["corpus.max_tokens", "corpus.validation_fraction"])
def test_store_whose_vocabulary_is_of_the_training_part_fixes_that_part(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text", vocabulary__scope="training")
    run(tmp_path, "same", corpus__source=store)
    value = {"corpus.max_tokens": 900, "corpus.validation_fraction": 0.5}[name]
    assert f"{name} = {value}, and the store was made with" in refused(
        "train", *words(corpus__source=store), f"--{name}", value
    )


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


@pytest.mark.usefixtures("several_shards")
@pytest.mark.cluster
def test_run_from_a_store_that_goes_on_with_two_workers_equals_the_run_from_the_text_in_this_process(
    tmp_path: Path, on_cluster: None
) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text")
    flags: dict[str, object] = {"train__reproducible": "true", "train__lane_groups": 2}
    expected = run(tmp_path, "a", corpus__source=tmp_path / "text", **flags)
    run(tmp_path, "b", corpus__source=store, **{**flags, "train__max_steps": 2})
    found = run(tmp_path, "b", corpus__source=store, scale__workers=2, scale__cpus_per_worker=1, **flags)
    for name in ("weights_sha256", "validation_perplexity", "generated"):
        assert found[name] == expected[name]


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
