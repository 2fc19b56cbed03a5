"""Corpora and token stores in an object store: an S3 server on this machine, behind a proxy that fails requests."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from conftest import Ended, job, result
from object_store import KEYS, ROOT, FaultyStore, bucket_address, s3_server
from pyarrow import fs

from job.config.text import StreamConfig
from job.data.read_ahead import WindowReader
from job.data.stream import Stream
from job.data.tokens import ShardedTokens, Shards
from job.errors import UserError
from job.storage import Folder

pytestmark = pytest.mark.slow

TEXT = "the time machine\nwas a machine of time and other things\r\n" * 40
FLAGS = [
    "--stream.batch_size", 4, "--stream.num_steps", 8, "--model.hidden_size", 8, "--train.max_steps", 20,
    "--generate.length", 5, "--scale.workers", 0, "--corpus.validation_fraction", 0.25, "--train.epochs", 2,
]  # fmt: skip


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a server with a bucket."""
    pytest.importorskip("moto")
    with s3_server() as port:
        yield port


@pytest.fixture(autouse=True)
def small_requests_and_no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small texts need many requests, and retries do not wait, since they are left to ``Folder``."""
    monkeypatch.setattr("job.storage._open_location", partial(open_location, 1))
    monkeypatch.setattr("job.storage.RETRY_DELAYS_S", (0.0,) * 6)
    monkeypatch.setattr("job.data.tokens._REQUEST_BYTES", 256)
    monkeypatch.setattr("job.data.read_ahead.BLOCK_BYTES", 256)
    monkeypatch.setattr("job.data.pieces.PIECE_BYTES", 1200)


def open_location(max_attempts: int, address: str) -> tuple[fs.FileSystem, str]:
    if "://" not in address:
        return fs.LocalFileSystem(), address
    options = {name: value for name, (value,) in parse_qs(urlsplit(address).query).items()}
    path = urlsplit(address).netloc + urlsplit(address).path
    return fs.S3FileSystem(retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts), **options), path


def prepare(source: object, store: object) -> Ended:
    """Prepares a store in this process."""
    return job("prepare", "--corpus.source", source, "--corpus.store", store, "--scale.workers", 0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The result of a run from the text."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "text").write_text(TEXT)
    ended = job("train", "--corpus.source", folder / "text", "--run.storage", folder, "--run.name", "a", *FLAGS)
    assert ended.status == 0, ended.err
    return result(folder / "a")


@pytest.mark.cluster
def test_run_from_a_bucket_that_fails_requests_equals_the_run_from_the_text(
    port: int, tmp_path: Path, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.storage._open_location", partial(open_location, 3))
    faults = ["error", *[""] * 4, "reset", *[""] * 4, "cut", *[""] * 4, "slow", *[""] * 4]
    with FaultyStore(port, itertools.cycle(faults)) as proxy:
        folder, store = (bucket_address(proxy.server_port, name) for name in ("texts", "stored"))
        Folder.resolve(bucket_address(port, "texts")).write("a.txt", TEXT.encode())
        ended = job("prepare", "--corpus.source", folder, "--corpus.store", store)
        assert (ended.status, ended.err) == (0, "")
        names = Folder.resolve(store).names()
        shards = [f"tokens-0000{number}.{suffix}" for number in (0, 1) for suffix in ("bin", "idx")]
        assert names == ["manifest.json", *shards, "vocabulary.json"]
        proxy.counts.clear()
        ended = job("train", "--corpus.source", store, "--run.storage", tmp_path, "--run.name", "b", *FLAGS)
        assert ended.status == 0, ended.err
        assert min(proxy.counts[fault] for fault in ("error", "reset", "cut", "slow")) > 0
    found = result(tmp_path / "b")
    for name in ("weights_sha256", "validation_perplexity", "generated", "unknown_share"):
        assert found[name] == expected[name]


def test_store_in_a_bucket_that_is_interrupted_is_incomplete_until_prepare_succeeds(port: int, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    address = bucket_address(port, "interrupted")
    with FaultyStore(port, itertools.repeat(""), r"(PUT|POST) \S+/manifest\.json") as proxy:
        ended = prepare(tmp_path / "text", bucket_address(proxy.server_port, "interrupted"))
    assert ended.status == 2 and ended.err.count("\n") == 1
    assert "corpus.store = s3://bucket/interrupted: cannot be written: " in ended.err
    assert "manifest.json" not in Folder.resolve(address).names() != []
    refused = job("train", "--corpus.source", address, "--run.storage", tmp_path)
    assert refused.status == 2 and "an incomplete token store" in refused.err
    assert prepare(tmp_path / "text", address).status == 0
    ended = job("doctor", "--corpus.source", address, "--run.storage", tmp_path, *FLAGS)
    assert ended.status == 0, ended.out


@pytest.mark.parametrize("num_good", [0, 60, 10**6])
def test_bucket_that_stops_to_answer_is_one_error_that_names_the_file(port: int, num_good: int) -> None:
    tokens = np.arange(4000, dtype="<u2") % 300
    folder = Folder.resolve(bucket_address(port, f"flat-{num_good}"))
    folder.write("a.bin", tokens.tobytes())
    faults = itertools.cycle(["", "", "error", "reset", "cut", "cut"])  # which retries pass
    with FaultyStore(port, itertools.chain(itertools.islice(faults, num_good), itertools.repeat("error"))) as proxy:
        folder = replace(Folder.resolve(bucket_address(proxy.server_port, f"flat-{num_good}")), retry=True)
        shards = Shards(folder, ("a.bin",), (4000,), (0,), np.dtype("<u2"), 300)
        config = StreamConfig(batch_size=2, num_steps=5, offset=0)
        memory = Stream(tokens, config, 0)
        reader = WindowReader(Stream(ShardedTokens.whole(shards), config, 0), range(2), 1)
        problem = f"s3://bucket/flat-{num_good}/a.bin: token ids cannot be read: .*; put them on storage"
        num_windows = memory.partition(0).num_windows
        with pytest.raises(UserError, match=problem) if num_good < 99 else contextlib.nullcontext() as caught:
            for window in range(num_windows):
                inputs_TB, _ = reader.read(0, window)
                np.testing.assert_array_equal(inputs_TB, memory.read_window(0, window, range(2))[0])
        assert caught is None or "\n" not in str(caught.value)
        assert (window > 0) == (num_good > 0) and (window == num_windows - 1) == (caught is None)


def test_run_whose_bucket_stops_to_answer_fails_with_one_line_and_resumes_with_the_same_bits(
    port: int, tmp_path: Path, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.data.read_ahead.BLOCK_BYTES", 64)  # two windows
    (tmp_path / "text").write_text(TEXT)
    ended = prepare(tmp_path / "text", bucket_address(port, "lost"))
    assert ended.status == 0, ended.err
    flags = ["--run.storage", tmp_path, "--run.name", "b", *FLAGS, "--train.checkpoint_every", 5]
    with FaultyStore(port, itertools.repeat("")) as proxy:
        arguments = ["train", "--corpus.source", bucket_address(proxy.server_port, "lost"), *flags]
        read, num_read = WindowReader.read, itertools.count(1)

        def read_until_lost(reader: WindowReader, epoch: int, window: int) -> object:
            if next(num_read) == 8:
                proxy.faults = itertools.repeat("error")
            return read(reader, epoch, window)

        with monkeypatch.context() as patch:
            patch.setattr(WindowReader, "read", read_until_lost)
            ended = job(*arguments)
        assert (ended.status, ended.err.count("\n")) == (1, 1), ended.err
        assert "error: s3://bucket/lost/tokens-0000" in ended.err and ".bin: token ids cannot be read: " in ended.err
        saved = re.search(r"; saved at step (5|10|15)\. Resume: the same command", ended.err)  # parts are cached
        assert saved, ended.err
        proxy.faults = itertools.repeat("")
        ended = job(*arguments)
        assert ended.status == 0, ended.err
        assert f"resuming from step {saved[1]} of 20" in ended.out
    assert result(tmp_path / "b")["weights_sha256"] == expected["weights_sha256"]


def test_pair_in_a_bucket_gives_the_run_of_the_text(port: int, tmp_path: Path, expected: dict[str, object]) -> None:
    (tmp_path / "text").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.data.pieces.PIECE_BYTES", 1 << 20)
        ended = prepare(tmp_path / "text", tmp_path / "store")
    assert ended.status == 0, ended.err
    ids = np.fromfile(tmp_path / "store" / "tokens-00000.bin", np.uint8)
    pair = Folder.resolve(bucket_address(port, "pair"))
    pair.upload(tmp_path / "store")
    pair.remove("manifest.json")
    pair.write("flat.bin", ids.astype("<u2").tobytes())
    for number, name in enumerate(("tokens-00000", "tokens-00000.bin", "flat.bin")):
        flags = ["--corpus.source", (pair / name).address, "--vocabulary.file", (pair / "vocabulary.json").address]
        ended = job("train", *flags, "--run.storage", tmp_path, "--run.name", f"b{number}", *FLAGS)
        assert ended.status == 0, ended.err
        assert result(tmp_path / f"b{number}")["weights_sha256"] == expected["weights_sha256"]


def test_credentials_are_those_of_the_file_in_the_home_folder(port: int, tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = fromfile\naws_secret_access_key = x\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in KEYS}
    with FaultyStore(port, itertools.repeat("")) as proxy:
        code = f"from job.storage import Folder; Folder.resolve({bucket_address(proxy.server_port, 'a')!r}).names()"
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=ROOT, env={**environment, "HOME": str(tmp_path)}, check=True)
        assert proxy.keys == {"fromfile"}
