"""Token stores that are damaged, changed, incomplete, or contradict the configuration."""

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import job
from token_stores import (
    TEXT,
    prepare,
    refused,
    run,
    shards_of,
    words,
)

from job.data.tokens import ShardedTokens
from job.errors import UserError
from job.storage import Folder

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("name", ["corpus.max_tokens", "corpus.validation_fraction"])
def test_store_whose_vocabulary_is_of_the_training_part_fixes_that_part(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").write_text(TEXT)
    store = prepare(tmp_path, tmp_path / "text", vocabulary__scope="training")
    run(tmp_path, "same", corpus__source=store)
    value = {"corpus.max_tokens": 900, "corpus.validation_fraction": 0.5}[name]
    assert f"{name} = {value}, and the store was made with" in refused(
        "train", *words(corpus__source=store), f"--{name}", value
    )
