"""Preparing a token store piece by piece: the same tokens as in memory, and the same bytes after any interruption."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
from conftest import full_disk, job
from hypothesis import example, given, settings
from hypothesis import strategies as st
from object_store import KEYS, bucket_address
from test_pieces import files

from job.config.config_file import load_config
from job.config.schema import Config
from job.console import Console
from job.data import piece_encoder, piece_reader
from job.data import pieces as pieces_module
from job.data.corpus import has_token, read_corpus
from job.data.dataset import encode_corpus
from job.data.manifest import MARKER
from job.data.token_store import StoredTokens, open_stored
from job.data.tokens import count_unknown
from job.errors import UserError
from job.inference.evaluate import count_target_characters
from job.run.lease import acquire_lease
from job.run.prepare import prepare_store
from job.storage import Folder

pytestmark = pytest.mark.slow

LINES = "the time machine\nwas a machine\r\nof time and other things\n" * 30


def config_of(source: object, store: object, **flags: object) -> Config:
    values = {"corpus.source": source, "corpus.store": store, "scale.workers": 0}
    values |= {name.replace("__", "."): value for name, value in flags.items()}
    return load_config(None, {name: str(value) for name, value in values.items()})


def stored(config: Config) -> StoredTokens:
    corpus = replace(config.corpus, source=config.corpus.store)
    opened = open_stored(corpus, config.vocabulary, None, reads_flat=False)
    assert opened
    return opened


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and shards of a few characters."""
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 100)
    monkeypatch.setattr(piece_encoder, "SHARD_CHARACTERS", 70)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "word by line", "bpe"])
