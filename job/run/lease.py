"""The lease of a run: only one live driver may write into its folder.

``owner.json`` names the driver (host, machine, boot, process, and a random fencing token) and the time of its last
heartbeat. A driver is provably dead if its process is gone from this host, or if this host has been rebooted. One on
another host counts as dead once it has missed its heartbeats for ``LEASE_TIMEOUT_S``. Before each commit the driver
checks that the file still contains its token.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from job.errors import RunFailed, UserError
from job.storage import Folder

OWNER_FILE = "owner.json"
HEARTBEAT_INTERVAL_S = 10.0
LEASE_TIMEOUT_S = 60.0  # without a heartbeat
_MAX_OWNER_BYTES = 4096
_OWNER_TYPES = {
    "host": str, "machine": str, "boot": str, "pid": int, "started_at": str, "token": str, "heartbeat": float
}  # fmt: skip
_OLD_KEYS = {"born": "started_at", "word": "token", "beat": "heartbeat"}  # as version 0.1 wrote them


class Lease:
    """The right to write into a run's folder, until it is released or another driver takes it over.

    As a context manager it is released at the end of the block.
    """

    def __init__(self, folder: Folder, owner: dict[str, Any]) -> None:
        self.folder = folder
        self.owner = owner
        self.checked_at = 0.0  # by time.time
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._send_heartbeats, daemon=True)

    def _send_heartbeats(self) -> None:
        while not self.released.wait(HEARTBEAT_INTERVAL_S):
            with contextlib.suppress(OSError, RunFailed):  # if it lasts, the next commit raises it
                self.check()
                _write_owner(self.folder, self.owner)

    def check(self) -> None:
        """Raises RunFailed if another driver has taken the run over, and OSError if that cannot be read."""
        try:
            owner = _parse_owner(self.folder.read(OWNER_FILE, _MAX_OWNER_BYTES))
        except FileNotFoundError:
            owner = None
        if owner is None or owner["token"] != self.owner["token"]:
            raise RunFailed(f"{self.folder}: another driver has taken this run over; this one stops writing")
        self.checked_at = time.time()

    def check_if_stale(self) -> None:
        """Like ``check``, unless it was done within the last two heartbeats.

        Uses wall-clock time, because the monotonic clock may stop while the machine is suspended.
        """
        if abs(time.time() - self.checked_at) > 2 * HEARTBEAT_INTERVAL_S:
            self.check()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lease up, so that the next driver can acquire it at once."""
        self.released.set()
        self.thread.join()
        with contextlib.suppress(OSError, RunFailed):
            self.check()
            self.folder.remove(OWNER_FILE)


def acquire_lease(folder: Folder) -> Lease:
    """Acquires the lease of the run in a folder. Raises UserError if a live driver holds it."""
    owner = {
        "host": socket.gethostname(),
        "machine": _machine_id(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "started_at": _process_start_time(os.getpid()),
        "token": uuid.uuid4().hex,
    }
    with _flock(folder):
        raise_if_held(folder)
        _write_owner(folder, owner)
    lease = Lease(folder, owner)
    lease.check()
    lease.thread.start()
    return lease


def raise_if_held(folder: Folder) -> None:
    """Raises UserError if a live driver holds the lease."""
    owner = _read_owner(folder)
    if owner is None or _is_dead(owner):
        return
    age_s = max(0.0, time.time() - owner["heartbeat"])
    retry = f"if it is dead, retry in {max(1, LEASE_TIMEOUT_S - age_s):.0f} s"
    raise UserError(
        f"{folder}: this run is in use by process {owner['pid']} on {owner['host']} (last heartbeat {age_s:.0f} s ago)",
        f"{'stop it' if _is_local(owner) else retry}, or choose another run.name",
    )


def wait_until_expired(folder: Folder, notify: Callable[[str], None]) -> None:
    """Like ``raise_if_held``, but if the holder is on another host, first waits for a missed heartbeat.

    Args:
        folder: the run's folder
        notify: called once with a message if it has to wait
    """
    first, is_notified = _read_owner(folder), False
    while True:
        try:
            return raise_if_held(folder)
        except UserError:
            owner = _read_owner(folder)
            if owner and (_is_local(owner) or owner != first):
                raise
        if not is_notified:
            notify(f"waiting for a heartbeat of {folder}'s driver on {first['host'] if first else 'another host'}")
            is_notified = True
        time.sleep(0.5)


@contextlib.contextmanager
def _flock(folder: Folder) -> Iterator[None]:
    """Keeps two drivers on one disk from acquiring the lease at the same moment."""
    if folder.local_path is None:
        yield
        return
    folder.local_path.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.local_path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read_owner(folder: Folder) -> dict[str, Any] | None:
    try:
        return _parse_owner(folder.read(OWNER_FILE, _MAX_OWNER_BYTES))
    except OSError:
        return None


def _parse_owner(data: bytes) -> dict[str, Any] | None:
    try:
        owner = {_OLD_KEYS.get(key, key): value for key, value in json.loads(data).items()}
        return owner if all(type(owner[key]) is cls for key, cls in _OWNER_TYPES.items()) else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _write_owner(folder: Folder, owner: dict[str, Any]) -> None:
    folder.write(OWNER_FILE, json.dumps({**owner, "heartbeat": time.time()}).encode())


def _is_local(owner: dict[str, Any]) -> bool:
    return bool(owner["host"] == socket.gethostname())


def _is_dead(owner: dict[str, Any]) -> bool:
    if _is_local(owner) and owner["machine"] == _machine_id():
        return bool(owner["boot"] != _boot_id() or owner["started_at"] != _process_start_time(owner["pid"]))
    return bool(time.time() - owner["heartbeat"] > LEASE_TIMEOUT_S)


def _machine_id() -> str:
    """Identifies the machine and the container, within which alone a process id means anything."""
    with contextlib.suppress(OSError):
        return f"{Path('/etc/machine-id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _boot_id() -> str:
    """Identifies the boot: changes when the host is restarted."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _process_start_time(pid: int) -> str:
    """When a process started, to distinguish it from a later one with the same id. Empty if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        state, *fields = stat[stat.rindex(")") + 2 :].split()
        return "" if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        pass
    try:  # without /proc, any process with this id is taken for the driver
        os.kill(pid, 0)
        return "alive" if not Path("/proc/self").exists() else ""
    except OSError:
        return ""
