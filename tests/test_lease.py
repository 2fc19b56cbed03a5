"""The lease of a run: one live driver writes into its folder."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from job.errors import RunFailed, UserError
from job.run.lease import acquire_lease, wait_until_expired
from job.storage import Folder


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path / "run"))


def leave_lease_of(folder: Folder, **changes: object) -> dict[str, object]:
    """Leaves the lease of this process, as if it had been killed, with some fields changed."""
    lease = acquire_lease(folder)
    owner = {**json.loads(folder.read("owner.json")), **changes}
    lease.release()
    folder.write("owner.json", json.dumps(owner).encode())
    return owner


def test_acquire_lease_while_driver_is_alive_is_refused(folder):
    lease = acquire_lease(folder)
    with pytest.raises(UserError, match=rf"this run is in use by process {os.getpid()} on "):
        acquire_lease(folder)
    lease.check()
    lease.release()
    acquire_lease(folder).release()
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
def test_acquire_lease_of_dead_driver_succeeds_at_once(folder, changes):
    leave_lease_of(folder, **changes)
    acquire_lease(folder).release()


def test_acquire_lease_of_silent_driver_on_another_host_says_when_to_retry(folder):
    leave_lease_of(folder, host="elsewhere")
    with pytest.raises(UserError) as error:
        acquire_lease(folder)
    assert error.value.remedy.startswith("if it is dead, retry in")


def test_acquire_lease_of_live_driver_of_version_0_1_is_refused(folder):
    owner = leave_lease_of(folder)
    old_keys = {"started_at": "born", "token": "word", "heartbeat": "beat"}
    old_owner = {old_keys.get(key, key): value for key, value in owner.items()}
    folder.write("owner.json", json.dumps(old_owner).encode())
    with pytest.raises(UserError, match="this run is in use"):
        acquire_lease(folder)


def test_wait_until_expired_returns_once_heartbeats_stop(folder, monkeypatch):
    """A job that is submitted again after its head node has died must not be refused."""
    monkeypatch.setattr("job.run.lease.LEASE_TIMEOUT_S", 2.0)
    messages: list[str] = []
    leave_lease_of(folder, host="elsewhere")
    wait_until_expired(folder, messages.append)
    assert len(messages) == 1
    assert "waiting for a heartbeat" in messages[0]


def test_wait_until_expired_raises_on_a_new_heartbeat(folder):
    owner = leave_lease_of(folder, host="elsewhere")
    heartbeat = json.dumps({**owner, "heartbeat": time.time() + 1}).encode()
    timer = threading.Timer(0.7, folder.write, ("owner.json", heartbeat))
    timer.start()
    with pytest.raises(UserError, match="this run is in use"):
        wait_until_expired(folder, lambda _: None)
    timer.join()


def test_check_after_takeover_raises_run_failed(folder):
    first = acquire_lease(folder)
    folder.remove("owner.json")
    second = acquire_lease(folder)
    with pytest.raises(RunFailed, match="another driver has taken this run over"):
        first.check()
    second.check()
    second.release()
    first.released.set()


def test_release_after_takeover_keeps_the_new_lease(folder):
    first = acquire_lease(folder)
    folder.remove("owner.json")
    second = acquire_lease(folder)
    first.release()
    second.check()
    second.release()
    assert not Path(folder.address, "owner.json").exists()