@settings(deadline=None, max_examples=25)  # a loaded machine is slow
@given(
    contents=st.lists(files(), min_size=1, max_size=4), piece_bytes=st.sampled_from([4, 20, 1000]),
    shard=st.sampled_from([1, 9, 1000]), cleaning=st.sampled_from(["none", "d2l"]), separator=st.booleans(),
    scope=st.sampled_from(["corpus", "training"]), max_tokens=st.sampled_from([0, 0, 3, 17]),
    max_uncut=st.sampled_from([3, 5, 1000]), newlines=st.sampled_from(["keep", "normalize"]),
)  # fmt: skip
@example(  # a line end between a byte order mark and a letter is at the beginning of the text
    contents=[(".bom.txt", b"\xef\xbb\xbf\na\n\n\n\n\n")], piece_bytes=4, shard=1, cleaning="none",
    separator=False, scope="corpus", max_tokens=0, max_uncut=3, newlines="keep",
)  # fmt: skip
def test_store_of_pieces_equals_the_corpus_in_memory(
    tmp_path_factory: pytest.TempPathFactory, kind: str, contents: list[tuple[str, bytes]], piece_bytes: int,
    shard: int, cleaning: str, separator: bool, scope: str, max_tokens: int, max_uncut: int, newlines: str,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "texts").mkdir()
    for number, (suffix, data) in enumerate(contents):
        (folder / "texts" / f"{number}{suffix}").write_bytes(data)
    flags = {"corpus__cleaning": cleaning, "corpus__separator": separator, "corpus__max_tokens": max_tokens}
    flags |= {"vocabulary__kind": kind.split(maxsplit=1)[0], "vocabulary__end_of_line": "line" in kind}
    flags |= {"vocabulary__size": 280} if kind == "bpe" else {"vocabulary__scope": scope}
    flags |= {} if kind == "byte" else {"corpus__newlines": newlines}
    values = {name: str(value).lower() for name, value in flags.items()}
    config = config_of(folder / "texts", folder / "store", corpus__validation_fraction=0.3, **values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE_BYTES", piece_bytes)
        patch.setattr(piece_encoder, "SHARD_CHARACTERS", shard)
        patch.setattr(piece_reader, "BLOCK_BYTES", 3 * max_uncut)
        patch.setattr("job.data.vocabulary.BLOCK_CHARACTERS", 2)
        for module in ("data.bpe", "data.vocabulary", "data.vocabulary_builder", "run.prepare"):
            patch.setattr(f"job.{module}.MAX_UNCUT", max_uncut)
        try:
            corpus = read_corpus(config.corpus, config.vocabulary.kind)
            vocabulary, tokens = encode_corpus(corpus, config.corpus, config.vocabulary)
            if not has_token(corpus.documents[0], config.vocabulary.kind) or len(tokens) < 2:
                raise UserError("too few")
        except UserError:
            with pytest.raises(UserError, match=r"contains no text|tokens; give more text"):
                prepare_store(config, Console())
            assert not (folder / "store").exists()
            return
        assert prepare_store(config, Console()) == 0
        target_characters = count_target_characters(corpus, vocabulary, tokens[1:])
    found = stored(config)
    content = json.loads((folder / "store" / "manifest.json").read_text())["content"]
    separators = int((tokens[:-1] == len(vocabulary) - 1).sum()) if vocabulary.has_separator else 0
    assert content["documents"] == separators + 1
    assert found.vocabulary == vocabulary
    np.testing.assert_array_equal(np.asarray(found.tokens), tokens)
    assert found.num_characters == corpus.num_characters
    assert found.target_characters == target_characters
    assert found.tokens.count_unknown(vocabulary) == count_unknown(tokens, vocabulary)


def written_texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(LINES[:500])
    lines = (json.dumps({"text": line}) + "\n" for line in LINES.splitlines()[:20])
    (tmp_path / "texts" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return tmp_path / "texts"


def mark_owner_as_dead(store: Path) -> None:
    """Changes the lease of this process to that of one that has ended."""
    owner = store / "owner.json"
    if owner.exists():
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"started_at": "0"}))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["word", "byte", "bpe"])
def test_prepare_that_is_killed_at_any_write_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    flags: dict[str, object] = {"vocabulary__kind": kind, "vocabulary__size": 280 if kind == "bpe" else 0}
    texts = written_texts(tmp_path)
    config = config_of(texts, tmp_path / "store", **flags)
    assert prepare_store(config_of(texts, tmp_path / "whole", **flags), Console()) == 0
    whole = contents(tmp_path / "whole")
    change, encoded = Folder._check_change, list[str]()
    write = Folder.write

    def record(folder: Folder, name: str, *parts: bytes) -> None:
        write(folder, name, *parts)
        encoded.append(name)

    class Killed(BaseException):
        """The end of the process, which no handler of errors catches."""

    finished = False
    for number in range(300):
        remaining = [number]  # changes of files until the process ends

        def check(folder: Folder, remaining: list[int] = remaining) -> None:
            change(folder)
            if not remaining[0]:
                raise Killed
            remaining[0] -= 1

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write", record)
            patch.setattr(Folder, "_check_change", check)
            patch.setattr("job.run.lease.Lease.release", lambda self: self.released.set())  # nor is it released
            try:
                prepare_store(config, Console())
                finished = True
            except Killed:
                mark_owner_as_dead(tmp_path / "store")
        if finished or (tmp_path / "store" / "manifest.json").exists():
            break
    found = contents(tmp_path / "store")
    assert {name: found[name] for name in whole} == whole
    receipts = [name for name in encoded if name.startswith(".receipt")]
    assert len(receipts) == len(set(receipts))  # finished pieces are not written again


@pytest.mark.cluster
def test_store_that_a_cluster_prepares_has_the_bytes_of_the_one_of_this_process(
    tmp_path: Path, on_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 300)
    monkeypatch.setattr("job.cluster.prepare._MIN_TASKS_PER_CPU", 0)  # several pieces in a task
    texts = written_texts(tmp_path)
    flags = ["--corpus.source", texts, "--vocabulary.kind", "word", "--corpus.max_tokens", 150]
    for workers in (0, 2):
        ended = job("prepare", *flags, "--corpus.store", tmp_path / f"store{workers}", "--scale.workers", workers)
        assert ended.status == 0, ended.err
        assert not ended.err
    here, there = contents(tmp_path / "store0"), contents(tmp_path / "store2")
    assert len(here) == 6  # two shards
    assert there == here
    (texts / "c.txt").write_bytes(b"not \xff UTF-8")
    ended = job("prepare", *flags[:2], "--corpus.store", tmp_path / "store", "--scale.workers", 2)
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert f"{texts}: {texts / 'c.txt'}: not UTF-8 at byte 4 (0xff)" in ended.err
    assert not (tmp_path / "store").exists()


