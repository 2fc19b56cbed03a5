"""The lease of a run: one live driver writes into its folder."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs

from job.errors import RunFailed, UserError
from job.run import lease as lease_module
from job.run.lease import acquire_lease, wait_until_expired
from job.storage import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "run"))


def leave_lease_of(folder: Folder, **changes: object) -> dict[str, object]:
    """Leaves the lease of this process, as if it had been killed, with some fields changed."""
    lease = acquire_lease(folder)
    owner = {**json.loads(folder.read("owner.json")), **changes}
    lease.release()
    folder.write("owner.json", json.dumps(owner).encode())
    return owner


def test_acquire_lease_while_driver_is_alive_is_refused(folder: Folder) -> None:
    lease = acquire_lease(folder)
    with pytest.raises(UserError, match=rf"this run is in use by process {os.getpid()} on "):
        acquire_lease(folder)
    lease.check()
    lease.release()
    acquire_lease(folder).release()
    assert not folder.has("owner.json")


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 - 1}, {"pid": 2**70}, {"started_at": "1"}, {"boot": "another"}],
)
def test_acquire_lease_of_dead_driver_succeeds_at_once(folder: Folder, changes: dict[str, Any]) -> None:
    leave_lease_of(folder, **changes)
    acquire_lease(folder).release()


def test_acquire_lease_of_silent_driver_on_another_host_says_when_to_retry(folder: Folder) -> None:
    leave_lease_of(folder, host="elsewhere")
    with pytest.raises(UserError) as error:
        acquire_lease(folder)
    assert error.value.remedy.startswith("if it is dead, retry in")


def test_acquire_lease_of_live_driver_of_version_0_1_is_refused(folder: Folder) -> None:
    owner = leave_lease_of(folder)
    old_keys = {"started_at": "born", "token": "word", "heartbeat": "beat"}
    old_owner = {old_keys.get(key, key): value for key, value in owner.items()}
    folder.write("owner.json", json.dumps(old_owner).encode())
    with pytest.raises(UserError, match="this run is in use"):
        acquire_lease(folder)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monotonic clock of the lease's module, which only sleeping moves on; sets off what is due by then."""
    clock = SimpleNamespace(now=1000.0, alarms={})

    def sleep(seconds: float) -> None:
        clock.now += seconds
        for due in [due for due in clock.alarms if due <= clock.now]:
            clock.alarms.pop(due)()

    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep, time=time.time)
    monkeypatch.setattr(lease_module, "time", fake)
    return clock


# Whatever its clock shows: behind, ahead, or as ours.
OTHER_HOSTS = [{"host": "elsewhere", "heartbeat": time.time() + ahead} for ahead in (-70, 3600, 0)]
RESTARTED_CONTAINER = {"machine": "pid:[4026532000]"}  # of the same host name
OTHERS = [*OTHER_HOSTS, RESTARTED_CONTAINER, {"pid": "damaged"}, {"host": "escape \x1b[2J"}]


@pytest.mark.parametrize("changes", OTHERS)
def test_wait_until_expired_without_heartbeat_waits_for_the_duration_of_the_lease(
    folder: Folder, clock: SimpleNamespace, changes: dict[str, float | str]
) -> None:
    """A job that is submitted again after its head node has died must not be refused."""
    messages: list[str] = []
    leave_lease_of(folder, **changes)
    with pytest.raises(UserError, match="this run is in use"):
        acquire_lease(folder)
    observer = wait_until_expired(folder, messages.append)
    assert 60 <= clock.now - 1000 <= 61
    [message] = messages
    assert message.startswith("waiting for a heartbeat of ")
    assert message.endswith(", for at most 60 s")
    assert "\x1b" not in message
    acquire_lease(folder, observer).release()


@pytest.mark.parametrize("changes", OTHERS)
@pytest.mark.parametrize("file", ["owner.json", "heartbeat.json"])
def test_wait_until_expired_with_heartbeat_is_refused(
    folder: Folder, clock: SimpleNamespace, changes: dict[str, float | str], file: str
) -> None:
    """An owner whose clock was 70 s behind was taken over while it was alive. Version 0.1 rewrites the owner."""
    owner = leave_lease_of(folder, **changes)
    clock.alarms[1050.0] = lambda: folder.write(file, json.dumps({**owner, "heartbeat": 1.0}).encode())
    with pytest.raises(UserError, match="this run is in use"):
        wait_until_expired(folder, lambda _: None)
    assert 50 <= clock.now - 1000 <= 51


def test_acquire_lease_after_late_heartbeat_is_refused(folder: Folder, clock: SimpleNamespace) -> None:
    """The driver may come back to life between the wait and the start of the run."""
    leave_lease_of(folder, host="elsewhere")
    observer = wait_until_expired(folder, lambda _: None)
    folder.write("heartbeat.json", b"{}")
    with pytest.raises(UserError, match="this run is in use"):
        acquire_lease(folder, observer)


