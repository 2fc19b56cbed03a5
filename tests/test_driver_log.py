"""``driver.log``: what a run's driver did, in the run's folder."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import Ended, job
from pyarrow import fs

from job.console import Console
from job.run.driver_log import LOG_FILE, MAX_FILE_BYTES, MAX_RECORD_CHARACTERS, driver_log, last_level
from job.run.lease import Lease, Owner, acquire_lease
from job.storage import Folder
from job.tuning.runs import list_runs

RECORD = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR) (\w+|-) ")
logger = logging.getLogger("job.test")


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[Lease]:
    with acquire_lease(Folder(str(tmp_path / "run"))) as lease:
        yield lease


def stored_folder(tmp_path: Path) -> Folder:
    """A folder that, like one of an object store, cannot append."""
    (tmp_path / "store" / "bucket" / "run").mkdir(parents=True, exist_ok=True)
    store = fs.SubTreeFileSystem(str(tmp_path / "store"), fs.LocalFileSystem())
    return Folder("s3://bucket/run", location=(store, "bucket/run"))


def train(prose: Path, storage: Path, name: str, *words: object) -> Ended:
    small = ["--scale.workers", 0, "--model.hidden_size", 8, "--stream.batch_size", 8, "--generate.prefix", "the"]
    words = (*small, "--corpus.max_tokens", 4000, "--train.epochs", 1, "--train.checkpoint_every", 4, *words)
    return job("train", "--corpus.source", prose, "--run.storage", storage, "--run.name", name, *words)


def test_log_has_time_level_and_attempt_and_what_was_logged_before_it_was_opened(lease: Lease, tmp_path: Path) -> None:
    attempts: list[str] = []
    with driver_log() as log:
        logger.info("before")
        with log.opened(lease, attempts):
            attempts.append("abc123")
            logger.warning("in %s", "attempt")
            logger.debug("too much")
    logger.error("after")
    text = (tmp_path / "run" / LOG_FILE).read_text()
    assert RECORD.findall(text) == [("INFO", "-"), ("WARNING", "abc123")]
    assert RECORD.sub("", text) == "before\nin attempt\n"
    assert last_level(Folder(str(tmp_path / "run"))) == "WARNING"


def test_log_has_no_credentials_and_no_line_that_looks_like_another_record(lease: Lease, tmp_path: Path) -> None:
    forged = "2026-01-01T00:00:00.000Z ERROR - forged"
    with driver_log() as log, log.opened(lease, []):
        logger.warning("s3://key:secret@bucket/x \x1b[2J\r\n%s\x85%s\r%s", forged, forged, forged)
    text = (tmp_path / "run" / LOG_FILE).read_bytes().decode()
    assert "s3://***@bucket/x \\x1b[2J" in text
    assert text.replace("\n", "").isprintable()
    assert sum(bool(RECORD.match(line)) for line in text.split("\n")) == 1
    assert last_level(Folder(str(tmp_path / "run"))) == "WARNING"


def test_log_of_any_length_has_a_bounded_size(lease: Lease, tmp_path: Path) -> None:
    with driver_log() as log, log.opened(lease, []):
        for _ in range(300):
            logger.info("x" * 2 * MAX_RECORD_CHARACTERS)
    sizes = [path.stat().st_size for path in (tmp_path / "run").glob("driver.log*")]
    assert len(sizes) == 2
    assert 0.9 * MAX_FILE_BYTES < max(sizes) <= MAX_FILE_BYTES


def test_log_after_takeover_is_not_written(lease: Lease, tmp_path: Path) -> None:
    with driver_log() as log, log.opened(lease, []):
        logger.info("mine")
        owner = json.loads((tmp_path / "run" / "owner.json").read_text())
        (tmp_path / "run" / "owner.json").write_text(json.dumps({**owner, "token": "of the new owner"}))
        logger.info("too late")
    assert (tmp_path / "run" / LOG_FILE).read_text().count("\n") == 1


def test_log_that_cannot_be_written_does_not_end_the_block(
    lease: Lease, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / LOG_FILE).mkdir()
    with driver_log() as log, log.opened(lease, []):
        logger.info("lost")
        logger.info("not a number: %d", "x")
    assert capsys.readouterr() == ("", "")


def test_train_on_full_disk_for_its_log_gives_the_result(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("job.run.driver_log._File._open", fail)
    ended = train(prose, tmp_path, "run")
    assert (ended.status, ended.err) == (0, "")


def test_driver_log_leaves_the_logging_of_the_process_as_it_was(
    lease: Lease, capsys: pytest.CaptureFixture[str]
) -> None:
    root, package = logging.getLogger(), logging.getLogger("job")
    handler = logging.StreamHandler(sys.stderr)
    root.addHandler(handler)
    try:
        before = (package.level, package.propagate, list(package.handlers))
        with pytest.raises(ValueError, match="no"), driver_log() as log, log.opened(lease, []):
            Console(sys.stdout).warn("shown")
            raise ValueError("no")
        assert (package.level, package.propagate, package.handlers) == before
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr() == ("warning: shown\n", "")


def test_warning_without_a_run_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python prints the warnings of a logger without a handler on standard error."""
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # pytest's handlers
        logging.getLogger("other").warning("shown")
        logger.warning("not shown")
    assert capsys.readouterr() == ("", "shown\n")


