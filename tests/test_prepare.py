"""Preparing a token store piece by piece: the same tokens as in memory, and the same bytes after any interruption."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pieces import files

from job.config.config_file import load_config
from job.config.schema import Config
from job.console import Console
from job.data import piece_encoder
from job.data import pieces as pieces_module
from job.data.corpus import has_token, read_corpus
from job.data.dataset import encode_corpus
from job.data.token_store import StoredTokens, open_stored
from job.data.tokens import count_unknown
from job.errors import UserError
from job.inference.evaluate import count_target_characters
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
)  # fmt: skip
def test_store_of_pieces_equals_the_corpus_in_memory(
    tmp_path_factory: pytest.TempPathFactory, kind: str, contents: list[tuple[str, bytes]], piece_bytes: int,
    shard: int, cleaning: str, separator: bool, scope: str, max_tokens: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "texts").mkdir()
    for number, (suffix, data) in enumerate(contents):
        (folder / "texts" / f"{number}{suffix}").write_bytes(data)
    flags = {"corpus__cleaning": cleaning, "corpus__separator": separator, "corpus__max_tokens": max_tokens}
    flags |= {"vocabulary__kind": kind.split(maxsplit=1)[0], "vocabulary__end_of_line": "line" in kind}
    flags |= {"vocabulary__size": 280} if kind == "bpe" else {"vocabulary__scope": scope}
    values = {name: str(value).lower() for name, value in flags.items()}
    config = config_of(folder / "texts", folder / "store", corpus__validation_fraction=0.3, **values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE_BYTES", piece_bytes)
        patch.setattr(piece_encoder, "SHARD_CHARACTERS", shard)
        try:
            corpus = read_corpus(config.corpus, config.vocabulary.kind)
            vocabulary, tokens = encode_corpus(corpus, config.corpus, config.vocabulary)
            if not has_token(corpus.documents[0], config.vocabulary.kind) or len(tokens) < 2:
                raise UserError("too few")
        except UserError:
            with pytest.raises(UserError, match=r"contains no text|tokens; give more text"):
                prepare_store(config, Console())
            assert {path.name for path in (folder / "store").iterdir()} == {".lock"}
            return
        assert prepare_store(config, Console()) == 0
    found = stored(config)
    assert found.vocabulary == vocabulary
    np.testing.assert_array_equal(np.asarray(found.tokens), tokens)
    assert found.num_characters == corpus.num_characters
    assert found.target_characters == count_target_characters(corpus, vocabulary, tokens[1:])
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