@pytest.mark.cluster
def test_prepare_on_a_cluster_whose_nodes_are_refused_disconnects(
    tmp_path: Path, on_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(*_: object, **options: object) -> None:
        assert ray.is_initialized()
        raise UserError("corpus.store = a: cannot be written", "")

    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 200)
    monkeypatch.setattr("job.cluster.prepare.check_placement", refuse)
    flags = ["--corpus.source", written_texts(tmp_path), "--corpus.store", tmp_path / "store"]
    assert job("prepare", *flags, "--scale.workers", 2).status == 2
    assert not ray.is_initialized()


def interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, final_name: str = "tokens-00003.idx", **flags: object
) -> Config:
    """A store in tmp_path/store whose prepare was interrupted when it wrote a file."""
    config = config_of(written_texts(tmp_path), tmp_path / "store", **flags)

    def interrupt(folder: Folder, name: str, *parts: bytes, write: Any = Folder.write) -> None:
        if name == final_name:
            raise KeyboardInterrupt
        write(folder, name, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", interrupt)
        assert prepare_store(config, Console()) == 130
    return config


@pytest.mark.usefixtures("small")
def test_prepare_that_is_interrupted_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = interrupted(tmp_path, monkeypatch)
    assert ".receipt-00002.json" in contents(tmp_path / "store")
    assert capsys.readouterr().out == "interrupted; the same command continues\n"
    assert not (tmp_path / "store" / "owner.json").exists()
    assert prepare_store(config, Console()) == 0


@pytest.mark.parametrize(
    ("verb", "field"),
    [
        ("prepare", "corpus.source"),
        ("prepare", "corpus.store"),
        pytest.param("train", "corpus.source", marks=pytest.mark.slow),
        pytest.param("train", "run.storage", marks=pytest.mark.slow),
    ],
)
def test_command_that_is_interrupted_while_a_bucket_does_not_answer_ends(tmp_path: Path, verb: str, field: str) -> None:
    """It ended after the attempts of the request, which take minutes, and in them Python runs no handler."""
    (tmp_path / "text").write_text(LINES)
    with socket.create_server(("127.0.0.1", 0)) as server:
        paths = {"corpus.source": str(tmp_path / "text"), "run.storage": str(tmp_path / "runs")}
        paths |= {"corpus.store": str(tmp_path / "store")} if verb == "prepare" else {}
        paths |= {field: bucket_address(server.getsockname()[1], "folder")}
        flags = [word for name, path in paths.items() for word in (f"--{name}", path)]
        command = [sys.executable, "-m", "job", verb, *flags, "--scale.workers", "0"]
        process = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=os.environ | KEYS)
        try:
            server.accept()[0].recv(1)
            process.send_signal(signal.SIGINT)
            shown = process.communicate(timeout=60)
        finally:
            process.kill()
    output = "interrupted; the same command continues\n" if verb == "prepare" else ""
    assert (process.returncode, shown) == (130, (output, ""))
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.usefixtures("small")
def test_prepare_of_files_that_change_never_mixes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = interrupted(tmp_path, monkeypatch)
    text = tmp_path / "texts" / "a.txt"
    text.write_text(LINES[:500].upper())
    write = Folder.write

    def change(folder: Folder, name: str, *parts: bytes) -> None:
        write(folder, name, *parts)
        if name == "tokens-00003.idx":
            os.utime(text, (1, 1))

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", change)
        with pytest.raises(UserError, match="texts: its files were changed while they were read; start it again"):
            prepare_store(config, Console())
    assert contents(tmp_path / "store") == {}
    assert prepare_store(config, Console()) == 0
    assert prepare_store(config_of(tmp_path / "texts", tmp_path / "again"), Console()) == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "again")


