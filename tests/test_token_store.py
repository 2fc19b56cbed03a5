"""Token stores: runs and windows with the same bits as from the text."""

import json
import math
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import job
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs
from token_stores import KINDS, TEXT, json_lines, prepare, read_independently, run, shards_of, spec_of

from job.config.text import StreamConfig
from job.data.lanes import split_evenly
from job.data.read_ahead import WindowReader
from job.data.stream import Stream
from job.data.tokens import ShardedTokens, Shards
from job.errors import UserError
from job.storage import Folder
from job.training.loop import lane_windows

pytestmark = pytest.mark.slow


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
