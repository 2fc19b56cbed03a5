"""Large texts, which runs prepare as token stores in the folder of caches: the same bits as from memory."""

import fcntl
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import full_disk, job, search_config
from token_stores import FLAGS, TEXT, json_lines, run, words

from job.config.config_file import load_config
from job.config.schema import Config
from job.console import Console
from job.data.tokens import ShardedTokens
from job.errors import UserError
from job.run import text_cache
from job.run.prepare import Preparation
from job.run.setup import build_run_spec
from job.run.text_cache import TextCache
from job.storage import Folder
from job.training.run_spec import RunSpec
from job.tuning.setup import check_search

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stores of the cache, which short texts become, each of several shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("job.data.pieces.PIECE_BYTES", 100)
    monkeypatch.setattr(text_cache, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "text").write_text(TEXT)
    return tmp_path / "cache" / "lanes" / "stores"


def load(source: object, **flags: object) -> Config:
    values = {**FLAGS, "corpus.source": source, **{name.replace("__", "."): value for name, value in flags.items()}}
    return load_config(None, {name: str(value) for name, value in values.items()})


def spec_of(tmp_path: Path, source: object, is_local: bool | None = True, **flags: Any) -> RunSpec:
    """The specification of a run; None: without a cache."""
    cache = None if is_local is None else TextCache(Console(io.StringIO()), is_local)
    return build_run_spec(load(source, **flags), Folder(str(tmp_path / "run")), cache=cache)


def tokens_of(spec: RunSpec) -> list[np.ndarray]:
    return [np.asarray(part) for part in (spec.dataset.train_tokens, spec.dataset.validation_tokens)]


def forbid_preparing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> str:
        raise AssertionError("it was prepared again")

    monkeypatch.setattr(Preparation, "run", run)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"corpus__max_tokens": 300, "corpus__cleaning": "d2l"},
        {"corpus__validation_fraction": 0, "corpus__newlines": "normalize"},
        {"vocabulary__scope": "training", "corpus__max_tokens": 350},
    ],
)
@pytest.mark.parametrize("has_documents", [False, True])
def test_large_text_is_prepared_once_to_the_dataset_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, flags: dict[str, Any], has_documents: bool
) -> None:
    text = TEXT + "a b rare zebra\n"  # for vocabulary.scope = training
    (tmp_path / "text").write_text(text)
    source = json_lines(tmp_path / "a.jsonl", text.split("\r\n")) if has_documents else tmp_path / "text"
    if kind == "bpe":
        flags = {**flags, "vocabulary__size": 280, "vocabulary__scope": "corpus"}
    elif kind == "byte":  # which keeps line ends
        flags = {**flags, "corpus__newlines": "keep"}
    flags = {**flags, "vocabulary__kind": kind}
    expected = spec_of(tmp_path, source, is_local=None, **flags)
    first = spec_of(tmp_path, source, **flags)
    forbid_preparing(monkeypatch)
    sent = pickle.dumps(spec_of(tmp_path, source, **flags).dataset)
    assert len(sent) < 5000 + 20 * len(expected.dataset.vocabulary)
    for dataset in (first.dataset, pickle.loads(sent)):
        assert isinstance(dataset.train_tokens, ShardedTokens) and len(dataset.train_tokens.shards.names) > 1
        assert dataset.vocabulary == expected.dataset.vocabulary
        assert dataset.metadata == expected.dataset.metadata
        assert dataset.unknown_shares == expected.dataset.unknown_shares
        assert dataset.validation_size == expected.dataset.validation_size
    assert first.config == expected.config
    for found, tokens in zip(tokens_of(first), tokens_of(expected), strict=True):
        np.testing.assert_array_equal(found, tokens)