@pytest.mark.usefixtures("small")
def test_prepare_of_an_interrupted_store_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    before = contents(tmp_path / "store")
    other = config_of(tmp_path / "texts", tmp_path / "store", vocabulary__kind="word")
    with pytest.raises(
        UserError, match=r'vocabulary\.kind = "word", and an interrupted prepare started it with "char"; set'
    ):
        prepare_store(other, Console())
    assert contents(tmp_path / "store") == before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["vocabulary.json", "tokens-00000.bin", ".receipt-00000.json"])
def test_prepare_that_is_interrupted_before_its_first_piece_starts_again_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    interrupted(tmp_path, monkeypatch, name)
    for store in ("store", "whole"):
        assert prepare_store(config_of(tmp_path / "texts", tmp_path / store, vocabulary__kind="word"), Console()) == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("num_removed", [0, 3, None])  # None: all receipts, but not the marker
@pytest.mark.parametrize("is_killed", [True, False])
def test_prepare_that_ended_before_its_clean_up_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_removed: int | None,
    is_killed: bool,
) -> None:  # fmt: skip
    config, removed = config_of(written_texts(tmp_path), tmp_path / "store"), list[str]()
    assert prepare_store(config_of(tmp_path / "texts", tmp_path / "whole"), Console()) == 0
    described, remove = capsys.readouterr().out, Folder.remove

    def end(folder: Folder, name: str) -> None:
        is_receipt = name.startswith(".receipt")
        if name == MARKER or (is_receipt and len(removed) == num_removed):
            raise KeyboardInterrupt if is_killed else OSError(5, "Input/output error")
        removed.extend([name] * is_receipt)
        remove(folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", end)
        if is_killed:
            assert prepare_store(config, Console()) == 130
        else:
            with pytest.raises(UserError, match=r"store: cannot be written: Input/output error"):
                prepare_store(config, Console())
    left = contents(tmp_path / "store")
    assert {MARKER, "manifest.json"} <= set(left)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"store: exists and contains manifest\.json; choose another folder"):
        prepare_store(config_of(tmp_path / "texts", tmp_path / "store", vocabulary__kind="word"), Console())
    assert contents(tmp_path / "store") == left
    assert prepare_store(config, Console()) == 0
    assert capsys.readouterr().out == described.replace("whole", "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match="exists and contains manifest"):
        prepare_store(config, Console())


@pytest.mark.usefixtures("small")
def test_prepare_into_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    config = config_of(written_texts(tmp_path), tmp_path / "store")
    with (
        acquire_lease(Folder(str(tmp_path / "store"))),
        pytest.raises(
            UserError, match=rf"this store is in use by process {os.getpid()} on .*; stop it, or choose another corpus"
        ),
    ):
        prepare_store(config, Console())
    assert prepare_store(config, Console()) == 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["vocabulary.json", "tokens-00003.bin", ".receipt-00003.json", "manifest.json"])
def test_prepare_on_a_full_disk_is_one_error_and_continues_when_there_is_space(tmp_path: Path, name: str) -> None:
    config = config_of(written_texts(tmp_path), tmp_path / "store")
    problem = r"corpus\.store = .*store: cannot be written: No space left on device"
    with full_disk(name), pytest.raises(UserError, match=problem):
        prepare_store(config, Console())
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert prepare_store(config, Console()) == 0
    assert prepare_store(config_of(tmp_path / "texts", tmp_path / "whole"), Console()) == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_prepare_into_a_store_of_an_unknown_scheme_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(LINES)
    with pytest.raises(UserError, match=r"^corpus\.store = s3x://bucket/store: not a URI that pyarrow supports"):
        prepare_store(config_of(tmp_path / "text", "s3x://bucket/store"), Console())
    with pytest.raises(UserError, match=r"^corpus\.store: a URI with credentials") as caught:
        prepare_store(config_of(tmp_path / "text", "s3://key:hidden@bucket/store"), Console())
    assert "hidden" not in str(caught.value)
