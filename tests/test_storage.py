"""Storage: what it must allow before a run starts, and requests whose answers are lost."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import job
from pyarrow import fs

from job import storage
from job.errors import UserError
from job.storage import Folder


class Store:
    """An object store in memory; ``fail`` may raise before, and ``lose`` after a request of a name and a path."""

    def __init__(self) -> None:
        self.inner = fs._MockFileSystem()
        self.inner.create_dir("bucket/runs", recursive=True)
        self.fail: Callable[[str, str], None] = lambda request, path: None
        self.lose: Callable[[str, str], None] = lambda request, path: None

    def __getattr__(self, name: str) -> Any:
        def request(*args: Any, **kwargs: Any) -> Any:
            self.fail(name, args[0])
            if name == "open_output_stream":
                self.inner.create_dir(args[0].rpartition("/")[0], recursive=True)
            answer = getattr(self.inner, name)(*args, **kwargs)
            self.lose(name, args[0])
            return answer

        return request

    @property
    def folder(self) -> Folder:
        return Folder("s3://bucket/runs", retry=True, location=(self, "bucket/runs"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.0, 0.0))
    return Store()


def test_check_writable_leaves_no_file_behind(store: Store, tmp_path: Path) -> None:
    store.folder.check_writable()
    assert store.folder.names() == []
    Folder(str(tmp_path / "new" / "folder")).check_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("request_name", "nth", "expected"),
    [
        ("open_output_stream", 1, "cannot be written to: AWS Error ACCESS_DENIED"),
        ("open_output_stream", 2, "cannot be written to: AWS Error ACCESS_DENIED"),  # write once, read many
        ("delete_file", 1, "files cannot be deleted: AWS Error ACCESS_DENIED"),
    ],
)
def test_check_writable_without_a_permission_raises_user_error(
    store: Store, request_name: str, nth: int, expected: str
) -> None:
    """A storage that did not allow deletion was discovered at the fourth checkpoint."""
    requests = []

    def fail(name: str, path: str) -> None:
        requests.append(name)
        if name == request_name and requests.count(name) == nth:
            raise OSError("AWS Error ACCESS_DENIED during a request")

    store.fail = fail
    with pytest.raises(UserError, match=expected) as error:
        store.folder.check_writable()
    assert error.value.remedy == "grant write access, free space there, or choose another folder"


def test_train_on_storage_without_deletion_starts_no_training(
    prose: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, path: str) -> None:
        if name.startswith("delete"):
            raise OSError("AWS Error ACCESS_DENIED during DeleteObject operation")

    store.fail = fail
    opened = storage._open_location
    monkeypatch.setattr(storage, "_open_location", lambda a: (store, "bucket/runs") if "s3:" in a else opened(a))
    ended = job("train", "--corpus.source", prose, "--run.storage", "s3://b/runs", "--scale.workers", 0)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "files cannot be deleted: AWS Error ACCESS_DENIED" in ended.err
    assert [name[:10] for name in (store.folder / "run-1").names()] == [".writable-"]


@pytest.mark.parametrize("name", ["manifest.json", "step-000010-abcdef"])
def test_remove_of_which_the_answer_is_lost_succeeds(store: Store, name: str) -> None:
    """The retry found nothing to delete, which was an error."""
    folder, inner = store.folder, store.inner
    (folder.write if name.endswith("json") else lambda name, _: inner.create_dir(f"bucket/runs/{name}"))(name, b"")
    lost = ["once"]
    stale = inner.get_file_info(f"bucket/runs/{name}")

    def lose(request: str, path: str) -> None:
        if request.startswith("delete") and lost:
            lost.pop()
            mock.patch.object(store, "get_file_info", lambda path: stale).start()  # from another server of the store
            raise OSError("AWS Error NETWORK_CONNECTION during a request")

    store.lose = lose
    folder.remove(name)
    assert not lost
    assert inner.get_file_info(f"bucket/runs/{name}").type == fs.FileType.NotFound


def test_write_of_which_the_completion_is_repeated_succeeds(store: Store) -> None:
    """The client repeats the last request of an upload that the store has completed already."""
    answers = ["AWS Error NO_SUCH_UPLOAD during CompleteMultipartUpload operation"]

    def lose(request: str, path: str) -> None:
        if request == "open_output_stream" and answers:
            raise OSError(answers.pop())

    store.lose = lose
    store.folder.write("model.safetensors", b"weights")
    assert store.folder.read("model.safetensors") == b"weights"


def test_read_of_a_compressed_file_returns_its_bytes(store: Store) -> None:
    """It is decompressed where the limit of what it may become is checked."""
    data = gzip.compress(b"text")
    store.folder.write("a.txt", data)
    store.inner.move("bucket/runs/a.txt", "bucket/runs/a.txt.gz")
    assert store.folder.read("a.txt.gz") == data


@pytest.mark.parametrize("verb", ["train", "tune", "doctor"])
@pytest.mark.parametrize("uri", ["hdfs://namenode:8020/runs", "viewfs://cluster/runs"])
def test_storage_without_atomic_writes_is_an_error(prose: Path, tmp_path: Path, verb: str, uri: str) -> None:
    """A reader could see half a manifest."""
    config = tmp_path / "config.toml"
    config.write_text("[search.space]\n'optimizer.learning_rate' = {uniform = [0.1, 1]}" if verb == "tune" else "")
    ended = job(verb, config, "--corpus.source", prose, "--run.storage", uri)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f"run.storage = {uri}: HDFS has no atomic writes" in ended.err