@pytest.mark.parametrize("is_first_large", [False, True])
def test_run_resumes_when_its_text_is_cached_or_no_longer_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first_large: bool
) -> None:
    source = tmp_path / "text"
    monkeypatch.setattr(text_cache, "MAX_TEXT_BYTES", 1 << 20)
    whole = run(tmp_path, "whole", corpus__source=source, train__max_steps=12)
    evaluated = job("evaluate", tmp_path / "runs" / "whole", "--corpus.source", source).out
    for steps, is_large in ((7, is_first_large), (12, not is_first_large)):
        monkeypatch.setattr(text_cache, "MAX_TEXT_BYTES", 1000 if is_large else 1 << 20)
        resumed = run(tmp_path, "cut", corpus__source=source, train__max_steps=steps)
    changed = dict.fromkeys(("seconds", "checkpoint", "best_checkpoint", "restarts"))
    assert {**resumed, **changed} == {**whole, **changed}
    monkeypatch.setattr(text_cache, "MAX_TEXT_BYTES", 1000)
    assert job("evaluate", tmp_path / "runs" / "whole", "--corpus.source", source).out == evaluated


def test_evaluation_of_a_large_text_with_unknown_words_equals_that_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: Path
) -> None:
    run(tmp_path, "it", corpus__source=tmp_path / "text", vocabulary__kind="word", corpus__validation_fraction=0)
    (tmp_path / "other").write_text("what the unknown machine was\n" * 100)
    (words,) = stores.iterdir()
    evaluate = ("evaluate", tmp_path / "runs" / "it", "--corpus.source", tmp_path / "other", "--json")
    for more in ((), ("--corpus.max_tokens", 40)):
        large = job(*evaluate, *more)
        with monkeypatch.context() as patch:
            patch.setattr(text_cache, "MAX_TEXT_BYTES", 1 << 20)
            assert json.loads(large.out) == json.loads(job(*evaluate, *more).out)
    assert len([*stores.iterdir()]) == 3 and words.exists()


def test_large_validation_source_is_prepared_with_the_vocabulary_of_the_training_text(
    tmp_path: Path, stores: Path
) -> None:
    (tmp_path / "other").write_text("what the unknown machine was\n" * 100)
    flags: dict[str, Any] = {"corpus__validation_fraction": 0, "corpus__validation_source": tmp_path / "other"}
    flags |= {"corpus__max_tokens": 1500}
    expected, found = (spec_of(tmp_path, tmp_path / "text", is_local, **flags) for is_local in (None, True))
    assert isinstance(found.dataset.validation_tokens, ShardedTokens) and len([*stores.iterdir()]) == 2
    assert found.dataset.metadata == expected.dataset.metadata
    np.testing.assert_array_equal(tokens_of(found)[1], tokens_of(expected)[1])
    (tmp_path / "other").write_bytes(b"\xff" * 2000)
    with pytest.raises(UserError, match=r"^corpus\.validation_source = .*not UTF-8 at byte 0"):
        spec_of(tmp_path, tmp_path / "text", **flags)


def test_text_that_changed_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    text = tmp_path / "text"
    spec_of(tmp_path, text)
    status = text.stat()
    text.write_text(TEXT.swapcase())
    os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same size and the same time
    found, expected = spec_of(tmp_path, text), spec_of(tmp_path, text, is_local=None)
    assert found.dataset.metadata == expected.dataset.metadata


@pytest.mark.parametrize("name", ["tokens-00001.bin", "vocabulary.json", "manifest.json"])
def test_damaged_store_of_the_cache_is_prepared_again(tmp_path: Path, stores: Path, name: str) -> None:
    expected = spec_of(tmp_path, tmp_path / "text").dataset
    (store,) = stores.iterdir()
    data = (store / name).read_bytes()
    (store / name).write_bytes(bytes(len(data)))
    dataset = spec_of(tmp_path, tmp_path / "text").dataset
    assert dataset.metadata == expected.metadata and (store / name).read_bytes() == data


