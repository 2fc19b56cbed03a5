"""Faults and old data: interrupted writes, full disks, object stores, killed drivers, format 1, memory."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from chaos import CAN_MOUNT
from conftest import ROOT, job, not_none, result, rows, start_job
from object_store import bucket_address, run_takeover, s3_server

from job import storage
from job.cluster.event_channel import EventChannel
from job.run.run_dir import open_checkpoint, read_result
from job.storage import Folder
from job.training.checkpoint import (
    FileContents,
    checkpoint_name,
    commit_checkpoint,
    discard_after,
    find_latest_valid,
    list_checkpoints,
    load_lane_state,
    remove_checkpoint,
    weights_sha256,
    write_part,
)
from job.training.progress import Progress

GOLDEN = ROOT / "tests" / "golden" / "format-1" / "step-000030-901de0"
GOLDEN_WEIGHTS = "dc1bf71977736643653bbf855d05319b50205fb73b268713437b8096619f42a6"


def flags(prose: Path, storage: Path | str, *more: object) -> list[object]:
    return [
        "train", "--corpus.source", prose, "--run.storage", storage, "--run.name", "run", "--scale.workers", 0,
        "--model.hidden_size", 16, "--stream.num_steps", 20, "--generate.prefix", "the", "--train.epochs", 2, *more,
    ]  # fmt: skip


# --- every write in turn ---


class ProcessKiller:
    """Ends the process at the n-th file operation; if that is a write, in the middle of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.num_left = last
        for name in ("replace", "fsync"):
            monkeypatch.setattr(os, name, self._before(getattr(os, name)))
        monkeypatch.setattr(Path, "mkdir", self._before(Path.mkdir))
        monkeypatch.setattr(shutil, "rmtree", self._before(shutil.rmtree))
        monkeypatch.setattr(Path, "unlink", self._before(Path.unlink))
        monkeypatch.setattr(storage, "open", self._open, raising=False)

    def must_die(self) -> bool:
        self.num_left -= 1
        return self.num_left < 0

    def _before(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def killed_before(*args: Any, **kwargs: Any) -> Any:
            if self.must_die():
                os._exit(9)
            return action(*args, **kwargs)

        return killed_before

    def _open(self, *args: Any) -> "TornFile":
        if self.must_die():
            os._exit(9)
        return TornFile(self, open(*args))


class TornFile:
    """A file of which a write may end halfway."""

    def __init__(self, killer: ProcessKiller, file: Any) -> None:
        self.killer, self.file = killer, file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        if self.killer.must_die():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os._exit(9)
        return self.file.write(data)


def write_checkpoint(folder: Folder, step: int, attempt: str) -> None:
    """Writes and commits as driver and worker do, including the removal of other checkpoints before and after."""
    discard_after(folder, step - 10, attempt)
    name = checkpoint_name(step, attempt)
    files: FileContents = {path.name: [path.read_bytes()] for path in GOLDEN.iterdir() if path.name != "manifest.json"}
    receipt = write_part(folder, name, files, 1, Progress(step=step))
    commit_checkpoint(folder, name, [receipt])
    for old in list_checkpoints(folder)[0][:-2]:
        remove_checkpoint(folder, old.name)


def exit_status_of_fork(action: Callable[[], object]) -> int:
    """Runs the action in a forked process."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_checkpoint_write_killed_at_any_file_operation_leaves_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = 0
    for last in range(200):
        folder = Folder(str(tmp_path / str(last)))
        for step in (10, 20):
            write_checkpoint(folder, step, "aaaaaa")
        with monkeypatch.context() as patch:

            def interrupted(last: int = last, folder: Folder = folder, patch: pytest.MonkeyPatch = patch) -> None:
                ProcessKiller(patch, last)
                write_checkpoint(folder, 30, "bbbbbb")

            status = exit_status_of_fork(interrupted)
        assert status in (0, 9)
        checkpoint, skipped = find_latest_valid(folder)
        step = not_none(checkpoint).step
        assert step in (20, 30)
        assert skipped == ()  # what is not whole is not even taken for a checkpoint
        write_checkpoint(folder, step + 10, "cccccc")
        names = [checkpoint.name for checkpoint in list_checkpoints(folder)[0]]
        assert names[-1] == checkpoint_name(step + 10, "cccccc")
        leftovers = {path.name for path in Path(folder.address).iterdir()} - set(names)
        assert not leftovers
        if status == 0:
            break
        cuts += 1
    assert 15 < cuts < 199


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted disk of 700 KiB."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("only root can mount a disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine mounts no tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_train_on_full_disk_fails_and_resumes_once_there_is_space(
    prose: Path, tmp_path: Path, small_disk: Path
) -> None:
    more = ["--model.hidden_size", 64, "--train.checkpoint_every", 4, "--train.keep_checkpoints", 30]
    ended = job(*flags(prose, small_disk, *more))
    assert ended.status == 1
    assert "No space left" in ended.err
    assert "saved at step" in ended.err
    assert ended.err.count("\n") == 1
    checkpoint, _ = find_latest_valid(Folder(str(small_disk / "run" / "checkpoints")))
    assert checkpoint
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    again = job(*flags(prose, small_disk, *more))
    assert f"resuming from step {checkpoint.step} of" in again.out
    assert again.status == 0, again.err
    assert job(*flags(prose, tmp_path / "calm", *more)).status == 0
    assert result(small_disk / "run")["weights_sha256"] == result(tmp_path / "calm" / "run")["weights_sha256"]


def test_train_on_disk_that_is_full_before_the_run_starts_nothing(prose: Path, small_disk: Path) -> None:
    """Empty files could still be written, so the check of the storage passed, and the run failed with OSError."""
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    ended = job(*flags(prose, small_disk))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "run: cannot be written to: No space left on device; grant write access, free space there" in ended.err
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


# --- object stores ---


@pytest.fixture(scope="module")
def bucket() -> Iterator[Callable[[str], str]]:
    """A function that gives the address of a path in a bucket on a local S3 server."""
    pytest.importorskip("moto")
    with s3_server() as port:
        yield lambda path: bucket_address(port, path)


@pytest.mark.long
@pytest.mark.skipif(not CAN_MOUNT, reason="this machine allows no namespaces")
def test_driver_replaced_while_its_object_store_is_slow_writes_nothing_more(prose: Path, tmp_path: Path) -> None:
    """The second driver, in another PID namespace, waits for the end of the lease."""
    pytest.importorskip("moto")
    more = ["--train.log_every", 1, "--train.checkpoint_every", 20, "--train.max_steps", 400]
    words = ["--corpus.source", prose, "--generate.prefix", "the", "--model.hidden_size", 16, *more]
    run_takeover([str(word) for word in words], tmp_path)


@pytest.mark.slow
def test_train_on_object_store_gives_same_result_as_on_disk(
    bucket: Callable[[str], str], prose: Path, tmp_path: Path
) -> None:
    more = ["--train.log_every", 5, "--train.checkpoint_every", 10]
    assert job(*flags(prose, tmp_path, *more)).status == 0
    stopped = job(*flags(prose, bucket("runs"), *more, "--train.max_steps", 33))
    assert stopped.status == 0, stopped.err
    ended = job(*flags(prose, bucket("runs"), *more))
    assert ended.status == 0, ended.err
    assert "resuming from step 33" in ended.out
    folder = Folder.resolve(bucket("runs")) / "run"
    found, expected = not_none(read_result(folder)), result(tmp_path / "run")
    assert found["weights_sha256"] == expected["weights_sha256"]
    losses = [json.loads(line) for line in folder.read("metrics.jsonl").splitlines()]
    assert [(row["step"], row["nats"]) for row in losses if row["split"] == "train"] == [
        (row["step"], row["nats"]) for row in rows(tmp_path / "run", "train")
    ]
    assert job("generate", folder.address).out == expected["generated"] + "\n"


@pytest.mark.slow
def test_train_after_killed_driver_resumes_and_loses_nothing(prose: Path, tmp_path: Path) -> None:
    """A second driver is refused while the first is alive."""
    more = ["--train.epochs", 12, "--train.log_every", 1, "--train.checkpoint_every", 7]
    words = flags(prose, tmp_path, *more)
    first = start_job(*words)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("run/checkpoints/*/manifest.json"))) < 3:
        assert time.monotonic() < until
        time.sleep(0.02)
    refused = job(*words)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "this run is in use" in refused.err
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = job(*words)
    assert again.status == 0, again.err
    assert "resuming from step" in again.out
    assert job(*flags(prose, tmp_path / "calm", *more)).status == 0
    assert result(tmp_path / "run")["weights_sha256"] == result(tmp_path / "calm" / "run")["weights_sha256"]
    found, expected = (rows(storage / "run", "train") for storage in (tmp_path, tmp_path / "calm"))
    assert [(row["step"], row["nats"]) for row in found] == [(row["step"], row["nats"]) for row in expected]


# --- formats and memory ---


def test_open_checkpoint_reads_golden_format_1() -> None:
    """Its weights and the text that they generate are those of the version that wrote it."""
    ended = job("generate", GOLDEN, "--generate.prefix", "the", "--generate.length", 20)
    assert ended.status == 0, ended.err
    assert ended.out == (GOLDEN.parent / "expected_output.txt").read_text()
    loaded = open_checkpoint(Folder(str(GOLDEN)))
    assert weights_sha256(loaded.weights) == GOLDEN_WEIGHTS
    assert (loaded.checkpoint.step, loaded.progress.step, loaded.progress.window) == (30, 30, 30)
    state = load_lane_state(loaded.checkpoint, range(3, 7))
    assert isinstance(state, tuple)
    hidden, memory = state
    assert hidden.shape == memory.shape == (1, 4, 8)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_train_memory_does_not_grow(prose: Path, tmp_path: Path) -> None:
    """In the second half of 10,000 steps the resident size stays within 4 MiB."""
    words = flags(prose, tmp_path, "--stream.num_steps", 4, "--train.epochs", 1000, "--train.max_steps", 10_000)
    process = start_job(*words, "--train.log_every", 1)
    sizes = {}
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            lines = metrics.read_bytes().splitlines()
            resident = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
            sizes[json.loads(lines[-1])["step"]] = int(resident) * os.sysconf("SC_PAGE_SIZE")
        time.sleep(0.2)
    assert process.returncode == 0
    second_half = [size for step, size in sizes.items() if 5000 <= step < 10_000]  # the curve is drawn at the end
    assert len(second_half) > 10
    assert max(second_half) - min(second_half) < 4 << 20, second_half


def test_discard_after_keeps_parts_of_the_new_attempt(tmp_path: Path) -> None:
    """The driver handles a Started event late; the first parts may be written by then."""
    folder = Folder(str(tmp_path))
    write_checkpoint(folder, 10, "aaaaaa")
    for attempt in ("aaaaaa", "bbbbbb"):
        (folder / checkpoint_name(20, attempt)).write("model.safetensors", b"a part")
    discard_after(folder, 10, "bbbbbb")
    assert folder.names() == ["step-000010-aaaaaa", "step-000020-bbbbbb"]


def test_train_with_nan_weights_after_last_step_fails(prose: Path, tmp_path: Path) -> None:
    ended = job(
        *flags(
            prose, tmp_path, "--train.max_steps", 1, "--optimizer.learning_rate", 1e38, "--optimizer.weight_decay", 1e3
        )
    )
    assert ended.status == 1
    assert "no longer finite" in ended.err


class FlakyFileSystem:
    """Raises the given errors before it answers."""

    def __init__(self, *errors: object) -> None:
        self.errors = list(errors)

    def get_file_info(self, _: object) -> SimpleNamespace:
        if self.errors:
            raise OSError(self.errors.pop(0))
        return SimpleNamespace(type="File")


def test_folder_retries_temporary_errors_of_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.0, 0.0))
    busy = "When getting information: AWS Error SLOW_DOWN during HeadObject operation"
    cases = [(True, [busy] * 2, ""), (True, [busy] * 3, "SLOW_DOWN"), (False, [busy], "SLOW_DOWN")]
    for retry, errors, expected in [*cases, (True, ["AWS Error ACCESS_DENIED"], "ACCESS_DENIED")]:
        folder = Folder("s3://bucket/runs", retry, (FlakyFileSystem(*errors), "bucket/runs"))
        if expected:
            with pytest.raises(OSError, match=expected):
                (folder / "run").has("manifest.json")
        else:
            assert (folder / "run").has("manifest.json")


def new_channel() -> Any:
    """An event channel in this process; Ray keeps the class of an actor there."""
    actor: Any = EventChannel
    return actor.__ray_metadata__.modified_class()


def test_event_channel_orders_events_of_one_worker() -> None:
    """Ray may reorder calls to an async actor, and repeat one whose reply was lost."""
    import asyncio

    async def post_out_of_order() -> list[bytes]:
        channel = new_channel()
        for number in (1, 0, 0, 3, 1, 2):
            await channel.post("worker", number, bytes([number]))
        return await channel.poll_events(1.0)

    assert asyncio.run(post_out_of_order()) == [b"\0", b"\1", b"\2", b"\3"]


def test_event_channel_of_long_run_has_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each restart adds workers, and a worker that was killed may leave a gap in the numbers of its events."""
    import asyncio

    monkeypatch.setattr("job.cluster.event_channel.MAX_SENDERS", 4)

    async def restart_often() -> Any:
        channel = new_channel()
        for attempt in range(100):
            await channel.post(f"worker {attempt}", 0, b"first")
            await channel.post(f"worker {attempt}", 2, b"third")
            await channel.post("controller", attempt, b"ended")
            await channel.request(checkpoint=True)
            assert await channel.wait_for_requests((attempt, 0)) == (attempt + 1, 0)
            await channel.poll_events(1.0)
        return channel

    monkeypatch.setattr("job.cluster.event_channel.BATCH_DELAY_S", 0)
    assert len(pickle.dumps(asyncio.run(restart_often()).senders)) < 1000


def test_event_channel_request_reaches_worker_that_starts_later() -> None:
    import asyncio

    async def request_first() -> None:
        channel = new_channel()
        await channel.request(stop=True)
        assert await channel.wait_for_requests((0, 0)) == (0, 1)
        waiting = asyncio.create_task(channel.wait_for_requests((0, 1)))
        await asyncio.sleep(0)
        assert not waiting.done()
        await channel.request(checkpoint=True)
        assert await waiting == (1, 1)

    asyncio.run(request_first())