def test_wait_until_expired_of_released_lease_returns_at_once(folder: Folder, clock: SimpleNamespace) -> None:
    leave_lease_of(folder, host="elsewhere")
    clock.alarms[1005.0] = lambda: folder.remove("owner.json")
    wait_until_expired(folder, lambda _: None)
    assert clock.now <= 1006


@pytest.mark.parametrize("hidden", [PermissionError, FileNotFoundError])
@pytest.mark.parametrize("foreign", [True, False])
def test_acquire_lease_of_process_that_proc_hides_is_refused(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, hidden: type, foreign: bool
) -> None:
    """With hidepid=2 another user's live driver counted as dead."""
    leave_lease_of(folder)

    def kill(pid: int, number: int) -> None:
        if foreign:
            raise PermissionError

    def read_text(path: Path) -> str:
        if path.parts[:2] == ("/", "proc") and path.name == "stat":
            raise hidden(path)
        return original(path)

    original = Path.read_text
    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(UserError, match="this run is in use"):
        wait_until_expired(folder, lambda _: None)


@pytest.mark.parametrize("error", ["SLOW_DOWN", "ACCESS_DENIED"])
def test_acquire_lease_that_cannot_be_read_is_refused(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """A single temporary error of the storage made a live driver's run free."""
    leave_lease_of(folder)
    monkeypatch.setattr(Folder, "read", lambda *_: raise_(OSError(f"AWS Error {error}")))
    with pytest.raises(UserError, match=rf"owner.json: cannot be read: AWS Error {error}"):
        acquire_lease(folder)


def raise_(error: Exception) -> None:
    raise error


def test_acquire_lease_that_cannot_be_written_raises_run_failed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may become full after ``check_writable``. The error named neither the folder nor a remedy."""
    threads = threading.active_count()
    with monkeypatch.context() as patch, pytest.raises(RunFailed) as error:
        patch.setattr("job.storage._write_local", lambda *_: raise_(OSError(28, "No space left on device")))
        acquire_lease(folder)
    assert error.value.problem == f"{folder}/owner.json: cannot be written: No space left on device"
    assert error.value.remedy
    assert threading.active_count() == threads
    acquire_lease(folder).release()


def test_acquire_lease_of_folder_that_a_reader_has_locked_succeeds(folder: Folder) -> None:
    """Anyone who could read the folder could block the start of its run."""
    acquire_lease(folder).release()
    descriptor = os.open(folder.address, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    acquire_lease(folder).release()
    os.close(descriptor)
    assert (Path(folder.address) / ".lock").stat().st_mode & 0o777 == 0o600


def test_acquire_lease_while_another_driver_acquires_it_is_refused(folder: Folder) -> None:
    acquire_lease(folder).release()
    with open(Path(folder.address) / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another driver is just starting this run"):
            acquire_lease(folder)


def test_check_after_takeover_raises_run_failed(folder: Folder) -> None:
    first = acquire_lease(folder)
    folder.remove("owner.json")
    second = acquire_lease(folder)
    with pytest.raises(RunFailed, match="another driver has taken this run over"):
        first.check()
    second.check()
    second.release()
    first.released.set()


def test_release_after_takeover_keeps_the_new_lease(folder: Folder) -> None:
    first = acquire_lease(folder)
    folder.remove("owner.json")
    second = acquire_lease(folder)
    first.release()
    second.check()
    second.release()
    assert not Path(folder.address, "owner.json").exists()


class Store:
    """An object store in memory. ``on_write`` is called with the name of a file before it is written."""

    def __init__(self) -> None:
        self.inner = fs._MockFileSystem()
        self.inner.create_dir("bucket/run/checkpoints/step-000010-abcdef", recursive=True)
        self.on_write = lambda name: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def open_output_stream(self, path: str) -> Any:
        self.on_write(path.rpartition("/")[2])
        return self.inner.open_output_stream(path)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("job.storage.RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    return Store()


@pytest.fixture
def stored_folder(store: Store) -> Folder:
    return Folder("s3://bucket/run", retry=True, location=(store, "bucket/run"))


def take_over(folder: Folder) -> bytes:
    """Overwrites the lease as the next driver does after it has expired. Returns the new owner."""
    owner = json.dumps({**json.loads(folder.read("owner.json")), "token": "of the new owner"}).encode()
    folder.write("owner.json", owner)
    return owner


def fail_once_and_take_over(store: Store, folder: Folder, file: str) -> None:
    """Makes the next write of a file fail once; before its next attempt another driver takes the run over."""

    def on_write(name: str) -> None:
        if name == file:
            store.on_write = lambda _: None
            take_over(folder)
            raise OSError("AWS Error SLOW_DOWN")

    store.on_write = on_write


@pytest.mark.parametrize("file", ["manifest.json", "config.toml"])
def test_retried_write_after_takeover_is_not_repeated(store: Store, stored_folder: Folder, file: str) -> None:
    """A manifest whose write was retried for longer than the lease was committed after the takeover."""
    with acquire_lease(stored_folder) as lease:
        fail_once_and_take_over(store, stored_folder, file)
        with pytest.raises(RunFailed, match="another driver has taken this run over"):
            (lease.folder / "checkpoints").write(file, b"of the old owner")
        assert not (stored_folder / "checkpoints").has(file)
    assert b"of the new owner" in stored_folder.read("owner.json")


def test_local_write_that_blocks_until_after_a_takeover_is_not_completed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver whose file system did not respond committed a manifest after it had been taken over."""
    fsync = os.fsync
    with acquire_lease(folder) as lease:

        def block(descriptor: int) -> None:
            monkeypatch.setattr(os, "fsync", fsync)
            take_over(folder)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", block)
        with pytest.raises(RunFailed, match="another driver has taken this run over"):
            lease.folder.write("manifest.json", b"of the old owner")
        assert folder.names() == [".lock", "owner.json"]


def test_retried_acquisition_after_another_driver_was_faster_is_refused(store: Store, stored_folder: Folder) -> None:
    acquire_lease(stored_folder).release()
    faster = json.dumps({"host": "elsewhere"}).encode()

    def on_write(name: str) -> None:
        store.on_write = lambda _: None
        stored_folder.write("owner.json", faster)
        raise OSError("AWS Error SLOW_DOWN")

    store.on_write = on_write
    with pytest.raises(UserError, match="this run is in use"):
        acquire_lease(stored_folder)
    assert stored_folder.read("owner.json") == faster


def test_retried_acquisition_that_had_succeeded_succeeds(
    store: Store, stored_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a request may be lost."""
    write = Store.open_output_stream
    lost = ["owner.json"]

    class Lost:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> Any:
            return self.stream

        def __exit__(self, *_: Any) -> None:
            self.stream.close()
            if lost:
                lost.pop()
                raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(Store, "open_output_stream", lambda self, path: Lost(write(self, path)))
    acquire_lease(stored_folder).release()
    assert not lost


def test_removal_after_takeover_is_refused(stored_folder: Folder) -> None:
    """Between the manifest and the removal of an old checkpoint."""
    with acquire_lease(stored_folder) as lease:
        checkpoints = lease.folder / "checkpoints"
        checkpoints.write("manifest.json", b"{}")
        take_over(stored_folder)
        with pytest.raises(RunFailed):
            checkpoints.remove("manifest.json")
        with pytest.raises(RunFailed):
            lease.folder.remove("checkpoints")
    assert (stored_folder / "checkpoints").has("manifest.json")


def test_slow_heartbeat_after_takeover_keeps_the_new_lease(store: Store, stored_folder: Folder) -> None:
    """The heartbeat of a slow old driver overwrote the lease of the new owner."""
    with acquire_lease(stored_folder) as lease:
        owners = []
        store.on_write = lambda name: owners.append(take_over(stored_folder)) if name == "heartbeat.json" else None
        lease._renew()
        store.on_write = lambda _: None
        assert stored_folder.read("owner.json") == owners[0]
        with pytest.raises(RunFailed):
            lease.check()


def test_write_after_missed_heartbeats_first_renews_the_lease(store: Store, stored_folder: Folder) -> None:
    """So that the lease cannot expire during the write."""
    with acquire_lease(stored_folder) as lease:
        lease.renewed_at -= 30.0
        names: list[str] = []
        store.on_write = names.append
        lease.folder.write("config.toml", b"")
        lease.folder.write("config.toml", b"")
        assert names == ["heartbeat.json", "config.toml", "config.toml"]


def test_write_while_heartbeats_fail_is_refused(store: Store, stored_folder: Folder) -> None:
    """The lease may expire at any time, and the write after it."""

    def on_write(name: str) -> None:
        if name == "heartbeat.json":
            raise OSError("AWS Error SLOW_DOWN")

    with acquire_lease(stored_folder) as lease:
        lease.renewed_at -= 30.0
        store.on_write = on_write
        with pytest.raises(OSError, match="SLOW_DOWN"):
            lease.folder.write("config.toml", b"")
        store.on_write = lambda _: None
        assert not stored_folder.has("config.toml")


def test_write_after_slow_heartbeat_is_refused(
    store: Store, stored_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat that took most of the lease's duration leaves too little of it for a write."""
    now = time.time()
    with acquire_lease(stored_folder) as lease, monkeypatch.context() as patch:
        fake = SimpleNamespace(time=lambda: now, monotonic=time.monotonic)
        patch.setattr(lease_module, "time", fake)

        def on_write(name: str) -> None:
            nonlocal now
            now += 50.0 if name == "heartbeat.json" else 0.0

        store.on_write = on_write
        now += 30.0
        with pytest.raises(TimeoutError, match=r"heartbeat.json could not be written within 20 s"):
            lease.folder.write("config.toml", b"")
        assert not stored_folder.has("config.toml")