def test_preparing_for_a_run_that_is_interrupted_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: Path
) -> None:
    calls: list[Any] = []

    def interrupted(function: Any, tasks: Any) -> Any:
        calls.append(function)
        for number, task in enumerate(tasks):
            if len(calls) == 2 and number == 3:  # all pieces were counted before
                raise KeyboardInterrupt
            yield function(*task)

    with monkeypatch.context() as patch:
        patch.setattr(text_cache, "run_in_process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            spec_of(tmp_path, tmp_path / "text")
    (store,) = stores.iterdir()
    num_receipts = len([*store.glob(".receipt-*")])
    written = {path: path.stat().st_mtime_ns for path in store.glob("tokens-*")}
    assert num_receipts == 3 and not (store / "manifest.json").exists()
    dataset, expected = (spec_of(tmp_path, tmp_path / "text", is_local).dataset for is_local in (True, None))
    assert dataset.metadata == expected.metadata
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


@pytest.mark.parametrize("name", ["owner.json", "vocabulary.json", "tokens-00001.bin", ".tokens.sha256"])
def test_cache_on_a_full_disk_is_one_error_that_names_the_variable_of_another_folder(
    tmp_path: Path, stores: Path, name: str
) -> None:
    with full_disk(name):
        ended = job("train", *words(corpus__source=tmp_path / "text", run__storage=tmp_path / "runs"))
    assert ended.status == 2 and ended.err.count("\n") == 1
    remedy = "No space left on device; free space there, or set XDG_CACHE_HOME to another folder\n"
    assert ended.err.startswith("error: ") and ended.err.endswith(remedy)
    assert (str(stores) in ended.err) == (name != ".tokens.sha256")
    assert spec_of(tmp_path, tmp_path / "text").dataset.metadata


def test_run_waits_for_another_one_that_prepares_the_same_text(tmp_path: Path, stores: Path) -> None:
    spec_of(tmp_path, tmp_path / "text")
    (store,) = stores.iterdir()
    lock = (store / text_cache._LOCK).open()
    fcntl.flock(lock, fcntl.LOCK_EX)
    lines: list[str] = []

    class Releasing(Console):
        def print(self, text: str = "", *, wrap: bool = True) -> None:
            lines.append(text)
            lock.close()

    cache = TextCache(Releasing(io.StringIO()), is_local=True)
    build_run_spec(load(tmp_path / "text"), Folder(str(tmp_path / "run")), cache=cache)
    assert lines == ["waiting for another process that prepares the same text"]


def test_store_that_no_run_has_opened_for_a_month_is_removed(tmp_path: Path, stores: Path) -> None:
    for kind in ("char", "byte"):
        spec_of(tmp_path, tmp_path / "text", vocabulary__kind=kind)
    old, other = sorted(stores.iterdir())
    for store in (old, other):
        os.utime(store, (0, 0))
    spec_of(tmp_path, tmp_path / "text", vocabulary__kind=json.loads((other / "manifest.json").read_text())["content"]
            ["settings"]["vocabulary.kind"])  # fmt: skip
    spec_of(tmp_path, tmp_path / "text", vocabulary__kind="word")
    assert not old.exists() and other.exists() and len([*stores.iterdir()]) == 2


def test_large_text_for_workers_on_other_machines_is_sent_or_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: Path
) -> None:
    text = tmp_path / "text"
    assert isinstance(spec_of(tmp_path, text, is_local=False).dataset.train_tokens, np.ndarray)
    monkeypatch.setattr(text_cache, "MAX_SENT_BYTES", 2000)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ended = job("train", *words(corpus__source=text, run__storage=tmp_path / "runs", scale__workers=2))
    assert ended.status == 2 and ended.err == (
        f"error: corpus.source = {text}: 2 KiB are too large to send to the nodes; write a token store into a folder "
        "that all nodes share: python -m job prepare … --corpus.store FOLDER\n"
    )
    assert not stores.exists()
    run(tmp_path, "here", corpus__source=text)  # without workers
    assert [*stores.iterdir()]


def test_search_prepares_a_large_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: Path) -> None:
    config, search = load(tmp_path / "text"), search_config(space={"model.hidden_size": {"grid": [4, 8]}})
    cache = TextCache(Console(io.StringIO()), is_local=True)
    base = check_search(config, search, Folder(str(tmp_path / "search")), cache.console, cache)
    forbid_preparing(monkeypatch)
    trial = build_run_spec(base, Folder(str(tmp_path / "trial")), cache=cache)
    assert isinstance(trial.dataset.train_tokens, ShardedTokens) and len([*stores.iterdir()]) == 1


def test_text_that_cannot_be_read_leaves_no_store(tmp_path: Path, stores: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff" * 2000)
    with pytest.raises(UserError, match=rf"^corpus\.source = {tmp_path}/text: not UTF-8 at byte 0"):
        spec_of(tmp_path, tmp_path / "text")
    assert not [*stores.glob("*/tokens*"), *stores.glob("*/*.json")]