def test_log_on_storage_that_cannot_append_is_uploaded_and_continued_by_the_next_driver(tmp_path: Path) -> None:
    folder, path = stored_folder(tmp_path), tmp_path / "store" / "bucket" / "run" / LOG_FILE
    for message in ("first", "second"):
        with acquire_lease(folder) as lease, driver_log() as log, log.opened(lease, []):
            logger.info(message)
            assert path.exists() == (message == "second")
            log.sync()
            assert path.read_text().endswith(f"{message}\n")
            logger.info("end of %s", message)
    assert [line.split(" - ")[1] for line in path.read_text().splitlines()] == [
        "first", "end of first", "second", "end of second",
    ]  # fmt: skip
    assert {path.name for path in path.parent.iterdir()} == {LOG_FILE}


def test_log_on_storage_that_is_lost_does_not_end_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []

    def lose(*_: object) -> None:
        uploads.append(1)
        raise OSError("the storage is lost")

    with acquire_lease(stored_folder(tmp_path)) as lease, driver_log() as log, log.opened(lease, []):
        monkeypatch.setattr(Folder, "upload", lose)
        logger.info("lost")
        log.sync()
        assert uploads


def test_train_logs_its_events_and_the_next_driver_appends(prose: Path, tmp_path: Path) -> None:
    first = train(prose, tmp_path, "run", "--train.max_steps", 5)
    assert (first.status, first.err) == (0, "")
    train(prose, tmp_path, "run")
    text = (tmp_path / "run" / LOG_FILE).read_text()
    assert all(RECORD.match(line) for line in text.splitlines())
    attempts = [path.name.partition("-")[2].partition("-")[2] for path in (tmp_path / "run" / "checkpoints").iterdir()]
    for part in (
        "configuration run.name = ", "model.hidden_size = 8", "workers = 1 on cpu", "committed step-000004-",
        "removing step-000004-", "resuming from step 5 of", "finished: {'perplexity': ", "8 lanes × 40 steps",
    ):  # fmt: skip
        assert part in text
    assert f"INFO {attempts[-1]} finished: " in text
    assert text.count(" process ") == 2


def test_train_after_a_driver_died_logs_the_takeover_and_skipped_checkpoints(prose: Path, tmp_path: Path) -> None:
    assert train(prose, tmp_path, "run", "--train.max_steps", 9).status == 0
    owner = replace(Owner.this_process(), pid=2**22 + 1)
    (tmp_path / "run" / "owner.json").write_text(json.dumps(asdict(owner)))
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    (last / "model.safetensors").write_bytes(b"x")
    assert train(prose, tmp_path, "run").status == 0
    text = (tmp_path / "run" / LOG_FILE).read_text()
    assert f"WARNING - took the run over from process {owner.pid} on {owner.host}\n" in text
    assert re.search(rf"WARNING \w+ .*{last.name}: model.safetensors is truncated", text)


def test_retry_of_a_request_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flaky:
        errors: ClassVar[list[str]] = ["slow down: s3://key:secret@bucket"]

        def get_file_info(self, path: str) -> fs.FileInfo:
            if self.errors:
                raise OSError(self.errors.pop())
            return fs.FileInfo(path, fs.FileType.File)

    monkeypatch.setattr("time.sleep", lambda _: None)
    with acquire_lease(Folder(str(tmp_path))) as lease, driver_log() as log, log.opened(lease, []):
        assert Folder("s3://bucket/run", retry=True, location=(Flaky(), "bucket/run")).exists()
    text = (tmp_path / LOG_FILE).read_text()
    assert "WARNING - exists of s3://bucket/run failed and is retried: slow down: s3://***@bucket\n" in text


def test_train_that_fails_logs_the_error_with_its_traceback(prose: Path, tmp_path: Path) -> None:
    ended = train(prose, tmp_path, "run", "--model.cell", "cells:RaisingCell")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    *_, error = re.split(r"(?m)^(?=20)", (tmp_path / "run" / LOG_FILE).read_text())
    assert RECORD.match(error)
    assert " ERROR " in error
    assert 'cells.py", line ' in error
    assert "ValueError: no more" in error
    assert [run.state for run in list_runs(Folder(str(tmp_path)))] == ["failed"]
    (tmp_path / "run" / LOG_FILE).unlink()
    assert [run.state for run in list_runs(Folder(str(tmp_path)))] == ["stopped"]
