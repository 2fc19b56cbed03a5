"""Who may write into a run's folder: one living driver.

``owner.json`` names the driver (host, machine, boot, process, and a word of its own) and when it last showed
a sign of life. A driver is provably dead when its process is gone from the host we are on, or that
host has been started anew; of one elsewhere only a long silence tells. Before each commit the
driver looks whether the file still names it.
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
HEARTBEAT_INTERVAL_S = 10.0  # seconds between two signs of life
LEASE_TIMEOUT_S = 60.0  # seconds of silence after which a driver on another host is taken for dead


class Lease:
    """The right to write into a run's folder, until it is released or taken."""

    def __init__(self, folder: Folder, owner: dict[str, Any]) -> None:
        self.folder = folder
        self.owner = owner
        self.checked = time.time()
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        while not self.released.wait(HEARTBEAT_INTERVAL_S):
            with contextlib.suppress(OSError, RunFailed):  # the next commit tells, if it lasts
                self.check()
                _write(self.folder, self.owner)

    def check(self) -> None:
        """RunFailed where another driver has taken the run over; OSError where that cannot be read."""
        try:
            found = _parsed(self.folder.read(OWNER_FILE, 4096))
        except FileNotFoundError:
            found = None
        if found is None or found["word"] != self.owner["word"]:
            raise RunFailed(f"{self.folder}: another driver has taken this run over; this one writes no more")
        self.checked = time.time()

    def check_if_stale(self) -> None:
        """``check``, unless it was done within two signs of life; by the wall's clock, which runs on in sleep."""
        if abs(time.time() - self.checked) > 2 * HEARTBEAT_INTERVAL_S:
            self.check()

    def release(self) -> None:
        """Gives the run back, so that the next driver need not ask."""
        self.released.set()
        self.thread.join()
        with contextlib.suppress(OSError, RunFailed):
            self.check()
            self.folder.remove(OWNER_FILE)


def raise_if_held(folder: Folder) -> None:
    """UserError where a living driver has the run."""
    owner = _read(folder)
    if owner is None or _is_dead(owner):
        return
    silent = max(0.0, time.time() - owner["beat"])
    here = owner["host"] == socket.gethostname()
    remedy = "stop it first" if here else f"if that is dead, start again in {max(1, LEASE_TIMEOUT_S - silent):.0f} s"
    raise UserError(
        f"{folder}: this run is alive, driven by process {owner['pid']} on {owner['host']} (last sign of life "
        f"{silent:.0f} s ago)",
        f"{remedy}, or choose another run.name",
    )


def wait_until_expired(folder: Folder, tell: Callable[[str], None]) -> None:
    """As ``refuse_if_alive``, but that a driver on another host is listened to: it may have died a moment ago."""
    first, told = _read(folder), False
    while True:
        try:
            return raise_if_held(folder)
        except UserError:
            owner = _read(folder)
            if owner and (owner["host"] == socket.gethostname() or owner != first):
                raise
        if not told:
            tell(f"waiting for a sign of life of {folder}'s driver on {first['host'] if first else 'another host'}")
            told = True
        time.sleep(0.5)


def acquire_lease(folder: Folder) -> Lease:
    """Takes the run; UserError where a living driver has it."""
    owner = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "boot": _boot(),
        "pid": os.getpid(),
        "born": _process_start_time(os.getpid()),
        "word": uuid.uuid4().hex,
    }
    with _flock(folder):
        raise_if_held(folder)
        _write(folder, owner)
    lease = Lease(folder, owner)
    lease.check()
    return lease


@contextlib.contextmanager
def _flock(folder: Folder) -> Iterator[None]:
    """Keeps drivers on one disk from taking a run at the same moment."""
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


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        return _parsed(folder.read(OWNER_FILE, 4096))
    except OSError:
        return None


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        owner = json.loads(data)
        types = {"host": str, "machine": str, "boot": str, "pid": int, "born": str, "word": str, "beat": float}
        return owner if all(type(owner[key]) is kind for key, kind in types.items()) else None
    except (ValueError, LookupError, TypeError):
        return None


def _write(folder: Folder, owner: dict[str, Any]) -> None:
    folder.write(OWNER_FILE, json.dumps({**owner, "beat": time.time()}).encode())


def _is_dead(owner: dict[str, Any]) -> bool:
    if owner["host"] == socket.gethostname() and owner["machine"] == _machine():
        return bool(owner["boot"] != _boot() or owner["born"] != _process_start_time(owner["pid"]))
    return bool(time.time() - owner["beat"] > LEASE_TIMEOUT_S)


def _machine() -> str:
    """Which machine, and which container on it: only there does a process's number tell anything."""
    with contextlib.suppress(OSError):
        return f"{Path('/etc/machine-id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _boot() -> str:
    """A word that changes when the host is started anew."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _process_start_time(pid: int) -> str:
    """When a process was born, so that a later one of its number is not taken for it; '' if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        state, *fields = stat[stat.rindex(")") + 2 :].split()
        return "" if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        pass
    try:  # no /proc: a process of that number is taken for the driver
        os.kill(pid, 0)
        return "alive" if not Path("/proc/self").exists() else ""
    except OSError:
        return ""
