"""What survives: writes that are cut off, full disks, object stores, second drivers, old formats."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, job, result, rows, start_job

from job import storage
from job.cluster.event_channel import EventChannel
from job.errors import RunFailed, UserError
from job.run import lease
from job.run.run_dir import open_checkpoint, read_result
from job.storage import Folder
from job.training.checkpoint import (
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


def flags(prose, place, *more):
    return [
        "train", "--corpus.source", prose, "--run.storage", place, "--run.name", "run", "--scale.workers", 0,
        "--model.hidden_size", 16, "--stream.num_steps", 20, "--generate.prefix", "the", "--train.epochs", 2, *more,
    ]  # fmt: skip


# --- every write in turn ---


class Cut:
    """Ends the process at the n-th operation on the file system, in the middle of it where it is a write."""

    def __init__(self, monkeypatch, last: int) -> None:
        self.left = last
        for name in ("replace", "fsync"):
            monkeypatch.setattr(storage.os, name, self._before(getattr(os, name)))
        monkeypatch.setattr(storage.Path, "mkdir", self._before(Path.mkdir))
        monkeypatch.setattr(storage.shutil, "rmtree", self._before(shutil.rmtree))
        monkeypatch.setattr(storage.Path, "unlink", self._before(Path.unlink))
        monkeypatch.setattr(storage, "open", self._open, raising=False)

    def count(self) -> bool:
        self.left -= 1
        return self.left < 0

    def _before(self, action):
        def cut(*args, **kwargs):
            if self.count():
                os._exit(9)
            return action(*args, **kwargs)

        return cut

    def _open(self, *args):
        if self.count():
            os._exit(9)
        return Torn(self, open(*args))


class Torn:
    """A file whose writing may end halfway."""

    def __init__(self, cut: Cut, file) -> None:
        self.cut, self.file = cut, file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.cut.count():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os._exit(9)
        return self.file.write(data)


def write_checkpoint(folder: Folder, step: int, attempt: str) -> None:
    """As driver and worker do it, the clearing before and the pruning after included."""
    discard_after(folder, step - 10, attempt)
    name = checkpoint_name(step, attempt)
    files = {path.name: path.read_bytes() for path in GOLDEN.iterdir() if path.name != "manifest.json"}
    receipt = write_part(folder, name, files, 1, Progress(step=step))
    commit_checkpoint(folder, name, [receipt])
    for old in list_checkpoints(folder)[0][:-2]:
        remove_checkpoint(old)


def in_a_child(action) -> int:
    """The exit status of a forked process that does it."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_checkpoint_cut_off_at_any_of_its_writes_harms_none(tmp_path, monkeypatch):
    cuts = 0
    for last in range(200):
        folder = Folder(str(tmp_path / str(last)))
        for step in (10, 20):
            write_checkpoint(folder, step, "aaaaaa")
        with monkeypatch.context() as patch:

            def interrupted(last=last, folder=folder, patch=patch):
                Cut(patch, last)
                write_checkpoint(folder, 30, "bbbbbb")

            status = in_a_child(interrupted)
        assert status in (0, 9)
        loaded, skipped = find_latest_valid(folder)
        step = loaded.checkpoint.step
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


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small disk, which takes root")
def test_a_full_disk_stops_the_run_and_more_room_lets_it_go_on(prose, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        more = ["--model.hidden_size", 64, "--train.checkpoint_every", 4, "--train.keep_checkpoints", 30]
        ended = job(*flags(prose, disk, *more))
        assert ended.status == 1
        assert "No space left" in ended.err
        assert "saved at step" in ended.err
        assert ended.err.count("\n") == 1
        loaded, _ = find_latest_valid(Folder(str(disk / "run" / "checkpoints")))
        assert loaded
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        again = job(*flags(prose, disk, *more))
        assert f"resuming from step {loaded.checkpoint.step} of" in again.out
        assert again.status == 0, again.err
        assert job(*flags(prose, tmp_path / "calm", *more)).status == 0
        assert result(disk / "run")["weights_sha256"] == result(tmp_path / "calm" / "run")["weights_sha256"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- object stores ---


@pytest.fixture(scope="module")
def bucket():
    """A bucket on an S3 server of the test's own: gives a function from a path to its address."""
    pytest.importorskip("moto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        until = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < until
            time.sleep(0.1)
        query = f"?scheme=http&endpoint_override=127.0.0.1%3A{port}&region=us-east-1"
        from pyarrow import fs

        options = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
        fs.S3FileSystem(allow_bucket_creation=True, **options).create_dir("bucket")
        yield lambda path: f"s3://bucket/{path}{query}"
    server.kill()
    server.wait()


@pytest.mark.slow
def test_a_run_on_an_object_store_is_the_same_run(bucket, prose, tmp_path):
    more = ["--train.log_every", 5, "--train.checkpoint_every", 10]
    assert job(*flags(prose, tmp_path, *more)).status == 0
    stopped = job(*flags(prose, bucket("runs"), *more, "--train.max_steps", 33))
    assert stopped.status == 0, stopped.err
    ended = job(*flags(prose, bucket("runs"), *more))
    assert ended.status == 0, ended.err
    assert "resuming from step 33" in ended.out
    folder = Folder.resolve(bucket("runs")) / "run"
    found, expected = read_result(folder), result(tmp_path / "run")
    assert found["weights_sha256"] == expected["weights_sha256"]
    losses = [json.loads(line) for line in folder.read("metrics.jsonl").splitlines()]
    assert [(row["step"], row["nats"]) for row in losses if row["split"] == "train"] == [
        (row["step"], row["nats"]) for row in rows(tmp_path / "run", "train")
    ]
    assert job("generate", folder.address).out == expected["generated"] + "\n"


# --- one driver ---


def owner_of(folder, **changes):
    mine = lease.acquire_lease(folder)
    owner = json.loads(folder.read("owner.json"))
    mine.release()
    folder.write("owner.json", json.dumps({**owner, **changes}).encode())


def test_a_living_driver_keeps_its_run(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    mine = lease.acquire_lease(folder)
    with pytest.raises(UserError, match=rf"this run is in use by process {os.getpid()} on "):
        lease.acquire_lease(folder)
    mine.check()
    mine.release()
    lease.acquire_lease(folder).release()
    assert not folder.has("owner.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 - 1},
        {"started_at": "1"},
        {"boot": "another"},
        {"host": "elsewhere", "heartbeat": time.time() - 100},
    ],
)
def test_a_dead_drivers_run_is_taken_at_once(tmp_path, changes):
    folder = Folder(str(tmp_path / "run"))
    owner_of(folder, **changes)
    lease.acquire_lease(folder).release()


def test_a_driver_elsewhere_is_given_time(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    owner_of(folder, host="elsewhere")
    with pytest.raises(UserError, match="if it is dead, retry in"):
        lease.acquire_lease(folder)


def test_a_driver_elsewhere_is_listened_to(tmp_path, monkeypatch):
    """A job that is submitted again after its head has died must not be refused for it."""
    monkeypatch.setattr(lease, "LEASE_TIMEOUT_S", 2.0)
    folder, said = Folder(str(tmp_path / "run")), []
    owner_of(folder, host="elsewhere")
    lease.wait_until_expired(folder, said.append)
    assert len(said) == 1
    assert "waiting for a heartbeat" in said[0]
    owner_of(folder, host="elsewhere")
    place = tmp_path / "run" / "owner.json"
    beat = {**json.loads(place.read_text()), "heartbeat": time.time() + 1}
    timer = threading.Timer(0.7, folder.write, ("owner.json", json.dumps(beat).encode()))
    timer.start()
    with pytest.raises(UserError, match="this run is in use"):
        lease.wait_until_expired(folder, said.append)
    timer.join()


class Faltering:
    """A store that fails some times before it answers."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def get_file_info(self, _):
        if self.errors:
            raise OSError(self.errors.pop(0))
        return SimpleNamespace(type="File")


def test_a_store_that_falters_is_waited_for(monkeypatch):
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.0, 0.0))
    busy = "When getting information: AWS Error SLOW_DOWN during HeadObject operation"
    cases = [(True, [busy] * 2, ""), (True, [busy] * 3, "SLOW_DOWN"), (False, [busy], "SLOW_DOWN")]
    for retry, errors, told in [*cases, (True, ["AWS Error ACCESS_DENIED"], "ACCESS_DENIED")]:
        folder = Folder("s3://bucket/runs", retry, (Faltering(*errors), "bucket/runs"))
        if told:
            with pytest.raises(OSError, match=told):
                (folder / "run").has("manifest.json")
        else:
            assert (folder / "run").has("manifest.json")


def test_a_driver_that_lost_its_run_writes_no_more(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    first = lease.acquire_lease(folder)
    folder.remove("owner.json")
    second = lease.acquire_lease(folder)
    with pytest.raises(RunFailed, match="another driver has taken this run over"):
        first.check()
    second.check()
    second.release()
    first.released.set()


@pytest.mark.slow
def test_a_killed_driver_is_replaced_at_once_and_nothing_is_lost(prose, tmp_path):
    """And a second driver, while the first lives, is refused before anything is touched."""
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
    found, expected = (rows(place / "run", "train") for place in (tmp_path, tmp_path / "calm"))
    assert [(row["step"], row["nats"]) for row in found] == [(row["step"], row["nats"]) for row in expected]


# --- formats and memory ---


def test_the_golden_checkpoint_opens():
    """One of format 1, kept as it was written; what it says is what it said then."""
    said = job("generate", GOLDEN, "--generate.prefix", "the", "--generate.length", 20)
    assert said.status == 0, said.err
    assert said.out == (GOLDEN.parent / "said.txt").read_text()
    loaded = open_checkpoint(Folder(str(GOLDEN)))
    assert weights_sha256(loaded.weights) == GOLDEN_WEIGHTS
    assert (loaded.checkpoint.step, loaded.progress.step, loaded.progress.window) == (30, 30, 30)
    hidden, memory = load_lane_state(loaded.checkpoint, range(3, 7))
    assert hidden.shape == memory.shape == (1, 4, 8)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow(prose, tmp_path):
    """Over 10,000 steps: the last half takes no more than a few pages."""
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
    second_half = [size for step, size in sizes.items() if 5000 <= step < 10_000]  # at the end it draws the curve
    assert len(second_half) > 10
    assert max(second_half) - min(second_half) < 4 << 20, second_half


# --- a group of workers that starts while the last one's parts lie there ---


def test_what_a_new_attempt_has_begun_to_write_stays(tmp_path):
    """The driver hears of a start a moment after it; by then the first parts may be written."""
    folder = Folder(str(tmp_path))
    write_checkpoint(folder, 10, "aaaaaa")
    for attempt in ("aaaaaa", "bbbbbb"):
        (folder / checkpoint_name(20, attempt)).write("model.safetensors", b"a part")
    discard_after(folder, 10, "bbbbbb")
    assert folder.names() == ["step-000010-aaaaaa", "step-000020-bbbbbb"]


def test_weights_that_burst_at_the_last_step_are_told(prose, tmp_path):
    ended = job(
        *flags(
            prose, tmp_path, "--train.max_steps", 1, "--optimizer.learning_rate", 1e38, "--optimizer.weight_decay", 1e3
        )
    )
    assert ended.status == 1
    assert "no longer finite" in ended.err


def test_events_of_one_worker_are_taken_in_order():
    """Ray may swap calls to an actor that is asynchronous."""
    import asyncio

    async def swapped():
        channel = EventChannel.__ray_metadata__.modified_class()
        for number in (1, 0, 0, 3, 1, 2):  # and send one again whose receipt was lost
            await channel.post("worker", number, bytes([number]))
        return await channel.poll_events(1.0)

    assert asyncio.run(swapped()) == [b"\0", b"\1", b"\2", b"\3"]
